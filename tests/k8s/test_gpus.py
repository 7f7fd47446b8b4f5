"""Counting GPUs, on nodes and Pods of a real API server, and reading nvidia-smi."""

import time
from typing import Any

import pytest

from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog
from k8s import manifests, traffic
from k8s.client import Client
from k8s.gpus import (
    Gpu,
    GpuBudget,
    NodeGpus,
    NoGpus,
    choose_strategy,
    free_gpus,
    parse_nvidia_smi,
    plan,
)
from k8s.manifests import Release
from k8s.manifests.release import engine_selector
from tests.k8s.simulated_node import SimulatedNode, _call

HEADER = "index, name, uuid, memory.total [MiB], memory.used [MiB], driver_version\n"
MODEL = catalog().model("smollm2-135m")


def test_nvidia_smi() -> None:
    text = HEADER + "0, NVIDIA L4, GPU-1, 23034 MiB, 4 MiB, 580.65.06\n1, B, GPU-2, 1 MiB, 0 MiB, x"
    assert parse_nvidia_smi(text) == [
        Gpu(0, "NVIDIA L4", "GPU-1", 23034, 4, "580.65.06"),
        Gpu(1, "B", "GPU-2", 1, 0, "x"),
    ]


@pytest.mark.parametrize("cell", ["[N/A]", "[Not Supported]", "Not Supported", "[Unknown Error]"])
def test_a_gpu_without_memory_of_its_own(cell: str) -> None:
    [gpu] = parse_nvidia_smi(f"{HEADER}0, NVIDIA GB10, GPU-1, {cell}, {cell}, 580.1\n")
    assert (gpu.memory_total_mib, gpu.memory_used_mib) == (None, None)


@pytest.mark.parametrize(
    "text", ["No devices were found", "NVIDIA-SMI has failed because", HEADER + "0, NVIDIA L4"]
)
def test_nvidia_smi_in_trouble(text: str) -> None:
    with pytest.raises(ValueError, match=r"nvidia-smi printed no list|printed no list"):
        parse_nvidia_smi(text)


def test_nothing_is_no_gpu() -> None:
    assert parse_nvidia_smi("") == []
    assert parse_nvidia_smi(HEADER) == []


# Counting


@pytest.fixture
def label() -> dict[str, str]:
    return {"test.local/pool": "gpus"}


@pytest.fixture
def cluster(client: Client, node: SimulatedNode) -> ClusterSpec:
    """A pool whose only node is the simulated one, and nobody waits for a GPU."""
    # Of other tests too, some of which have a namespace of their own.
    spaces = [Client(client.transport, s["metadata"]["name"]) for s in client.list("Namespace")]
    for space in spaces:
        for deployment in space.list("Deployment"):
            space.scale("Deployment", deployment["metadata"]["name"], 0)
    deadline = time.monotonic() + 30
    while waiting := [name for space in spaces for name in _waiting(space)]:
        assert time.monotonic() < deadline, waiting
        time.sleep(0.1)
    spec = catalog().cluster("lab")
    pool = spec.node_pools[0].model_copy(update={"labels": {"test.local/node": node.name}})
    return spec.model_copy(update={"node_pools": (pool,)})


def _waiting(client: Client) -> list[str]:
    """Deployments that are not at rest yet, and Pods that wait for a node, which are deleted."""
    names = []
    for deployment in client.list("Deployment"):
        meta, status = deployment["metadata"], deployment.get("status", {})
        seen = status.get("observedGeneration") == meta["generation"]
        if not seen or status.get("replicas"):
            names.append(meta["name"])
    for pod in client.list("Pod"):
        if not pod["spec"].get("nodeName"):
            names.append(pod["metadata"]["name"])
            _call(client, "DELETE", names[-1], body={"gracePeriodSeconds": 0})
    return names


def make_node(
    client: Client, node: SimulatedNode, resources: dict[str, str], **labels: str
) -> None:
    marks = {"test.local/node": node.name} | {
        f"nvidia.com/gpu.{key.replace('_', '-')}": value for key, value in labels.items()
    }
    client.patch("Node", node.name, {"metadata": {"labels": marks}})
    status = {"allocatable": resources, "conditions": [{"type": "Ready", "status": "True"}]}
    _call(client, "PATCH", node.name, "status", {"status": status}, kind="nodes")


