"""The fence: a stage runs only if each gate before it passed for just this promotion and Pods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from catalog import ModelSpec
from k8s.client import Client
from k8s.errors import KubernetesError
from k8s.manifests import Release, Slot

GATES = ("weights", "smoke", "benchmark", "trigger")


class FenceError(KubernetesError):
    """A gate has not been passed; the message says which, and what to start."""


@dataclass(frozen=True)
class GatePass:
    """A recorded pass: for which promotion and Pods, when (UTC, ISO 8601), and its number."""

    promotion: str
    template: str
    at: str
    summary: str


@dataclass(frozen=True)
class Candidate:
    """A candidate with its passed gates."""

    slot: Slot
    commit: str
    template_hash: str
    gates: Mapping[str, GatePass]


def pass_gate(
    client: Client, release: Release, gate: str, summary: str, *, template_hash: str
) -> None:
    """Record on the slot's Deployment that the gate was passed. Raises FenceError if the
    Deployment is no longer this promotion's, or its Pods are others.
    """
    raise NotImplementedError


def require(client: Client, model: ModelSpec, promotion: str, gates: Sequence[str]) -> Candidate:
    """The candidate of this promotion, if it has passed `gates`. Raises FenceError."""
    raise NotImplementedError
