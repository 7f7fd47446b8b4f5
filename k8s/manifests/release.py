"""What is rolled out, and the names and labels that its objects carry in the cluster."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from catalog import ClusterSpec, ModelSpec

Obj: TypeAlias = dict[str, Any]
Slot: TypeAlias = Literal["blue", "green"]
SLOTS: tuple[Slot, Slot] = ("blue", "green")

DOMAIN = "vllm-promotion.io"
MODEL = f"{DOMAIN}/model"
SLOT = f"{DOMAIN}/slot"
PROMOTION = f"{DOMAIN}/promotion"
COMMIT = f"{DOMAIN}/commit"
WEIGHTS = f"{DOMAIN}/weights"  # on a download Job: the weights_key of what it publishes
GATE = f"{DOMAIN}/gate."  # annotation prefix: gate.<name>
RECORD = f"{DOMAIN}/record"  # on a slot that is or was live: sha256:<digest> of its record
SETTLED = f"{DOMAIN}/settled"  # on a Service: when late moves of it were last refused, ns
STANDING_ASIDE = f"{DOMAIN}/standing-aside"  # on a live slot that made room (strategy recreate)
CLIENT_NAMESPACE = f"{DOMAIN}/client"  # label of a namespace whose Pods may call the engines

ENGINE = "engine"  # the container of the engine, and the component label of its Pods
GPU_CHECK = "gpu-check"  # the init container that asks nvidia-smi
PORT = 8000
MODELS = "/models"

PIPELINE_ACCOUNT = "vllm-promotion"
ENGINE_ACCOUNT = "vllm-engine"
JOBS_ACCOUNT = "vllm-promotion-jobs"
UNKNOWN_COMMIT = "0" * 40
# Every image here must run as this user; nothing needs to be written but the volumes below.
UID = 1000


@dataclass(frozen=True)
class ServedAdapter:
    """A LoRA adapter of the model at a commit, published on the volume. `rank`: of its matrices."""

    name: str
    repo: str
    revision: str
    commit: str
    rank: int
    bytes: int
    manifest_digest: str

    @property
    def path(self) -> str:
        """Where the engine finds it."""
        return weights_path(self.repo, self.commit)


@dataclass(frozen=True)
class Release:
    """A commit of a model in a slot of a cluster, and of each of its adapters.

    `startup_seconds`: how long the engine may take from its start until /health answers.
    `promotion`: the id of the promotion (the Dagster run's id).
    """

    model: ModelSpec
    cluster: ClusterSpec
    commit: str
    slot: Slot
    promotion: str
    startup_seconds: int
    adapters: tuple[ServedAdapter, ...] = ()

    def __post_init__(self) -> None:
        given, wanted = ([a.name for a in of] for of in (self.adapters, self.model.adapters))
        if given != wanted:
            raise ValueError(f"adapters {given} for {self.model.name}, which has {wanted}")

    @property
    def name(self) -> str:
        """Of the Deployment, its ScaledObject and its PodDisruptionBudget."""
        return slot_name(self.model, self.slot)

    @property
    def weights_path(self) -> str:
        """Where the engine finds the published weights."""
        return weights_path(self.model.repo, self.commit)

    @property
    def image(self) -> str:
        """The engine's image: the model's, unless the cluster replaces it."""
        return self.cluster.images.engine or self.model.image


def weights_path(repo: str, commit: str) -> str:
    """Where a commit is published."""
    return f"{MODELS}/{repo}/{commit}"


def unresolved(model: ModelSpec) -> tuple[ServedAdapter, ...]:
    """The model's adapters before anybody has asked the Hub: for dry runs and for looking."""
    return tuple(
        ServedAdapter(a.name, a.repo, a.revision, UNKNOWN_COMMIT, 8, 0, "") for a in model.adapters
    )


def slot_name(model: ModelSpec, slot: Slot) -> str:
    """The Deployment of a slot."""
    return f"{model.object_name}-{slot}"


def other_slot(slot: Slot) -> Slot:
    """green for blue, blue for green."""
    return "green" if slot == "blue" else "blue"


def labels(component: str, model: ModelSpec | None = None, **more: str) -> dict[str, str]:
    """The labels that every object has."""
    out = {
        "app.kubernetes.io/name": "vllm-promotion",
        "app.kubernetes.io/managed-by": "vllm-promotion-pipeline",
        "app.kubernetes.io/component": component,
    }
    if model is not None:
        out[MODEL] = model.name
    return out | more


def engine_selector(model: ModelSpec, slot: Slot) -> dict[str, str]:
    """The labels that tell a slot's Pods from all others."""
    return {"app.kubernetes.io/component": ENGINE, MODEL: model.name, SLOT: slot}


def weights_key(repo: str, commit: str) -> str:
    """Names a commit's weights on the volume, whichever models use them: a Lease, a label.

    The commit can be read from it, as k8s/collection.py does.
    """
    return f"weights-{commit}-{content_hash({'repo': repo})}"


def content_hash(obj: Obj) -> str:
    """Ten hex digits of an object's content: equal content gives an equal name."""
    canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]
