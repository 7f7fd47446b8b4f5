"""Jobs: created or adopted, followed, judged; real Job controller, simulated node."""

import threading
import time
from typing import Any

import pytest

from k8s.client import Client
from k8s.errors import AlreadyExists, JobFailed, WaitTimeout
from k8s.jobs import run_job
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.simulated_node import SimulatedNode, SimulatedPod, patch_status

Obj = dict[str, Any]


def job(name: str, **spec: Any) -> Obj:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"t": name}},
        "spec": {
            "backoffLimit": 0,
            **spec,
            "template": {
                "metadata": {"labels": {"t": name}},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 0,
                    "containers": [
                        {"name": "main", "image": "i", "resources": {"limits": {"memory": "4Gi"}}}
                    ],
                },
            },
        },
    }


def good(pod: SimulatedPod) -> None:
    pod.start()
    pod.say(event="progress", message="half", percent=50)
    pod.write("a line of some library")
    pod.say(event="result", commit="c" * 40)
    pod.end()


def run(client: Client, wanted: Obj, **options: Any) -> tuple[Any, list[Obj]]:
    events: list[Obj] = []
    options = {"deadline_s": 30, "on_event": events.append, **options}
    return run_job(client, wanted, **options), events


def test_events_and_result(client: Client, node: SimulatedNode, name: str) -> None:
    node.play(name, good)
    result, events = run(client, job(name))
    assert result.result == {"event": "result", "commit": "c" * 40}
    assert [event["event"] for event in result.events] == ["progress", "result"]
    assert {"event": "log", "message": "a line of some library"} in events
    assert result.node == node.name


def test_result_with_another_exit_code_is_a_result(
    client: Client, node: SimulatedNode, name: str
) -> None:
    def missed(pod: SimulatedPod) -> None:
        pod.start()
        pod.say(event="result", verdict="fail")
        pod.end(1)

    node.play(name, missed)
    result, _ = run(client, job(name))
    assert result.result["verdict"] == "fail"


def test_adopts_a_running_job_and_reads_all_of_its_log(
    client: Client, node: SimulatedNode, name: str
) -> None:
    """As after a SIGKILL of the run that started it."""

    def slow(pod: SimulatedPod) -> None:
        pod.start()
        pod.say(event="progress", message="before")
        time.sleep(1.5)
        pod.say(event="result")
        pod.end()

    class Interrupt(BaseException):
        pass

    def interrupt(event: Obj) -> None:
        if event["event"] == "progress":
            raise Interrupt

    node.play(name, slow)
    with pytest.raises(Interrupt):
        run_job(client, job(name), deadline_s=30, on_event=interrupt)
    again = job(name)
    again["spec"]["template"]["metadata"]["labels"]["who"] = "second"
    first = client.get("Job", name)["metadata"]["uid"]
    result, _ = run(client, again)
    assert [event["event"] for event in result.events] == ["progress", "result"]
    finished, _ = run(client, again)
    assert finished.events == result.events
    assert client.get("Job", name)["metadata"]["uid"] == first


def test_failed_job_is_made_again(client: Client, node: SimulatedNode, name: str) -> None:
    def bad(pod: SimulatedPod) -> None:
        pod.start()
        pod.say(event="error", error="GatedRepo", message="org/model is gated", next="ask for it")
        pod.end(1)

    node.play(name, bad)
    with pytest.raises(
        JobFailed, match=r"GatedRepo: org/model is gated. Next: ask for it"
    ) as error:
        run(client, job(name))
    assert error.value.error == "GatedRepo"
    failed = client.get("Job", name)["metadata"]["uid"]
    node.play(name, good)
    run(client, job(name))
    assert client.get("Job", name)["metadata"]["uid"] != failed


def test_another_content_of_that_name_is_refused_while_it_runs(
    client: Client, node: SimulatedNode, name: str
) -> None:
    client.create(job(name, activeDeadlineSeconds=77))
    with pytest.raises(JobFailed, match="runs already, with another content"):
        run(client, job(name))


def test_job_that_is_being_deleted_is_waited_for(
    client: Client, node: SimulatedNode, name: str
) -> None:
    running = client.create(job(name))
    client.patch("Job", name, {"metadata": {"finalizers": ["test.example/hold"]}})
    client.delete("Job", name)

    def let_go() -> None:
        client.patch("Job", name, {"metadata": {"finalizers": None}})
        node.play(name, good, other_than=running["metadata"]["uid"])

    threading.Timer(1.0, let_go).start()
    run(client, job(name))
    assert client.get("Job", name)["metadata"]["uid"] != running["metadata"]["uid"]


@pytest.mark.parametrize(
    ("code", "reason", "match"),
    [
        (137, "OOMKilled", "out of memory.*memory limit of container 'main' is 4Gi"),
        (137, "Error", "SIGKILL, most likely out of memory.*4Gi"),
        (143, "Error", "told to stop"),
        (2, "Error", "exit code 2 and without a result; its last lines:\n  Traceback"),
        (0, "Completed", "exit code 0 and without a result"),
    ],
)
def test_bad_ends(
    client: Client, node: SimulatedNode, name: str, code: int, reason: str, match: str
) -> None:
    def bad(pod: SimulatedPod) -> None:
        pod.start()
        pod.write("Traceback")
        pod.end(code, reason)

    node.play(name, bad)
    with pytest.raises(JobFailed, match=match):
        run(client, job(name))


