"""Following a log: nothing lost, nothing twice, whatever happens to the connection."""

import threading
import time
from collections.abc import Callable

import pytest

from k8s import logs
from k8s.client import Client
from k8s.errors import NotFound, WaitTimeout
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.simulated_node import SimulatedNode, now_ns


def beside(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_follow_from_the_first_line_to_the_end(
    client: Client, node: SimulatedNode, name: str
) -> None:
    pod = node.pod(name)

    def container() -> None:
        time.sleep(0.3)
        pod.start()
        for i in range(5):
            pod.write(f"line {i}", "")
            time.sleep(0.05)
        pod.end()

    work = beside(container)
    lines = list(logs.follow(client, name, "main", deadline_s=20))
    assert lines == [part for i in range(5) for part in (f"line {i}", "")]
    work.join()


def test_follow_survives_cuts_with_equal_lines(
    faulty: Client, faults: FaultyApi, node: SimulatedNode, name: str
) -> None:
    """Equal lines, also with equal time stamps, are told apart by how many there were."""
    pod = node.pod(name)
    pod.start()

    def container() -> None:
        for i in range(30):
            pod.write("same", "same", "same", stamp=now_ns())
            pod.write(f"{i}")
            time.sleep(0.05)
            if i % 7 == 6:
                faults.cut()
        pod.end()

    work = beside(container)
    lines = list(logs.follow(faulty, name, "main", deadline_s=30))
    assert lines == [part for i in range(30) for part in ("same", "same", "same", f"{i}")]
    assert len(faults.seen("/log.*follow")) >= 4
    work.join()


def test_cut_in_the_middle_of_a_line(
    faulty: Client, faults: FaultyApi, node: SimulatedNode, name: str
) -> None:
    pod = node.pod(name)
    pod.start()
    pod.write("first", "x" * 3000, "third")
    pod.end()
    faults.add(Fault("GET .*/log", times=2, cut_after=2000))
    assert list(logs.follow(faulty, name, "main", deadline_s=20)) == ["first", "x" * 3000, "third"]


def test_half_open_connection_is_noticed(
    faulty: Client,
    faults: FaultyApi,
    node: SimulatedNode,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No line is lost that was written meanwhile."""
    monkeypatch.setattr("k8s.logs._SILENCE_S", 1.0)
    pod = node.pod(name)
    pod.start()
    pod.write("before")

    def container() -> None:
        time.sleep(0.5)
        faults.freeze()
        pod.write("meanwhile")
        pod.end()

    work = beside(container)
    assert list(logs.follow(faulty, name, "main", deadline_s=20)) == ["before", "meanwhile"]
    work.join()


def test_follow_ends_with_the_run_it_began_with(
    client: Client, faults: FaultyApi, faulty: Client, node: SimulatedNode, name: str
) -> None:
    """A container that was restarted while we were cut off: its log is the previous one now."""
    pod = node.pod(name)
    pod.start()
    pod.write("one")

    def container() -> None:
        time.sleep(0.3)
        with faults.away():
            pod.write("two")
            pod.restart()
            pod.write("of the next run")
            time.sleep(0.3)

    work = beside(container)
    assert list(logs.follow(faulty, name, "main", deadline_s=20)) == ["one", "two"]
    assert logs.tail(client, name, "main", 5) == ["of the next run"]
    assert logs.tail(client, name, "main", 1, previous=True) == ["two"]
    work.join()


def test_deadline_names_the_last_line(client: Client, node: SimulatedNode, name: str) -> None:
    pod = node.pod(name)
    with pytest.raises(WaitTimeout, match="didn't start in time; last state: no status"):
        list(logs.follow(client, name, "main", deadline_s=0.4))
    pod.wait("ContainerCreating", "")
    with pytest.raises(WaitTimeout, match="last state: ContainerCreating"):
        list(logs.follow(client, name, "main", deadline_s=0.4))
    pod.start()
    pod.write("loading shard 3 of 4")
    with pytest.raises(WaitTimeout, match="last line: loading shard 3 of 4"):
        list(logs.follow(client, name, "main", deadline_s=0.8))


def test_tail_of_what_has_no_log(client: Client, node: SimulatedNode, name: str) -> None:
    assert logs.tail(client, "nothing", "main", 5) == []
    with pytest.raises(NotFound):
        list(logs.follow(client, "nothing", "main", deadline_s=5))


def test_log_that_is_gone(client: Client, node: SimulatedNode, name: str) -> None:
    """The kubelet then answers 200 and says so where the log should be."""
    pod = node.pod(name)
    pod.start()
    pod.runs[-1].lines.append("unable to retrieve container logs for containerd://abc")
    pod.end()
    with pytest.raises(NotFound, match=r"log of container main .* is gone: unable to retrieve"):
        list(logs.follow(client, name, "main", deadline_s=20))
