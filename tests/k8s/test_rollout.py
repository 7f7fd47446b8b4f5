"""Rollouts against a real API server and its controllers; the node is simulated."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog
from k8s import fence, keda, manifests, readiness, records, rollout, slots, traffic
from k8s.client import Client, Obj
from k8s.errors import ConditionFailed, Conflict, KubernetesError, NotFound, WaitTimeout
from k8s.kinds import KINDS, Kind
from k8s.manifests import Release, Slot
from k8s.manifests.release import COMMIT, GATE, PROMOTION, STANDING_ASIDE, weights_key
from k8s.records import PromotionRecord
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.simulated_engine import DIGEST, EnginePod, comes_up, playing, unschedulable
from tests.k8s.simulated_node import SimulatedNode

SCHEMAS = Path(__file__).parents[1] / "schemas"
SHA = "a" * 40
CORE = "(EngineCore_DP0 pid=25) ERROR 11-25 02:00:00 [core.py:708] "


@pytest.fixture
def cluster(client: Client, server: object) -> ClusterSpec:
    """The lab's, in the test's namespace, with the CRDs and the platform's namespaced objects."""
    install_crds(client)
    spec = catalog().cluster("lab").model_copy(update={"namespace": client.namespace})
    for obj in manifests.platform(spec):
        if obj["kind"] in ("PersistentVolumeClaim", "ServiceAccount", "PodMonitor"):
            client.apply(obj)
    return spec


def install_crds(client: Client) -> None:
    """KEDA's and the Prometheus operator's kinds, without their programs."""
    crd = "CustomResourceDefinition"  # an admin's, so not one of the product's kinds
    plural = "customresourcedefinitions"
    KINDS[crd] = Kind(crd, "apiextensions.k8s.io/v1", plural, namespaced=False)
    for name in ("keda.sh_scaledobjects", "monitoring.coreos.com_podmonitors"):
        client.apply(yaml.safe_load((SCHEMAS / f"{name}.yaml").read_text()))
    deadline = time.monotonic() + 20
    while True:
        try:
            client.list("ScaledObject")
            client.list("PodMonitor")
            return
        except KubernetesError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture
def model(name: str) -> ModelSpec:
    """A model of its own for each test."""
    spec = catalog().model("smollm2-135m")
    policy = spec.rollout.model_copy(update={"soak_seconds": 1.0, "drain_seconds": 3})
    return spec.model_copy(update={"name": name, "rollout": policy})