def test_evicted(client: Client, node: SimulatedNode, name: str) -> None:
    def bad(pod: SimulatedPod) -> None:
        pod.start()
        pod.end(137, "Error")
        pod.evict("The node was low on resource: ephemeral-storage.")

    node.play(name, bad)
    with pytest.raises(JobFailed, match="evicted: The node was low on resource: ephemeral-storage"):
        run(client, job(name))


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError"])
def test_container_that_can_not_start(
    client: Client, node: SimulatedNode, name: str, reason: str
) -> None:
    node.play(name, lambda pod: pod.wait(reason, 'secret "hf-token" not found'))
    with pytest.raises(JobFailed, match=f'{reason}: secret "hf-token" not found'):
        run(client, job(name))


def test_others_that_keep_making_it(faulty: Client, faults: FaultyApi, name: str) -> None:
    faults.add(Fault("POST .*/jobs", times=50, status=409, reason="AlreadyExists"))
    with pytest.raises(AlreadyExists):
        run(faulty, job(name))
    assert len(faults.seen("POST .*/jobs")) == 5


def test_pod_without_a_node(
    client: Client, server: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script() -> None:
        while not (pods := client.list("Pod", labels={"t": name})):
            time.sleep(0.1)
        why = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        conditions = [{**condition, "message": why}]
        patch_status(client, pods[0]["metadata"]["name"], {"conditions": conditions})

    threading.Thread(target=script, daemon=True).start()
    with monkeypatch.context() as patience:
        patience.setattr("k8s.jobs._NO_NODE_S", 0.6)
        with pytest.raises(JobFailed, match=r"no node takes its Pod for 1 s: 0/1 nodes .*gpu"):
            run(client, job(name))
    with pytest.raises(WaitTimeout, match="Unschedulable: 0/1 nodes are available"):
        run(client, job(name), deadline_s=0.6)


def test_that_no_node_takes_the_pod_is_said_once_while_one_may_come(
    client: Client, server: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.jobs._SAID_AFTER_S", 0.2)
    monkeypatch.setattr("k8s.jobs._NO_NODE_S", 3.0)

    def script() -> None:
        while not (pods := client.list("Pod", labels={"t": name})):
            time.sleep(0.1)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        conditions = [{**condition, "message": "0/2 nodes are available: 2 Insufficient cpu."}]
        patch_status(client, pods[0]["metadata"]["name"], {"conditions": conditions})

    threading.Thread(target=script, daemon=True).start()
    events: list[Obj] = []
    with pytest.raises(JobFailed, match="no node takes its Pod"):
        run_job(client, job(name), deadline_s=30, on_event=events.append)
    [warned] = [event["message"] for event in events if event["event"] == "warning"]
    assert "Unschedulable: 0/2 nodes are available: 2 Insufficient cpu. Waits for" in warned


def test_quota(client: Client, server: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k8s.jobs._NO_POD_S", 0.3)
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    full = Client(client.transport, name)
    full.create(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "q"},
            "spec": {"hard": {"pods": "0"}},
        }
    )
    with pytest.raises(JobFailed, match=r"its Pod is refused: .*exceeded quota: q"):
        run(full, job(name))


def test_active_deadline(client: Client, node: SimulatedNode, name: str) -> None:
    def endless(pod: SimulatedPod) -> None:
        pod.start()
        pod.write("downloading")

    node.play(name, endless)
    with pytest.raises(JobFailed, match=r"longer than its activeDeadlineSeconds \(2\)"):
        run(client, job(name, activeDeadlineSeconds=2))


def test_deleted_by_someone_else(client: Client, node: SimulatedNode, name: str) -> None:
    def deleted(pod: SimulatedPod) -> None:
        pod.start()
        pod.write("downloading")
        client.delete("Job", name)

    node.play(name, deleted)
    with pytest.raises(JobFailed, match=r"deleted by someone else|before its end: .*exist"):
        run(client, job(name))


def test_one_job_and_no_lost_event_with_a_bad_api(
    faulty: Client, faults: FaultyApi, node: SimulatedNode, name: str
) -> None:
    """Cut, half-open, 429, 500, a lost answer to the create."""

    def script(pod: SimulatedPod) -> None:
        pod.start()
        for i in range(20):
            pod.say(event="progress", step=i)
            time.sleep(0.05)
            if i in (5, 10, 15):
                faults.cut()
        pod.say(event="result")
        pod.end()

    faults.add(
        Fault("POST .*/jobs", lost=True),
        Fault("GET .*/pods", status=429, retry_after_s=1),
        Fault("GET .*/jobs/", times=2, status=500),
    )
    node.play(name, script)
    result, _ = run(faulty, job(name))
    assert [event.get("step") for event in result.events] == [*range(20), None]
    assert len(faulty.list("Pod", labels={"t": name})) == 1
