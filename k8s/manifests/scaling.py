"""The ScaledObject: what KEDA scales a slot by."""

from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.release import Obj, Release


@dataclass(frozen=True)
class Thresholds:
    """Per replica. `in_flight`: running + waiting requests; `waiting`: waiting ones alone.

    `headroom` (h, 0.3 to 0.95) and `lead_seconds` say how they came about, see keda.thresholds.
    """

    in_flight: int
    waiting: int
    headroom: float
    lead_seconds: float


def max_replicas(model: ModelSpec, cluster: ClusterSpec) -> int:
    """The catalog's max_replicas, capped by the GPUs that the node pool can ever give."""
    raise NotImplementedError


def scaled_object(release: Release, thresholds: Thresholds, min_replicas: int) -> Obj:
    """The ScaledObject of the slot."""
    raise NotImplementedError