@pytest.fixture
def release(model: ModelSpec, cluster: ClusterSpec) -> Release:
    return Release(model, cluster, SHA, "blue", "run-1", startup_seconds=60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(readiness, "UNSCHEDULABLE_SECONDS", 0.5)
    monkeypatch.setattr(readiness, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(readiness, "SLACK_SECONDS", 0.0)
    monkeypatch.setattr(traffic, "LOOK_SECONDS", 0.1)


def refused(
    client: Client, node: SimulatedNode, release: Release, script: Callable[[EnginePod], None]
) -> str:
    """Why the rollout was given up; it must not take long."""
    start = time.monotonic()
    with playing(node, release, script), pytest.raises(ConditionFailed) as error:
        rollout.roll_out(client, release)
    assert time.monotonic() - start < 15
    return str(error.value)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Up


def test_a_candidate_comes_up(client: Client, node: SimulatedNode, release: Release) -> None:
    said: list[str] = []
    with playing(node, release, comes_up) as pods:
        result = rollout.roll_out(client, release, progress=said.append)
        again = rollout.roll_out(client, release)
    assert (result.pod, result.node, result.pod_ip) == (pods[0].name, node.name, "127.0.0.1")
    assert result.image_digest == DIGEST
    assert result.pod.startswith(f"{release.name}-{result.template_hash}-")
    assert 0 <= result.seconds_to_ready < 30
    assert again == result, "the same promotion adopts what it finds"
    assert len(pods) == 1
    assert any(release.name in line for line in said)
    deployment = client.get("Deployment", release.name)
    assert slots.annotations(deployment)[COMMIT] == SHA
    fence.require(client, release.model, "run-1", ["weights"])
    marks = slots.annotations(client.get("Pod", result.pod))
    assert not set(readiness.KEEP) & set(marks), "a ready Pod may be moved again"


def test_another_promotion_starts_afresh(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    second = Release(release.model, release.cluster, SHA, "blue", "run-2", 60)
    with playing(node, release, comes_up):
        first = rollout.roll_out(client, release)
        result = rollout.roll_out(client, second)
    assert result.pod != first.pod
    with pytest.raises(fence.FenceError, match="run-1"):
        fence.require(client, release.model, "run-1", ["weights"])


def test_a_loading_pod_is_kept_where_it_is(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    seen: list[dict[str, str]] = []

    def script(engine: EnginePod) -> None:
        engine.starts()
        time.sleep(0.5)
        seen.append(slots.annotations(client.get("Pod", engine.name)))
        engine.becomes_ready()

    with playing(node, release, script):
        rollout.roll_out(client, release)
    assert seen[0].items() >= readiness.KEEP.items()


def test_an_image_that_cannot_be_pulled(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    why = refused(
        client,
        node,
        release,
        lambda engine: engine.waits("ImagePullBackOff", "Back-off pulling image x: 401"),
    )
    assert "ImagePullBackOff" in why
    assert "401" in why


def test_two_equal_exits_are_enough(client: Client, node: SimulatedNode, release: Release) -> None:
    line = (
        "ValueError: To serve at least one request with the model's max seq len (131072), 16.0 GiB "
        "KV cache is needed. The estimated maximum model length is 124928."
    )

    def script(engine: EnginePod) -> None:
        for _ in range(2):
            engine.starts("INFO loading", "Traceback (most recent call last):", CORE + line, "bye")
            time.sleep(0.3)
            engine.ends(1)
            time.sleep(0.4)

    why = refused(client, node, release, script)
    assert "estimated maximum model length is 124928" in why
    assert "Traceback" not in why
    assert "exit 1" in why


def test_engines_that_end_differently_get_a_third_start(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    def script(engine: EnginePod) -> None:
        for i in range(3):
            engine.starts(f"RuntimeError: reason {i}")
            time.sleep(0.3)
            engine.ends(1)
            time.sleep(0.4)

    why = refused(client, node, release, script)
    assert all(f"reason {i}" in why for i in range(3))


def test_an_engine_over_its_memory_limit(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    def script(engine: EnginePod) -> None:
        engine.starts()
        engine.ends(137, "OOMKilled")

    why = refused(client, node, release, script)
    assert "OOMKilled" in why
    assert "512Mi" in why


def test_a_dead_engine_core_that_hangs(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    why = refused(
        client,
        node,
        release,
        lambda engine: engine.starts(
            "INFO loading", CORE + "RuntimeError: Worker failed with error 'InvalidCxxCompiler'"
        ),
    )
    assert "InvalidCxxCompiler" in why
    assert "does not exit" in why


def test_nvidia_smi_fails(client: Client, node: SimulatedNode, release: Release) -> None:
    why = refused(
        client,
        node,
        release,
        lambda engine: engine.check_ends(9, "NVIDIA-SMI has failed: no communication with driver"),
    )
    assert "no communication with driver" in why


def test_ready_and_then_not(client: Client, node: SimulatedNode, release: Release) -> None:
    def script(engine: EnginePod) -> None:
        comes_up(engine)
        time.sleep(0.6)
        engine.writes("RuntimeError: lost its GPU")
        engine.becomes_ready(False)

    why = refused(client, node, release, script)
    assert "was ready, but not for 1 s" in why
    assert "lost its GPU" in why


def test_pods_that_failed_long_ago_count_no_more(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    """Evicted Pods stay, and the same commit in the same slot has the same template."""
    with playing(node, release, comes_up) as pods:
        rollout.roll_out(client, release)
        for evicted in range(readiness.SAME_EXITS):
            pods[evicted].fails("Evicted")
            wait_for(lambda: len(pods) > evicted + 1)  # noqa: B023
            wait_for(lambda: traffic.ready_replicas(client, release.model, "blue") == 1)
        assert len(slots.failed_pods(client, release.model, "blue")) == readiness.SAME_EXITS
        serving = slots.pods(client, release.model, "blue")
        assert [pod["metadata"]["name"] for pod in serving] == [pods[-1].name]
        traffic.scale_to_zero(client, release.model, "blue")
        wait_for(lambda: not slots.pods(client, release.model, "blue"))
        back = replace(release, promotion="run-rollback")
        assert rollout.roll_out(client, back).pod == pods[-1].name


def test_pods_that_fail_in_the_rollout_refuse_it(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    why = refused(
        client,
        node,
        release,
        lambda engine: engine.fails("UnexpectedAdmissionError"),
    )
    assert "UnexpectedAdmissionError" in why


def test_an_annotation_while_it_is_watched_is_no_change(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    def annotate(line: str) -> None:
        if "ready, watched for" not in line:
            return
        # For so long that some look at it comes before the controller's.
        for number in range(50):
            note = {"metadata": {"annotations": {"team/note": str(number)}}}
            threading.Timer(0.01 * number, client.patch, ["Deployment", release.name, note]).start()

    with playing(node, release, comes_up) as pods:
        assert rollout.roll_out(client, release, progress=annotate).pod == pods[0].name


def test_a_restart_while_it_is_watched(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    def script(engine: EnginePod) -> None:
        comes_up(engine)
        time.sleep(0.4)
        engine.ends(1)
        engine.starts()
        engine.becomes_ready()

    assert "was ready, but not for" in refused(client, node, release, script)


def test_no_gpu_is_free(client: Client, node: SimulatedNode, release: Release) -> None:
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    make_gpu_node(client, node, gpus=1)

    def report() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if pods := slots.pods(client, release.model, "blue"):
                unschedulable(client, pods[0]["metadata"]["name"], message)
                return
            time.sleep(0.1)

    reporter = threading.Thread(target=report)
    reporter.start()
    with pytest.raises(ConditionFailed) as error:
        rollout.roll_out(client, release)
    reporter.join()
    assert "Insufficient nvidia.com/gpu" in str(error.value)
    assert "1 of 1 nvidia.com/gpu free" in str(error.value)


def make_gpu_node(client: Client, node: SimulatedNode, gpus: int) -> None:
    from tests.k8s.simulated_node import _call

    status = {
        "allocatable": {"nvidia.com/gpu": str(gpus)},
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    _call(client, "PATCH", node.name, "status", {"status": status}, kind="nodes")


def test_a_quota_in_the_way(client: Client, node: SimulatedNode, release: Release) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-pods"},
        "spec": {"hard": {"pods": "0"}},
    }
    client.create(quota)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if client.get("ResourceQuota", "no-pods").get("status", {}).get("hard"):
                break
            time.sleep(0.1)
        why = refused(client, node, release, comes_up)
    finally:
        client.delete("ResourceQuota", "no-pods")
    assert "exceeded quota: no-pods" in why


def test_the_budget_ends(client: Client, node: SimulatedNode, release: Release) -> None:
    short = Release(release.model, release.cluster, SHA, "blue", "run-1", startup_seconds=1)
    with (
        playing(node, short, lambda engine: engine.starts("INFO still loading shard 3 of 30")),
        pytest.raises(WaitTimeout, match="still loading shard 3"),
    ):
        rollout.roll_out(client, short)


def test_a_pod_that_goes_away_while_its_engine_loads(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    short = Release(release.model, release.cluster, SHA, "blue", "run-1", startup_seconds=1)

    def script(engine: EnginePod) -> None:
        engine.starts("INFO loading")
        time.sleep(0.5)
        client.scale("Deployment", release.name, 0)

    start = time.monotonic()
    with playing(node, short, script), pytest.raises(WaitTimeout, match="its Pod is gone"):
        rollout.roll_out(client, short)
    assert time.monotonic() - start < 30


# Before anything is changed


def hand_made(client: Client, name: str, labels: dict[str, str]) -> Obj:
    return client.create(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "vllm", "image": "vllm"}]},
                },
            },
        }
    )


def test_a_deployment_made_by_hand_is_left_alone(client: Client, release: Release) -> None:
    hand_made(client, release.name, {"app": "vllm"})
    for attempt in (
        lambda: rollout.preflight(client, release.cluster, release.model),
        lambda: rollout.roll_out(client, release),
    ):
        with pytest.raises(ConditionFailed) as error:
            attempt()
        assert '{"app": "vllm"}' in str(error.value)
        assert '"vllm-promotion.io/slot": "blue"' in str(error.value)
    spec = client.get("Deployment", release.name)["spec"]
    assert spec["selector"] == {"matchLabels": {"app": "vllm"}}
    assert spec["replicas"] == 2
    assert client.find("PodDisruptionBudget", release.name) is None


def test_a_scaler_of_someone_else_is_found_first(client: Client, release: Release) -> None:
    client.create(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": f"{release.name}-by-hand"},
            "spec": {
                "scaleTargetRef": {
                    "apiVersion": "apps/v1",
                    "kind": "Deployment",
                    "name": release.name,
                },
                "maxReplicas": 10,
            },
        }
    )
    with pytest.raises(ConditionFailed, match=f"{release.name}-by-hand scales {release.name}"):
        rollout.preflight(client, release.cluster, release.model)


def test_a_service_of_someone_else(client: Client, release: Release) -> None:
    client.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": release.model.object_name},
            "spec": {"selector": {"app": "vllm"}, "ports": [{"port": 8000}]},
        }
    )
    with pytest.raises(Conflict, match="managed by someone else"):
        rollout.preflight(client, release.cluster, release.model)


def test_a_change_by_hand_is_named(client: Client, node: SimulatedNode, release: Release) -> None:
    with playing(node, release, comes_up):
        rollout.roll_out(client, release)
    patch = {"metadata": {"annotations": {PROMOTION: "mine"}}}
    client.patch("Deployment", release.name, patch, manager="kubectl-edit")
    with pytest.raises(Conflict, match="kubectl-edit") as error:
        rollout.roll_out(client, release)
    assert error.value.fields


def test_a_part_of_the_platform_is_missing(
    client: Client, cluster: ClusterSpec, model: ModelSpec
) -> None:
    other = cluster.model_copy(
        update={"storage": cluster.storage.model_copy(update={"claim": "no-such-claim"})}
    )
    with pytest.raises(NotFound, match="python -m k8s platform --cluster lab"):
        rollout.preflight(client, other, model)


def test_the_live_slot_takes_no_candidate(client: Client, release: Release) -> None:
    traffic.apply_service(client, release.model, release.cluster, "blue")
    with pytest.raises(ConditionFailed, match=r"slot blue of .* is live"):
        rollout.roll_out(client, release)


def test_preflight_changes_nothing(client: Client, cluster: ClusterSpec, model: ModelSpec) -> None:
    rollout.preflight(client, cluster, model)
    for kind in ("Deployment", "Service", "ScaledObject", "PodDisruptionBudget"):
        assert not [o for o in client.list(kind) if model.name in o["metadata"]["name"]]


# Down


def live(client: Client, release: Release, slot: Slot, promotion: str) -> str:
    """A slot that is live, without waiting for Pods."""
    spec = Release(release.model, release.cluster, SHA, slot, promotion, 60)
    client.apply(manifests.deployment(spec))
    client.apply(manifests.scaled_object(spec, manifests.Thresholds(8, 1, 0.9, 60), 1))
    traffic.apply_service(client, release.model, release.cluster, slot)
    return spec.name


def replicas(client: Client, name: str) -> int:
    return int(client.get("Deployment", name)["spec"]["replicas"])


def test_a_failed_candidate_is_abandoned(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    green = live(client, release, "green", "run-0")
    refused(client, node, release, lambda engine: engine.waits("ErrImageNeverPull", "no image"))
    profile, job = manifests.benchmark_job(release, "{}", deadline_s=60)
    client.create(profile)
    client.create(job)
    client.apply(manifests.scaled_object(release, manifests.Thresholds(8, 1, 0.9, 60), 1))
    done = rollout.abandon(client, release.model, "run-1")
    assert len(done) == 2
    assert replicas(client, release.name) == 0
    assert client.find("ScaledObject", release.name) is None
    assert gone(client, "Job", job["metadata"]["name"])
    assert gone(client, "ConfigMap", profile["metadata"]["name"])
    assert replicas(client, green) == 1
    assert client.find("ScaledObject", green) is not None
    assert rollout.abandon(client, release.model, "run-1") == []


def gone(client: Client, kind: str, name: str) -> bool:
    deadline = time.monotonic() + 10
    while client.find(kind, name) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    return client.find(kind, name) is None


def test_nothing_of_others_is_abandoned(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    with playing(node, release, comes_up):
        rollout.roll_out(client, release)
        assert rollout.abandon(client, release.model, "run-9") == []
        assert replicas(client, release.name) == 1
        traffic.apply_service(client, release.model, release.cluster, "blue")
        assert rollout.abandon(client, release.model, "run-1") == [], "it is live"
        assert replicas(client, release.name) == 1


def test_abandon_before_anything_was_done(client: Client, model: ModelSpec) -> None:
    assert rollout.abandon(client, model, "run-1") == []


def test_the_live_slot_makes_room_and_comes_back(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    green = live(client, release, "green", "run-0")
    client.scale("Deployment", green, 3)
    said: list[str] = []
    with (
        playing(node, release, lambda e: e.waits("ErrImageNeverPull", "")),
        pytest.raises(ConditionFailed),
    ):
        rollout.roll_out(client, release, strategy="recreate", progress=said.append)
    assert replicas(client, green) == 0
    assert any("makes room" in line for line in said)
    scaled = client.get("ScaledObject", green)
    assert slots.annotations(scaled)["autoscaling.keda.sh/paused-replicas"] == "0"
    with keda_stand_in(client, green):
        done = rollout.abandon(client, release.model, "run-1")
    assert done[-1] == f"Deployment {green} brought back to 3 replicas"
    assert replicas(client, green) == 3
    assert replicas(client, release.name) == 0
    scaled = client.get("ScaledObject", green)
    assert "autoscaling.keda.sh/paused-replicas" not in slots.annotations(scaled)
    assert STANDING_ASIDE not in slots.annotations(client.get("Deployment", green))


def test_what_made_room_for_another_promotion_is_not_brought_back(
    client: Client, release: Release
) -> None:
    green = live(client, release, "green", "run-0")
    client.scale("Deployment", green, 3)
    rollout._stand_aside(client, release.model, "green", "run-1", lambda _: None)
    # run-1 has lost its Lease to run-2, which finds the live slot like that.
    rollout._stand_aside(client, release.model, "green", "run-2", lambda _: None)
    assert rollout.abandon(client, release.model, "run-1") == []
    assert replicas(client, green) == 0
    with keda_stand_in(client, green):
        rollout.abandon(client, release.model, "run-2")
    assert replicas(client, green) == 3, "as many as there were at first"


def test_an_unreadable_note_brings_one_replica_back(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    spec = Release(release.model, release.cluster, SHA, "green", "run-0", 60)
    green = live(client, release, "green", "run-0")
    client.scale("Deployment", green, 0)
    note = {"metadata": {"annotations": {STANDING_ASIDE: "not JSON"}}}
    client.patch("Deployment", green, note)
    assert rollout.abandon(client, release.model, "run-1") == []
    client.delete("ScaledObject", green)
    with playing(node, spec, comes_up):
        rollout.reap(client, release.model, "run-2")
    assert replicas(client, green) == 1


def test_the_candidate_takes_over_from_those_that_made_room(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    green = Release(release.model, release.cluster, SHA, "green", "run-0", 60)
    live(client, release, "green", "run-0")
    said: list[str] = []
    with playing(node, green, comes_up):
        client.scale("Deployment", green.name, 2)
        deadline = time.monotonic() + 15
        while traffic.ready_replicas(client, release.model, "green") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        rollout._stand_aside(client, release.model, "green", "run-1", said.append)
        while traffic.ready_replicas(client, release.model, "green"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "OUTAGE" in said[-1]
    assert keda.candidate_min_replicas(client, release.model, release.cluster) == 2


def test_no_outage_is_stated_where_nobody_is_served(client: Client, release: Release) -> None:
    live(client, release, "green", "run-0")
    said: list[str] = []
    rollout._stand_aside(client, release.model, "green", "run-1", said.append)
    assert said == [
        f"{release.model.object_name}-green, which has no ready Pod, makes room for the candidate"
    ]
    assert keda.candidate_min_replicas(client, release.model, release.cluster) == 1


def test_a_pause_that_does_not_end_is_said(
    client: Client, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keda, "RESUME_SECONDS", 1.0)
    green = live(client, release, "green", "run-0")
    rollout._stand_aside(client, release.model, "green", "run-1", lambda _: None)
    with pytest.raises(KubernetesError, match="autoscaling not resumed: KEDA has made no"):
        rollout.abandon(client, release.model, "run-1")
    assert replicas(client, green) == 1, "brought back all the same"


def test_an_outage_ends_also_where_keda_can_not_be_told(
    client: Client, faulty: Client, faults: FaultyApi, release: Release
) -> None:
    green = live(client, release, "green", "run-0")
    client.scale("Deployment", green, 2)
    rollout._stand_aside(client, release.model, "green", "run-1", lambda _: None)
    faults.add(Fault(r"PATCH .*/scaledobjects/", times=100, status=500))
    with pytest.raises(KubernetesError, match="fault of the test proxy"):
        rollout.abandon(faulty.within(1.0), release.model, "run-1")
    assert replicas(client, green) == 2
    assert slots.standing_aside(client.get("Deployment", green)), "the rest is tried again"


class keda_stand_in:  # noqa: N801
    """Makes the HPA that KEDA would make."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, f"keda-hpa-{name}"
        scaled = client.get("ScaledObject", name)
        owner = {key: scaled[key] for key in ("apiVersion", "kind")}
        owner |= {key: scaled["metadata"][key] for key in ("name", "uid")}
        client.create(
            {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": self.name, "ownerReferences": [owner]},
                "spec": {
                    "scaleTargetRef": {
                        "apiVersion": "apps/v1",
                        "kind": "Deployment",
                        "name": name,
                    },
                    "minReplicas": scaled["spec"]["minReplicaCount"],
                    "maxReplicas": scaled["spec"]["maxReplicaCount"],
                },
            }
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.client.delete("HorizontalPodAutoscaler", self.name)


def test_what_a_killed_promotion_left_is_reaped(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    live(client, release, "green", "run-0")
    with playing(node, release, comes_up):
        rollout.roll_out(client, release)
        job = manifests.resolve_job(release.model, release.cluster, "main", "run-1")
        client.create(job)
        assert rollout.reap(client, release.model, "run-1") == [], "it is this promotion's"
        done = rollout.reap(client, release.model, "run-2")
    assert len(done) == 2
    assert replicas(client, release.name) == 0
    assert gone(client, "Job", job["metadata"]["name"])
    assert rollout.reap(client, release.model, "run-2") == []


def test_the_download_of_a_killed_promotion_goes_on_if_it_is_wanted(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    """At 90 % of 140 GB, say."""
    model = release.model
    job = manifests.download_job(model, release.cluster, SHA, "run-1")
    name, key = job["metadata"]["name"], weights_key(model.repo, SHA)
    client.create(job)
    assert rollout.reap(client, model, "run-2") == []
    assert rollout.end_downloads(client, model, "run-2", [key]) == []
    assert not gone(client, "Job", name)
    another = weights_key(model.repo, "b" * 40)
    assert rollout.end_downloads(client, model, "run-1", [another]) == [], "it is this promotion's"
    assert rollout.end_downloads(client, model, "run-2", [another]) == [f"Job {name} deleted"]
    assert gone(client, "Job", name)


def test_a_lost_service_is_not_taken_for_nothing_live(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    with playing(node, release, comes_up):
        result = rollout.roll_out(client, release)
        records.write(client, record(release, result.template_hash))
        with pytest.raises(ConditionFailed, match=r"Service .* is gone") as error:
            rollout.reap(client, release.model, "run-2")
    assert "--cluster lab --slot blue --kind Service |" in str(error.value)


def test_a_service_that_leads_to_nobody_does_not_end_who_could_serve(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    with playing(node, release, comes_up):
        result = rollout.roll_out(client, release)
        records.write(client, record(release, result.template_hash))
        traffic.apply_service(client, release.model, release.cluster, "green")
        with pytest.raises(ConditionFailed, match="selects slot green, which has no ready Pod"):
            rollout.reap(client, release.model, "run-2")
        assert replicas(client, release.name) == 1


def record(release: Release, template: str, promotion: str = "run-1") -> PromotionRecord:
    return PromotionRecord(
        promotion=promotion,
        cluster=release.cluster.name,
        slot=release.slot,
        at="2026-11-25T02:00:00+00:00",
        revision="main",
        commit=release.commit,
        manifest_digest="sha256:" + "d" * 64,
        weights_bytes=269_000_000,
        spec=release.model,
        image_digest=DIGEST,
        template_hash=template,
        startup_seconds=release.startup_seconds,
        seconds_to_ready=12.0,
        node="n",
        gpus=[],
        smoke="passed",
        benchmark={"verdict": "pass"},
        thresholds=manifests.Thresholds(8, 1, 0.9, 60.0),
        trigger="proven",
        strategy="blue_green",
        simulated=["gpu"],
    )


def test_drift_names_field_and_manager(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    with playing(node, release, comes_up):
        result = rollout.roll_out(client, release)
        traffic.apply_service(client, release.model, release.cluster, "blue")
        was = record(release, result.template_hash)
        assert rollout.drift(client, release.cluster, was) == []
        resources = {"resources": {"requests": {"cpu": "3"}}}
        pods = {"template": {"spec": {"containers": [{"name": "engine", **resources}]}}}
        edit: Obj = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": release.name, "namespace": client.namespace},
            "spec": pods,
        }
        client.apply(edit, force=True, manager="someone")
        found = rollout.drift(client, release.cluster, was)
    assert any("cpu" in line and "someone" in line for line in found)
    assert any("those promoted were" in line for line in found)


def test_a_record_that_this_cluster_would_not_take_any_more(
    client: Client, node: SimulatedNode, release: Release
) -> None:
    with playing(node, release, comes_up):
        result = rollout.roll_out(client, release)
        traffic.apply_service(client, release.model, release.cluster, "blue")
    was = record(release, result.template_hash)
    renamed = was.model_copy(
        update={"spec": release.model.model_copy(update={"node_pool": "renamed"})}
    )
    [found] = rollout.drift(client, release.cluster, renamed)
    assert "could not be promoted again" in found
    assert "the model wants node_pool renamed" in found
    bad = release.model.resources.model_copy(update={"cpu": "-1"})
    unfit = was.model_copy(update={"spec": release.model.model_copy(update={"resources": bad})})
    [found] = rollout.drift(client, release.cluster, unfit)
    assert f"Deployment {release.name} could not be applied" in found


# Fence


@pytest.fixture
def candidate(client: Client, node: SimulatedNode, release: Release) -> Iterator[rollout.Rollout]:
    with playing(node, release, comes_up):
        yield rollout.roll_out(client, release)


def test_gates_are_for_one_promotion_and_its_pods(
    client: Client, release: Release, candidate: rollout.Rollout
) -> None:
    model = release.model
    with pytest.raises(fence.FenceError, match="has not passed gate smoke"):
        fence.require(client, model, "run-1", ["weights", "smoke"])
    fence.pass_gate(client, release, "smoke", "2 of 2", template_hash=candidate.template_hash)
    fence.require(client, model, "run-1", ["weights", "smoke"])
    passed = json.loads(slots.annotations(client.get("Deployment", release.name))[GATE + "smoke"])
    assert (passed["template"], passed["summary"]) == (candidate.template_hash, "2 of 2")
    with pytest.raises(fence.FenceError, match=r"no candidate .* Start the whole job `promote`"):
        fence.require(client, model, "run-2", ["smoke"])
    client.patch("Deployment", release.name, {"metadata": {"annotations": {PROMOTION: "run-2"}}})
    with pytest.raises(fence.FenceError, match="in promotion run-1, not in run-2"):
        fence.require(client, model, "run-2", ["smoke"])


def test_a_changed_template_has_passed_nothing(
    client: Client, release: Release, candidate: rollout.Rollout
) -> None:
    change = {"spec": {"template": {"metadata": {"annotations": {"changed": "yes"}}}}}
    client.patch("Deployment", release.name, change, manager="kubectl-edit")
    deadline = time.monotonic() + 10
    while True:
        with pytest.raises(fence.FenceError) as error:
            fence.require(client, release.model, "run-1", ["weights"])
        if "someone changed it" in str(error.value) or time.monotonic() > deadline:
            break
    assert "someone changed it" in str(error.value)
    with pytest.raises(fence.FenceError, match="someone changed it"):
        fence.pass_gate(client, release, "smoke", "", template_hash=candidate.template_hash)


def test_an_unreadable_pass_is_none(
    client: Client, release: Release, candidate: rollout.Rollout
) -> None:
    for text in ("not JSON", "[]", json.dumps({"promotion": "run-1"})):
        note = {"metadata": {"annotations": {GATE + "smoke": text}}}
        client.patch("Deployment", release.name, note)
        with pytest.raises(fence.FenceError, match="unreadable"):
            fence.require(client, release.model, "run-1", ["smoke"])


# Records


@pytest.mark.parametrize("text", ["not JSON", "{}", '{"format": 7}'])
def test_a_record_that_cannot_be_read(client: Client, release: Release, text: str) -> None:
    records.write(client, record(release, "t1"))
    client.patch("ConfigMap", records.name(release.model), {"data": {"current": text}})
    with pytest.raises(KubernetesError, match="key current"):
        records.read(client, release.model)
