"""The record of what is live, and of what was live before it: a ConfigMap a model."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from catalog import ModelSpec
from k8s.client import Client


class PromotionRecord(BaseModel):
    """Everything that a live model came from. The previous one is what a rollback restores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    promotion: str
    cluster: str
    slot: str
    at: str  # UTC, ISO 8601
    revision: str
    commit: str
    manifest_digest: str
    weights_bytes: int
    spec: ModelSpec  # as the catalog had it
    image_digest: str  # as the Pod ran it
    template_hash: str
    startup_seconds: int  # the budget
    seconds_to_ready: float  # the cold start as measured
    node: str
    gpus: list[dict[str, Any]]  # k8s.gpus.Gpu
    smoke: str  # one line
    benchmark: dict[str, Any]  # verdict, reason, capacity, in flight, SLO numbers
    thresholds: dict[str, Any]  # k8s.manifests.Thresholds
    trigger: str  # one line
    strategy: str
    simulated: list[str]
    versions: dict[str, str] = {}


def read(client: Client, model: ModelSpec) -> tuple[PromotionRecord | None, PromotionRecord | None]:
    """(current, previous). Raises KubernetesError for a record of another format."""
    raise NotImplementedError


def write(client: Client, record: PromotionRecord) -> None:
    """Make `record` the current one; the current one becomes the previous."""
    raise NotImplementedError
