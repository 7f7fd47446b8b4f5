"""Which slot users reach, and moving them to the other one."""

from collections.abc import Callable
from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s.client import Client
from k8s.manifests import Slot

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Drain:
    """The end of an old slot. `running_at_end`: requests still running at the deadline."""

    slot: Slot
    seconds: float
    running_at_end: float


def live_slot(client: Client, model: ModelSpec) -> Slot | None:
    """The slot that the Service selects, or None."""
    raise NotImplementedError


def idle_slot(client: Client, model: ModelSpec) -> Slot:
    """The slot for the next candidate."""
    raise NotImplementedError


def ready_replicas(client: Client, model: ModelSpec, slot: Slot) -> int:
    """Ready replicas of the slot's Deployment; 0 if there is none."""
    raise NotImplementedError


def switch(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    *,
    progress: Progress = lambda _: None,
) -> None:
    """Move users to `slot`; returns when the Service's endpoints are its ready Pods only."""
    raise NotImplementedError


def drain(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    *,
    progress: Progress = lambda _: None,
) -> Drain:
    """Let the requests of the old slot end, then scale it to 0. Refuses the live slot."""
    raise NotImplementedError
