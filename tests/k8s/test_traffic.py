"""Moving users between slots, against a real API server; its endpoints are written by hand."""

import threading
import time

import pytest

from catalog import ClusterSpec, ModelSpec
from k8s import manifests, slots, traffic
from k8s.client import Client
from k8s.errors import ConditionFailed, Conflict, LeaseLost, Unreachable, WaitTimeout
from k8s.manifests import Release, Slot
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.simulated_engine import comes_up, playing
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.stub_engine import StubEngine, serving
from tests.k8s.test_rollout import cluster, install_crds, model, replicas

__all__ = ["cluster", "install_crds", "model"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(traffic, "ENDPOINTS_SECONDS", 2.0)


def up(client: Client, model: ModelSpec, cluster: ClusterSpec, slot: Slot) -> Release:
    """A slot with a Deployment; its Pod is made ready by whoever plays the node."""
    release = Release(model, cluster, "a" * 40, slot, f"run-{slot}", 60)
    client.apply(manifests.deployment(release))
    return release


def wait_ready(client: Client, model: ModelSpec, slot: Slot) -> None:
    deadline = time.monotonic() + 15
    while not traffic.ready_replicas(client, model, slot):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def write_endpoints(client: Client, model: ModelSpec, *pods: str) -> None:
    """What the endpoint slice controller does."""
    client.apply(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{model.object_name}-1",
                "namespace": client.namespace,
                "labels": {"kubernetes.io/service-name": model.object_name},
            },
            "addressType": "IPv4",
            "endpoints": [
                {
                    "addresses": [f"10.9.9.{i + 1}"],
                    "conditions": {"ready": True},
                    "targetRef": {"kind": "Pod", "name": pod},
                }
                for i, pod in enumerate(pods)
            ],
        },
        force=True,
    )


def pod_of(client: Client, release: Release) -> str:
    return str(slots.pods(client, release.model, release.slot)[0]["metadata"]["name"])


def test_nothing_is_live_at_first(client: Client, model: ModelSpec) -> None:
    assert traffic.live_slot(client, model) is None
    assert traffic.idle_slot(client, model) == "blue"
    assert traffic.ready_replicas(client, model, "blue") == 0


def test_a_service_without_a_slot_is_nothing_live(client: Client, model: ModelSpec) -> None:
    client.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": model.object_name},
            "spec": {"selector": {"app": "x"}, "ports": [{"port": 8000}]},
        }
    )
    assert traffic.live_slot(client, model) is None


def test_users_move_when_the_endpoints_are_the_candidates(
    client: Client, node: SimulatedNode, model: ModelSpec, cluster: ClusterSpec
) -> None:
    old, new = up(client, model, cluster, "green"), up(client, model, cluster, "blue")
    traffic.apply_service(client, model, cluster, "green")
    with playing(node, old, comes_up), playing(node, new, comes_up):
        wait_ready(client, model, "green")
        wait_ready(client, model, "blue")
        green, blue = pod_of(client, old), pod_of(client, new)
        write_endpoints(client, model, green)
        later = threading.Timer(0.8, write_endpoints, (client, model, blue))
        later.start()
        start = time.monotonic()
        traffic.switch(client, model, cluster, "blue")
        assert time.monotonic() - start > 0.5, "not before the endpoints have moved"
        later.join()
    assert traffic.live_slot(client, model) == "blue"
    assert traffic.idle_slot(client, model) == "green"


@pytest.mark.parametrize("both", [True, False])
def test_users_are_moved_back_when_the_endpoints_do_not_follow(
    client: Client, node: SimulatedNode, model: ModelSpec, cluster: ClusterSpec, both: bool
) -> None:
    old, new = up(client, model, cluster, "green"), up(client, model, cluster, "blue")
    traffic.apply_service(client, model, cluster, "green")
    with playing(node, old, comes_up), playing(node, new, comes_up):
        wait_ready(client, model, "green")
        wait_ready(client, model, "blue")
        pods = [pod_of(client, old)] + ([pod_of(client, new)] if both else [])
        write_endpoints(client, model, *pods)
        with pytest.raises(WaitTimeout, match="don't show the Pods of slot blue"):
            traffic.switch(client, model, cluster, "blue")
    assert traffic.live_slot(client, model) == "green"


