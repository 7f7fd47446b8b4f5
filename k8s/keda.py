"""Autoscaling: thresholds from the benchmark, the ScaledObject, and the proof that it works."""

from collections.abc import Callable
from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s.client import Client, Obj
from k8s.errors import KubernetesError
from k8s.manifests import Release, Slot, Thresholds

Progress = Callable[[str], None]


class AutoscalingNotProven(KubernetesError):
    """KEDA would not scale this slot as intended; the message says which link is broken."""


@dataclass(frozen=True)
class TriggerProof:
    """What was seen. `value`: of KEDA's query; `pods_value`: the sum over the Pods' /metrics.

    `age_seconds`: of the newest sample; `replicas`: ready ones then.
    """

    query: str
    value: float
    pods_value: float
    series: int
    age_seconds: float
    hpa: str
    replicas: int


def thresholds(
    l_star: float, lambda_star: float, cold_start_s: float, cluster: ClusterSpec, model: ModelSpec
) -> Thresholds:
    """From capacity (λ* req/s, L* requests in flight) and cold start (s) to thresholds."""
    raise NotImplementedError


def candidate_min_replicas(client: Client, model: ModelSpec, cluster: ClusterSpec) -> int:
    """Replicas that the candidate needs before it takes over the present load."""
    raise NotImplementedError


def apply_scaled_object(
    client: Client, release: Release, thresholds: Thresholds, *, min_replicas: int
) -> Obj:
    """Apply the ScaledObject of the slot."""
    raise NotImplementedError


def prove_trigger(
    client: Client,
    release: Release,
    *,
    deadline_s: float = 120.0,
    progress: Progress = lambda _: None,
) -> TriggerProof:
    """Prove each link from the engine's metric to the HPA. Raises AutoscalingNotProven."""
    raise NotImplementedError


def pause(client: Client, model: ModelSpec, slot: Slot, replicas: int) -> bool:
    """Freeze the slot at `replicas`; False if it has no ScaledObject."""
    raise NotImplementedError


def resume(
    client: Client,
    model: ModelSpec,
    slot: Slot,
    *,
    deadline_s: float = 60.0,
    progress: Progress = lambda _: None,
) -> None:
    """End the pause, and wait until it has ended. Raises AutoscalingNotProven."""
    raise NotImplementedError
