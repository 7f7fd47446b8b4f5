"""The Lease: one holder, whatever the clocks, the network and the others do."""

import threading
import time
from collections.abc import Callable

import pytest

from k8s.client import Client
from k8s.errors import Conflict, LeaseHeld, LeaseLost
from k8s.lease import Lease
from tests.k8s.api_faults import Fault, FaultyApi


def spec(client: Client, name: str) -> dict[str, object]:
    return dict(client.get("Lease", name)["spec"])


def test_taken_renewed_reentered_and_released(client: Client, name: str) -> None:
    with Lease.acquire(client, name, "run-1", ttl_s=3) as lease:
        first = spec(client, name)["renewTime"]
        time.sleep(1.5)
        assert spec(client, name)["renewTime"] != first
        lease.check()
    with Lease.acquire(client, name, "run-1", ttl_s=3) as again:
        again.check()
        assert spec(client, name)["leaseTransitions"] == 0
        again.release()
    assert spec(client, name)["holderIdentity"] == ""
    Lease.acquire(client, name, "run-2", ttl_s=3)
    assert spec(client, name)["leaseTransitions"] == 1


def test_held_by_another_names_it_and_how_to_look(client: Client, name: str) -> None:
    Lease.acquire(client, name, "run-1")
    with pytest.raises(LeaseHeld, match=f"held by run-1 .*get lease {name} -o yaml") as error:
        Lease.acquire(client, name, "run-2")
    assert error.value.holder == "run-1"


def test_waits_for_the_release_and_says_for_whom(client: Client, name: str) -> None:
    first = Lease.acquire(client, name, "run-1", ttl_s=60)
    since = spec(client, name)["acquireTime"]
    threading.Timer(1.0, first.release).start()
    said: list[str] = []
    lease = Lease.acquire(client, name, "run-2", ttl_s=60, wait_s=10, waiting=said.append)
    assert lease.succeeded == "", "it was given back"
    assert spec(client, name)["holderIdentity"] == "run-2"
    [once] = said
    assert f"Lease {name} is held by run-1 since {since}; waits for it" in once


@pytest.mark.parametrize("clock", ["1999-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"])
def test_silent_holder_is_succeeded_after_its_ttl_whatever_its_clock(
    client: Client, name: str, clock: str
) -> None:
    """client-go#448: neither a clock behind nor one ahead makes a living holder dead."""
    Lease.acquire(client, name, "killed", ttl_s=1)
    client.patch("Lease", name, {"spec": {"renewTime": clock}})
    started = time.monotonic()
    assert Lease.acquire(client, name, "next", ttl_s=1, wait_s=10).succeeded == "killed"
    assert 1 <= time.monotonic() - started < 6


def test_living_holder_keeps_it(client: Client, name: str) -> None:
    with Lease.acquire(client, name, "run-1", ttl_s=1) as lease:
        with pytest.raises(LeaseHeld):
            Lease.acquire(client, name, "run-2", ttl_s=1, wait_s=2.2)
        lease.check()


def test_of_two_that_want_it_one_gets_it(client: Client, name: str) -> None:
    got: list[str] = []

    def want(holder: str) -> None:
        try:
            Lease.acquire(client, name, holder)
            got.append(holder)
        except LeaseHeld:
            pass

    threads = [threading.Thread(target=want, args=(f"run-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_taken_over_is_noticed(client: Client, name: str) -> None:
    with Lease.acquire(client, name, "run-1", ttl_s=1) as lease:
        client.patch("Lease", name, {"spec": {"holderIdentity": "thief"}})
        time.sleep(1)
        with pytest.raises(LeaseLost, match="held by thief"):
            lease.check()
        lease.release()
    assert spec(client, name)["holderIdentity"] == "thief"


def test_not_renewable_is_noticed_and_ends_when_it_is_still_ours(
    faulty: Client, faults: FaultyApi, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease.acquire(faulty, name, "run-1", ttl_s=1) as lease:
        with faults.away():
            time.sleep(1.2)
            with pytest.raises(LeaseLost, match="not renewed for"):
                lease.check()
        time.sleep(1.5)
        lease.check()


def test_a_laptop_that_slept_is_not_sure_of_it(
    client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """time.monotonic() stands still in a suspend."""
    lease = Lease.acquire(client, name, "run-1", ttl_s=30)
    lease.check()
    awake = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda _: awake + 3600)
    with pytest.raises(LeaseLost, match="not renewed for 36"):
        lease.check()


def test_release_ends_when_others_keep_changing_it(
    faulty: Client, faults: FaultyApi, name: str
) -> None:
    lease = Lease.acquire(faulty, name, "run-1")
    faults.add(Fault("PUT .*/leases/", times=50, status=409))
    with pytest.raises(Conflict):
        lease.release()
    assert len(faults.seen("PUT")) == 5


def test_release_survives_conflicts(faulty: Client, faults: FaultyApi, name: str) -> None:
    lease = Lease.acquire(faulty, name, "run-1")
    faults.add(Fault("PUT .*/leases/", times=2, status=409))
    lease.release()
    assert spec(faulty, name)["holderIdentity"] == ""


def test_renewal_survives_conflicts_and_lost_answers(
    faulty: Client, client: Client, faults: FaultyApi, name: str
) -> None:
    with Lease.acquire(faulty, name, "run-1", ttl_s=1) as lease:
        faults.add(Fault("PUT", status=409), Fault("PUT", lost=True), Fault("GET", status=500))
        # The third PUT is the first one whose answer comes.
        renewed_after(client, name, lambda: len(faults.seen("PUT")) >= 3, lease)
        client.patch("Lease", name, {"metadata": {"labels": {"touched": "by-someone"}}})
        since = spec(client, name)["renewTime"]
        renewed_after(client, name, lambda: spec(client, name)["renewTime"] != since, lease)


def renewed_after(
    client: Client, name: str, reached: Callable[[], bool], lease: Lease, seconds: float = 20
) -> None:
    """Wait until it has come so far, and the Lease is surely ours then."""
    deadline = time.monotonic() + seconds
    while not (reached() and lease.lost is None):
        assert time.monotonic() < deadline, (lease.lost, spec(client, name))
        time.sleep(0.05)
