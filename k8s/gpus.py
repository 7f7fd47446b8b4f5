"""GPUs: what the nodes have to give, and what nvidia-smi says inside a Pod."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from catalog import ClusterSpec, ModelSpec
from k8s.client import Client
from k8s.errors import KubernetesError

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
    """GPUs of the model's node pool. `growable`: on nodes that the pool may still add."""

    resource: str
    pool: str
    total: int
    free: int
    growable: int
    pending: int
    shared: bool
    nodes: tuple[NodeGpus, ...]

    def replicas(self, gpus: int) -> int:
        """How many Pods of `gpus` GPUs find a node, now or when the pool has grown."""
        raise NotImplementedError

    def describe(self) -> str:
        """One sentence with the counts."""
        raise NotImplementedError


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """The answer to --query-gpu=index,name,uuid,memory.total,memory.used,driver_version in CSV.

    Raises ValueError with the line that can't be read.
    """
    raise NotImplementedError


def free_gpus(client: Client, cluster: ClusterSpec, model: ModelSpec) -> GpuBudget:
    """Count the GPUs of the model's node pool. Raises NoGpus when it has none at all."""
    raise NotImplementedError


def choose_strategy(model: ModelSpec, budget: GpuBudget, live_replicas: int) -> Strategy:
    """How the candidate comes up. `live_replicas`: ready ones of the live slot, 0 for none.

    Raises NoGpus where neither strategy is possible.
    """
    raise NotImplementedError