@pytest.mark.parametrize("when", [1, 2])  # before the move; at a look at the endpoints
def test_a_lost_lease_moves_nobody_back(
    client: Client, node: SimulatedNode, model: ModelSpec, cluster: ClusterSpec, when: int
) -> None:
    old, new = up(client, model, cluster, "green"), up(client, model, cluster, "blue")
    traffic.apply_service(client, model, cluster, "green")
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == when:
            raise LeaseLost("held by run-2")

    with playing(node, old, comes_up), playing(node, new, comes_up):
        wait_ready(client, model, "blue")
        with pytest.raises(LeaseLost, match="held by run-2"):
            traffic.switch(client, model, cluster, "blue", check=check)
    # After the move the Service is for the new holder of the Lease to judge.
    assert traffic.live_slot(client, model) == ("green" if when == 1 else "blue")


def test_a_service_owned_by_others_is_handed_over_as_it_is(
    client: Client, model: ModelSpec, cluster: ClusterSpec
) -> None:
    service = manifests.service(model, cluster, "green")
    client.apply(service, manager="someone")
    with pytest.raises(Conflict) as error:
        traffic.apply_service(client, model, cluster, "blue", dry_run=True)
    assert (
        f"python -m k8s render {model.name} --cluster {cluster.name} --slot green --kind Service | "
        "kubectl apply --server-side --force-conflicts" in str(error.value)
    )


def test_a_service_that_leads_elsewhere_is_not_to_be_taken_over(
    client: Client, model: ModelSpec, cluster: ClusterSpec
) -> None:
    service = manifests.service(model, cluster, "green")
    service["spec"]["selector"] = {"app": "x"}
    service["spec"]["ports"][0]["targetPort"] = 80
    client.apply(service, manager="someone")
    with pytest.raises(Conflict, match="Rename or delete that Service, or rename the model") as e:
        traffic.apply_service(client, model, cluster, "blue", dry_run=True)
    assert "--force-conflicts" not in str(e.value)


def test_no_ready_pod_no_switch(
    client: Client, model: ModelSpec, cluster: ClusterSpec, node: SimulatedNode
) -> None:
    up(client, model, cluster, "blue")
    with pytest.raises(ConditionFailed, match="has no ready Pod: users stay where they are"):
        traffic.switch(client, model, cluster, "blue")
    assert client.find("Service", model.object_name) is None