def make_pod(
    client: Client, name: str, gpus: int, labels: dict[str, str] | None = None, **spec: Any
) -> None:
    """`gpus` for an init container and for a container: that is `gpus` in all."""
    limits = {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    client.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "finalizers": ["test.local/keep"],
                "labels": labels or {},
            },
            "spec": {
                "containers": [{"name": "c", "image": "i", **limits}],
                "initContainers": [{"name": "i", "image": "i", **limits}],
                **spec,
            },
        }
    )


def test_what_is_free(client: Client, node: SimulatedNode, cluster: ClusterSpec, name: str) -> None:
    make_node(client, node, {"nvidia.com/gpu": "8"})
    make_pod(client, f"{name}-1", 2, nodeName=node.name)
    make_pod(client, f"{name}-2", 1, nodeSelector={"test.local/node": node.name})
    make_pod(client, f"{name}-3", 4, nodeSelector={"test.local/node": "elsewhere"})
    try:
        budget = free_gpus(client, cluster, MODEL)
        assert (budget.total, budget.free, budget.pending, budget.growable) == (8, 6, 1, 0)
        assert (budget.replicas(1), budget.replicas(2), budget.replicas(8)) == (5, 2, 0)
        assert "6 of 8 nvidia.com/gpu free in node pool lab" in budget.describe()
        # A Pod that is ending has given its GPUs up.
        client.delete("Pod", f"{name}-1")
        assert free_gpus(client, cluster, MODEL).free == 8
    finally:
        for i in (1, 2, 3):
            client.patch("Pod", f"{name}-{i}", {"metadata": {"finalizers": None}})
            client.delete("Pod", f"{name}-{i}")


def test_a_time_sliced_gpu_is_one(
    client: Client, node: SimulatedNode, cluster: ClusterSpec, name: str
) -> None:
    make_node(
        client,
        node,
        {"nvidia.com/gpu": "4"},
        sharing_strategy="time-slicing",
        replicas="4",
        product="NVIDIA-L4-SHARED",
    )
    assert (b := free_gpus(client, cluster, MODEL)).shared
    assert (b.total, b.free) == (1, 1)
    make_pod(client, name, 1, nodeName=node.name)
    try:
        budget = free_gpus(client, cluster, MODEL)
        assert budget.free == 0
        assert "shared" in budget.describe()
        assert choose_strategy(MODEL, budget, 1, room=b) == "recreate"
    finally:
        client.patch("Pod", name, {"metadata": {"finalizers": None}})
        client.delete("Pod", name)


def test_only_the_shared_resource_is_offered(
    client: Client, node: SimulatedNode, cluster: ClusterSpec
) -> None:
    make_node(client, node, {"nvidia.com/gpu.shared": "4"})
    with pytest.raises(NoGpus, match=r"they offer nvidia.com/gpu.shared. Set gpus.resource"):
        free_gpus(client, cluster, MODEL)


def test_a_cordoned_node_has_nothing_free(
    client: Client, node: SimulatedNode, cluster: ClusterSpec
) -> None:
    make_node(client, node, {"nvidia.com/gpu": "2"})
    client.patch("Node", node.name, {"spec": {"unschedulable": True}})
    assert free_gpus(client, cluster, MODEL).free == 0


def test_a_pool_may_grow(client: Client, node: SimulatedNode, cluster: ClusterSpec) -> None:
    make_node(client, node, {"nvidia.com/gpu": "2"})
    pool = cluster.node_pools[0].model_copy(update={"max_nodes": 3, "gpus": 2})
    budget = free_gpus(client, cluster.model_copy(update={"node_pools": (pool,)}), MODEL)
    assert budget.growable == 4
    assert budget.replicas(2) == 3


# Choosing


def budget(free: int, pending: int = 0) -> GpuBudget:
    nodes = (NodeGpus("n", 2, free, shared=False),)
    return GpuBudget("nvidia.com/gpu", "lab", nodes, pending, 0, 2)


def with_strategy(strategy: str) -> ModelSpec:
    return MODEL.model_copy(
        update={"rollout": MODEL.rollout.model_copy(update={"strategy": strategy})}
    )


