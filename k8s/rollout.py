"""Bring a candidate up in the idle slot, or take it away again."""

from collections.abc import Callable
from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s.client import Client
from k8s.gpus import Strategy
from k8s.manifests import Release
from k8s.records import PromotionRecord

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Rollout:
    """A candidate that is ready. `image_digest` is what ran, from the Pod's imageID.

    `seconds_to_ready`: the cold start, from the Pod's creation until it was ready.
    """

    deployment: str
    pod: str
    pod_ip: str
    node: str
    image_digest: str
    template_hash: str
    seconds_to_ready: float


def preflight(client: Client, cluster: ClusterSpec, model: ModelSpec) -> None:
    """Refuse what can't work, before anything is changed: missing platform parts, CRDs, rights,

    a scaler of someone else. Raises KubernetesError with the next step.
    """
    raise NotImplementedError


def reap(
    client: Client,
    cluster: ClusterSpec,
    model: ModelSpec,
    promotion: str,
    *,
    progress: Progress = lambda _: None,
) -> list[str]:
    """Put right what killed promotions left. Call with the model's Lease held, before counting
    GPUs. Returns what was done.
    """
    raise NotImplementedError


def roll_out(
    client: Client,
    release: Release,
    *,
    strategy: Strategy = "blue_green",
    progress: Progress = lambda _: None,
) -> Rollout:
    """Apply the slot's objects and wait until the candidate is ready and stays so.

    strategy "recreate": the live slot makes room first; abandon() brings it back.
    Raises Conflict or Invalid before anything changed; ConditionFailed as soon as it can't come
    up any more; WaitTimeout.
    """
    raise NotImplementedError


def abandon(
    client: Client,
    cluster: ClusterSpec,
    model: ModelSpec,
    promotion: str,
    *,
    progress: Progress = lambda _: None,
) -> list[str]:
    """Take away what `promotion` brought up, unless it is live; bring a live slot back that made
    room. Idempotent; does as much as it can, and raises at the end what failed.
    """
    raise NotImplementedError


def drift(client: Client, record: PromotionRecord) -> list[str]:
    """What someone changed on the live slot since `record`: one sentence each."""
    raise NotImplementedError