def test_the_old_slot_ends_when_its_requests_have(
    client: Client,
    node: SimulatedNode,
    model: ModelSpec,
    cluster: ClusterSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = up(client, model, cluster, "green")
    traffic.apply_service(client, model, cluster, "blue")
    slow = model.model_copy(
        update={"rollout": model.rollout.model_copy(update={"drain_seconds": 30})}
    )
    with (
        playing(node, old, comes_up),
        serving(StubEngine("m", "/m", running=2, waiting=1)) as engine,
    ):
        monkeypatch.setattr(traffic, "PORT", engine.port)
        wait_ready(client, model, "green")
        said: list[str] = []

        def end() -> None:
            assert replicas(client, old.name) == 1
            engine.running = engine.waiting = 0

        later = threading.Timer(1.0, end)
        later.start()
        result = traffic.drain(client, slow, "green", progress=said.append)
        later.join()
    assert 1 < result.seconds < 15
    assert result.running_at_end == 0
    assert any("3 requests in flight" in line for line in said)
    assert replicas(client, old.name) == 0
    assert client.find("Deployment", old.name), "kept for a rollback"


def test_the_old_slot_ends_at_its_deadline(
    client: Client,
    node: SimulatedNode,
    model: ModelSpec,
    cluster: ClusterSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = up(client, model, cluster, "green")
    with playing(node, old, comes_up), serving(StubEngine("m", "/m", running=1)) as engine:
        monkeypatch.setattr(traffic, "PORT", engine.port)
        wait_ready(client, model, "green")
        result = traffic.drain(client, model, "green")
    assert result.running_at_end == 1
    assert 3 <= result.seconds < 15
    assert replicas(client, old.name) == 0


def test_pods_that_never_had_a_request_are_not_waited_for(
    client: Client, node: SimulatedNode, model: ModelSpec, cluster: ClusterSpec
) -> None:
    """Pending, as KEDA leaves some where GPUs are short."""
    up(client, model, cluster, "green")
    deadline = time.monotonic() + 15
    while not (pods := slots.pods(client, model, "green")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert traffic.in_flight(client, pods) == 0
    gone = {"metadata": {"name": "gone"}, "spec": {"nodeName": node.name}}
    assert traffic.in_flight(client, [*pods, gone]) is None, "asked, but there is no answer"
    result = traffic.drain(client, model, "green")
    assert (result.running_at_end, replicas(client, f"{model.object_name}-green")) == (0, 0)


def test_the_live_slot_is_never_drained(
    client: Client, model: ModelSpec, cluster: ClusterSpec
) -> None:
    traffic.apply_service(client, model, cluster, "blue")
    with pytest.raises(ConditionFailed, match="is live"):
        traffic.drain(client, model, "blue")


@pytest.mark.parametrize("scaled", [True, False])
def test_a_drain_that_was_stopped_leaves_who_went_live_there_alone(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    monkeypatch: pytest.MonkeyPatch,
    scaled: bool,
) -> None:
    """Ctrl-Z, and another run promotes meanwhile."""
    release = up(client, model, cluster, "blue")
    client.scale("Deployment", release.name, 1)
    traffic.apply_service(client, model, cluster, "green")
    thresholds = manifests.Thresholds(in_flight=4, waiting=1, headroom=0.9, lead_seconds=60.0)
    looks = []

    def in_flight(*_: object) -> float:
        looks.append(1)
        if len(looks) == 2:
            traffic.apply_service(client, model, cluster, "blue")
            if scaled:
                client.apply(manifests.scaled_object(release, thresholds, 1))
        return 0.0

    monkeypatch.setattr(traffic, "in_flight", in_flight)
    with pytest.raises(ConditionFailed, match="is live: it can't be drained"):
        traffic.drain(client, model, "blue")
    assert replicas(client, release.name) == 1
    assert bool(client.find("ScaledObject", release.name)) == scaled


def test_a_drain_whose_lease_is_lost_ends_nobody(
    client: Client, model: ModelSpec, cluster: ClusterSpec
) -> None:
    release = up(client, model, cluster, "blue")
    client.scale("Deployment", release.name, 1)
    traffic.apply_service(client, model, cluster, "green")

    def lost() -> None:
        raise LeaseLost("held by run-2")

    with pytest.raises(LeaseLost):
        traffic.drain(client, model, "blue", check=lost)
    assert replicas(client, release.name) == 1


@pytest.mark.parametrize("settled", [True, False], ids=["", "as it would be otherwise"])
def test_a_move_that_arrives_late_is_refused(
    client: Client,
    faulty: Client,
    faults: FaultyApi,
    node: SimulatedNode,
    model: ModelSpec,
    cluster: ClusterSpec,
    settled: bool,
) -> None:
    blue, green = (up(client, model, cluster, slot) for slot in ("blue", "green"))
    traffic.apply_service(client, model, cluster, "blue")
    with playing(node, blue, comes_up), playing(node, green, comes_up):
        wait_ready(client, model, "green")
        faults.add(Fault(r"PATCH .*/services/", times=20, delay_s=3.0))
        with pytest.raises(Unreachable):
            traffic.switch(faulty.within(1.0), model, cluster, "green")
        if settled:
            traffic.settle(client, model)
        assert traffic.live_slot(client, model) == "blue"
        # Each try of the move arrives 3 s after it was sent, the last of them 4 s after the first.
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline and traffic.live_slot(client, model) == "blue":
            time.sleep(0.1)
    assert traffic.live_slot(client, model) == ("blue" if settled else "green")


def test_a_service_that_others_change_moves_all_the_same(
    client: Client, node: SimulatedNode, model: ModelSpec, cluster: ClusterSpec
) -> None:
    new = up(client, model, cluster, "green")
    traffic.apply_service(client, model, cluster, "blue")
    changes: list[int] = []

    def check() -> None:
        if len(changes) < 2:  # between the look at it and the write
            changes.append(1)
            note = {"metadata": {"annotations": {"team/note": str(len(changes))}}}
            client.patch("Service", model.object_name, note)

    with playing(node, new, comes_up):
        wait_ready(client, model, "green")
        write_endpoints(client, model, pod_of(client, new))
        traffic.switch(client, model, cluster, "green", check=check)
    assert len(changes) == 2
    assert traffic.live_slot(client, model) == "green"