@pytest.mark.parametrize(
    ("wanted", "free", "serving", "room", "chosen"),
    [
        ("auto", 1, 1, 2, "blue_green"),
        ("auto", 0, 1, 1, "recreate"),
        ("auto", 1, 2, 3, "blue_green"),  # fewer replicas for a moment, but no outage
        ("auto", 0, 2, 2, "recreate"),
        ("auto", 2, 2, 2, "blue_green"),
        ("auto", 1, 0, None, "blue_green"),
        ("auto", 0, 0, 1, "recreate"),  # live, but it never gets ready
        ("recreate", 1, 1, 2, "recreate"),
        ("recreate", 2, 0, None, "blue_green"),  # nothing has to make room
        ("blue_green", 1, 1, 2, "blue_green"),
    ],
)
def test_strategy(wanted: str, free: int, serving: int, room: int | None, chosen: str) -> None:
    without_live = None if room is None else budget(room)
    model = with_strategy(wanted)
    assert choose_strategy(model, budget(free), serving, room=without_live) == chosen


@pytest.mark.parametrize(
    ("wanted", "free", "pending", "room", "why"),
    [
        ("auto", 0, 0, None, "0 of 2 nvidia.com/gpu free"),
        ("blue_green", 0, 0, 1, "rollout.strategy: auto"),
        ("auto", 1, 1, 1, "they would take what it frees"),
        ("auto", 0, 0, 0, "The live one is left as it is"),
        ("recreate", 0, 0, 0, "The live one is left as it is"),
    ],
)
def test_no_strategy(wanted: str, free: int, pending: int, room: int | None, why: str) -> None:
    without_live = None if room is None else budget(room, pending)
    with pytest.raises(NoGpus, match=why):
        choose_strategy(with_strategy(wanted), budget(free, pending), 1, room=without_live)


# What is live


@pytest.fixture
def live(client: Client, cluster: ClusterSpec, name: str) -> Release:
    """The live slot: a Service that selects it, and a Deployment without Pods."""
    model = MODEL.model_copy(update={"name": name})
    here = cluster.model_copy(update={"namespace": client.namespace})
    release = Release(model, here, "a" * 40, "blue", "run-0", 60)
    deployment = manifests.deployment(release)
    deployment["spec"]["replicas"] = 0
    client.apply(deployment)
    traffic.apply_service(client, model, here, "blue")
    return release


@pytest.mark.parametrize(
    ("wants", "chosen"),
    [(1, "recreate"), (2, None)],  # one GPU is the live one's, the other somebody else's
)
def test_only_what_the_live_pods_have_can_be_freed(
    client: Client, node: SimulatedNode, live: Release, wants: int, chosen: str | None
) -> None:
    make_node(client, node, {"nvidia.com/gpu": "2"})
    model = live.model.model_copy(
        update={"gpus": live.model.gpus.model_copy(update={"count": wants})}
    )
    pool = live.cluster.node_pools[0].model_copy(update={"gpus": 2})
    cluster = live.cluster.model_copy(update={"node_pools": (pool,)})
    pods = [f"{live.name}-pod", f"{live.name}-other"]
    make_pod(client, pods[0], 1, engine_selector(model, "blue"), nodeName=node.name)
    make_pod(client, pods[1], 1, nodeName=node.name)
    try:
        if chosen is None:
            with pytest.raises(NoGpus, match="without the live one it would be 1"):
                plan(client, cluster, model)
        else:
            # It never got ready: still it has the GPU, and is what is to be replaced.
            found = plan(client, cluster, model)
            assert (found.strategy, found.live, found.serving) == (chosen, "blue", 0)
            assert found.budget.free == 0
    finally:
        for pod in pods:
            client.patch("Pod", pod, {"metadata": {"finalizers": None}})
            client.delete("Pod", pod)


def test_a_live_slot_scaled_to_0_makes_no_room(
    client: Client, node: SimulatedNode, live: Release
) -> None:
    make_node(client, node, {"nvidia.com/gpu": "1"})
    make_pod(client, live.name, 1, nodeName=node.name)
    try:
        with pytest.raises(NoGpus, match="Free some, or let the pool grow"):
            plan(client, live.cluster, live.model)
        client.scale("Deployment", live.name, 1)  # it wants a Pod, and would get the next GPU
        # Its controller may have made that Pod already, which then waits for the GPU as well.
        with pytest.raises(NoGpus, match=r"live one is left as it is|live one can't make room"):
            plan(client, live.cluster, live.model)
    finally:
        client.patch("Pod", live.name, {"metadata": {"finalizers": None}})
        client.delete("Pod", live.name)
