"""GPUs: what the nodes have to give, and what nvidia-smi says inside a Pod."""

import csv
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

from catalog import ClusterSpec, ModelSpec
from k8s import keda, slots, traffic
from k8s.client import Client, Obj
from k8s.errors import KubernetesError
from k8s.manifests import Slot
from k8s.manifests.engine import GPU_FIELDS

Strategy: TypeAlias = Literal["blue_green", "recreate"]


class NoGpus(KubernetesError):
    """The cluster can't give the GPUs that a promotion needs; the message counts them."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it. Memory in MiB; None where the driver doesn't say."""

    index: int
    product: str
    uuid: str
    memory_total_mib: int | None
    memory_used_mib: int | None
    driver: str


@dataclass(frozen=True)
class NodeGpus:
    """GPUs of one node: real ones (a time-sliced GPU counts once), and those not asked for."""

    node: str
    total: int
    free: int
    shared: bool


@dataclass(frozen=True)
class GpuBudget:
    """GPUs of the model's node pool.

    `pending`: asked for by Pods that wait for a node. `new_nodes`: how many nodes of `per_node`
    GPUs the pool may still add.
    """

    resource: str
    pool: str
    nodes: tuple[NodeGpus, ...]
    pending: int
    new_nodes: int
    per_node: int

    @property
    def total(self) -> int:
        """GPUs on the nodes that are there."""
        return sum(node.total for node in self.nodes)

    @property
    def free(self) -> int:
        """GPUs there that no Pod has, or whose Pod is ending."""
        return sum(node.free for node in self.nodes)

    @property
    def growable(self) -> int:
        """GPUs on nodes that the pool may still add."""
        return self.new_nodes * self.per_node

    @property
    def shared(self) -> bool:
        """Some of them are shared by time-slicing or MPS: a benchmark on one is less certain."""
        return any(node.shared for node in self.nodes)

    def replicas(self, gpus: int) -> int:
        """How many Pods of `gpus` GPUs find a node, now or when the pool has grown."""
        here = sum(node.free // gpus for node in self.nodes)
        later = self.new_nodes * (self.per_node // gpus)
        return max(0, here + later - -(-self.pending // gpus))

    def describe(self) -> str:
        """One sentence with the counts."""
        text = f"{self.free} of {self.total} {self.resource} free in node pool {self.pool}"
        if self.growable:
            text += f", {self.growable} more on nodes that it may add"
        if self.pending:
            text += f", {self.pending} asked for by Pods that wait for a node"
        return text + (" (shared GPUs, each counted once)" if self.shared else "")


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """The answer to the query for GPU_FIELDS in CSV.

    Raises ValueError with the line that can't be read.
    """
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row or row[0] == "index":
            continue
        if len(row) != len(GPU_FIELDS) or not row[0].strip().isdigit():
            raise ValueError(f"nvidia-smi printed no list of GPUs, but: {', '.join(row)}")
        index, product, uuid, total, used, driver = (cell.strip() for cell in row)
        gpus.append(Gpu(int(index), product, uuid, _mib(total), _mib(used), driver))
    return gpus


def _mib(cell: str) -> int | None:
    """`81559 MiB`; some GPUs (GB10) have no memory of their own and print [N/A]."""
    match = re.fullmatch(r"(\d+)( MiB)?", cell)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Plan:
    """How a candidate comes up beside, or instead of, what is live.

    `live`: the slot that users reach, None for none. `serving`: its ready replicas; with strategy
    "recreate" they are the outage, and with 0 of them there is none.
    """

    strategy: Strategy
    live: Slot | None
    serving: int
    budget: GpuBudget


def plan(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Plan:
    """Count the GPUs and choose the strategy, as the cluster is now. Raises NoGpus."""
    live = traffic.live_slot(client, model)
    serving, making_room = 0, False
    pods: list[Obj] = []
    if live is not None:
        deployment = slots.deployment_of(client, model, live) or {"spec": {}}
        pods = slots.pods(client, model, live)
        serving = traffic.ready_replicas(client, model, live)
        # One that never gets ready has its GPUs all the same, and is the one to be replaced.
        making_room = bool(pods or deployment["spec"].get("replicas"))
    nodes, all_pods = _look(client, cluster, model)
    budget = _budget(cluster, model, nodes, all_pods)
    room = None
    if making_room:
        theirs = {pod["metadata"]["uid"] for pod in pods}
        room = _budget(cluster, model, nodes, all_pods, without=theirs)
    return Plan(choose_strategy(model, budget, serving, room=room), live, serving, budget)


def replicas_at_switch(client: Client, cluster: ClusterSpec, model: ModelSpec, slot: Slot) -> int:
    """Replicas that the candidate in `slot` gets before it takes over: as many as serve now, as
    far as GPUs are free beside them. KEDA adds the rest when the old slot has given its GPUs back.
    """
    wanted = keda.candidate_min_replicas(client, model, cluster)
    has = len(slots.pods(client, model, slot))
    fits = has + free_gpus(client, cluster, model).replicas(model.gpus.count)
    return max(1, min(wanted, fits))


def free_gpus(client: Client, cluster: ClusterSpec, model: ModelSpec) -> GpuBudget:
    """Count the GPUs of the model's node pool. Raises NoGpus when it has none at all."""
    return _budget(cluster, model, *_look(client, cluster, model))


def _look(client: Client, cluster: ClusterSpec, model: ModelSpec) -> tuple[list[Obj], list[Obj]]:
    """The nodes of the model's pool, and all Pods."""
    labels = cluster.pool(model).labels
    nodes = [
        node
        for node in client.list("Node", labels=labels or None)
        if labels or model.gpus.resource in _allocatable(node)
    ]
    return nodes, client.list("Pod", namespace="*")


def _budget(
    cluster: ClusterSpec,
    model: ModelSpec,
    nodes: list[Obj],
    pods: list[Obj],
    *,
    without: Collection[str] = (),
) -> GpuBudget:
    """The budget, as if the Pods with the uids `without` were gone."""
    pool = cluster.pool(model)
    resource = model.gpus.resource
    asked: Counter[str] = Counter()
    pending = 0
    for pod in pods:
        gpus = _asked(pod, resource)
        if not gpus or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            continue
        # A Pod on its way out frees its GPU within its grace period: the rollout waits for it.
        if "deletionTimestamp" in pod["metadata"] or pod["metadata"]["uid"] in without:
            continue
        if on := pod["spec"].get("nodeName"):
            asked[on] += gpus
        elif any(_selects(pod, node) for node in nodes):
            pending += gpus
    budget = GpuBudget(
        resource=resource,
        pool=pool.name,
        nodes=tuple(_count(node, resource, asked[node["metadata"]["name"]]) for node in nodes),
        pending=pending,
        # Without labels nobody can tell whether a node is of this pool, so it can't grow.
        new_nodes=max(0, pool.max_nodes - len(nodes)) if pool.labels else 0,
        per_node=pool.gpus,
    )
    if not budget.total and not budget.growable:
        raise NoGpus(_none_at_all(cluster, model, nodes))
    return budget


def _allocatable(node: Obj) -> dict[str, str]:
    return dict(node.get("status", {}).get("allocatable") or {})


def _asked(pod: Obj, resource: str) -> int:
    """Init containers run one after the other, before the others: the larger need counts."""

    def of(containers: list[Obj]) -> list[int]:
        return [int(c.get("resources", {}).get("limits", {}).get(resource, 0)) for c in containers]

    spec = pod["spec"]
    return max(sum(of(spec["containers"])), *of(spec.get("initContainers", [])), 0)


def _selects(pod: Obj, node: Obj) -> bool:
    labels = node["metadata"].get("labels", {})
    wanted = pod["spec"].get("nodeSelector") or {}
    return all(labels.get(key) == value for key, value in wanted.items())


def _count(node: Obj, resource: str, asked: int) -> NodeGpus:
    labels = node["metadata"].get("labels", {})
    total = int(_allocatable(node).get(resource, 0))
    slices = int(labels.get("nvidia.com/gpu.replicas", 1))
    sharing = labels.get("nvidia.com/gpu.sharing-strategy", "none")
    shared = sharing != "none" or labels.get("nvidia.com/gpu.product", "").endswith("-SHARED")
    if shared:
        # Four slices of one GPU are one GPU; which slices lie on which GPU nobody says.
        total //= max(1, slices)
    ready = any(
        c["type"] == "Ready" and c["status"] == "True"
        for c in node.get("status", {}).get("conditions", [])
    )
    usable = ready and not node["spec"].get("unschedulable")
    return NodeGpus(node["metadata"]["name"], total, max(0, total - asked) if usable else 0, shared)


def _none_at_all(cluster: ClusterSpec, model: ModelSpec, nodes: list[Obj]) -> str:
    pool = cluster.pool(model)
    offered = sorted({r for n in nodes for r in _allocatable(n) if r.startswith("nvidia.com/")})
    where = f"with the labels {dict(pool.labels)}" if pool.labels else "of the cluster"
    text = f"no node {where} offers {model.gpus.resource} for node pool {pool.name}"
    if offered:
        return (
            f"{text}; they offer {', '.join(offered)}. Set gpus.resource in "
            f"catalog/models/{model.name}.yaml, or change the device plugin's sharing"
        )
    return (
        f"{text}. Look at `kubectl describe nodes`: is the device plugin running, and are the "
        f"labels in catalog/clusters/{cluster.name}.yaml right?"
    )


def choose_strategy(
    model: ModelSpec, budget: GpuBudget, serving: int, *, room: GpuBudget | None = None
) -> Strategy:
    """How the candidate comes up. `serving`: ready replicas of the live slot, 0 for none. `room`:
    the budget if the live slot's Pods were gone; None if there is nothing that could make room.

    One spare replica's GPUs are enough beside a live slot: fewer replicas for a moment (see
    replicas_at_switch) are better than an outage. Making room wants GPUs for as many replicas as
    are serving, for nothing else serves then. Raises NoGpus where neither is possible.
    """
    gpus, wanted = model.gpus.count, model.rollout.strategy
    need = max(model.scaling.min_replicas, serving)
    asks = f"{model.name} needs {need} × {gpus} {budget.resource} for its candidate"
    enough = need if room is None else 1
    if budget.replicas(gpus) >= enough and (wanted != "recreate" or room is None):
        return "blue_green"
    if room is None:
        raise NoGpus(f"{asks}, but {budget.describe()}. Free some, or let the pool grow")
    if wanted == "blue_green":
        raise NoGpus(
            f"{asks} beside the live one, but {budget.describe()}. Free some, let the pool grow, "
            f"or set rollout.strategy: auto in catalog/models/{model.name}.yaml (with an outage)"
        )
    if room.replicas(gpus) >= need:
        return "recreate"
    if room.pending:
        raise NoGpus(
            f"{asks}, and the live one can't make room: {budget.describe()}, and they would take "
            "what it frees. Wait for them, or remove them"
        )
    raise NoGpus(
        f"{asks}, but {budget.describe()}, and without the live one it would be {room.free}, of "
        f"which {room.replicas(gpus)} × {gpus} can be had. The live one is left as it is. Free "
        "some, let the pool grow, or correct gpus.count or scaling.min_replicas in "
        f"catalog/models/{model.name}.yaml"
    )
