"""The two slots of a model as the cluster has them now."""

import json
import time
from dataclasses import dataclass

from catalog import ModelSpec
from k8s.client import Client
from k8s.manifests.release import STANDING_ASIDE, Obj, Slot, engine_selector, slot_name

REVISION = "deployment.kubernetes.io/revision"
TEMPLATE_HASH = "pod-template-hash"
SETTLE_SECONDS = 20.0


def annotations(obj: Obj) -> dict[str, str]:
    """The annotations of an object, {} for none."""
    return obj["metadata"].get("annotations") or {}


@dataclass(frozen=True)
class StandingAside:
    """The note on a live slot that made room: for which promotion, how many replicas it had, and
    how many of them were ready, so serving.
    """

    promotion: str
    replicas: int
    serving: int


def standing_aside(deployment: Obj | None) -> StandingAside | None:
    """The note on this Deployment, or None. One that can't be read stands for one replica."""
    text = annotations(deployment).get(STANDING_ASIDE) if deployment else None
    if text is None:
        return None
    try:
        note = json.loads(text)
        replicas, serving = int(note["replicas"]), int(note.get("serving", 0))
        return StandingAside(str(note["promotion"]), max(1, replicas), serving)
    except (ValueError, TypeError, KeyError, AttributeError):
        return StandingAside("", 1, 0)


def template_hash(client: Client, model: ModelSpec, slot: Slot, deployment: Obj) -> str | None:
    """The pod-template-hash of the Deployment's present template.

    None while the controller has not yet seen that template.
    """
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return None
    revision = annotations(deployment).get(REVISION)
    for replica_set in client.list("ReplicaSet", labels=engine_selector(model, slot)):
        if revision is not None and annotations(replica_set).get(REVISION) == revision:
            return str(replica_set["metadata"]["labels"][TEMPLATE_HASH])
    return None


def settled(client: Client, model: ModelSpec, slot: Slot) -> tuple[Obj, str] | None:
    """The slot's Deployment and the hash of its template, once the controller has seen it.

    Even a new annotation of a Deployment counts as a change until its controller has looked.
    None if there is no Deployment, or the controller doesn't look for SETTLE_SECONDS.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (deployment := deployment_of(client, model, slot)) is not None:
        if found := template_hash(client, model, slot, deployment):
            return deployment, found
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return None


def pods(
    client: Client, model: ModelSpec, slot: Slot, labels: dict[str, str] | None = None
) -> list[Obj]:
    """The slot's Pods (with these labels) that may serve: neither at their end nor on their way
    out. Newest first.
    """
    found = [
        pod
        for pod in client.list("Pod", labels=engine_selector(model, slot) | (labels or {}))
        if "deletionTimestamp" not in pod["metadata"] and not _has_ended(pod)
    ]
    return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), reverse=True)


def failed_pods(client: Client, model: ModelSpec, slot: Slot) -> list[Obj]:
    """The slot's Pods that were evicted or never admitted. They stay until someone deletes them,
    also when the slot is scaled to 0.
    """
    found = client.list("Pod", labels=engine_selector(model, slot))
    return [pod for pod in found if pod.get("status", {}).get("phase") == "Failed"]


def _has_ended(pod: Obj) -> bool:
    return pod.get("status", {}).get("phase") in ("Failed", "Succeeded")


def condition(obj: Obj, kind: str) -> Obj:
    """The condition of that type, {} if it isn't there."""
    for item in obj.get("status", {}).get("conditions") or []:
        if item["type"] == kind:
            return dict(item)
    return {}


def is_ready(pod: Obj) -> bool:
    """The Pod has its Ready condition."""
    return condition(pod, "Ready").get("status") == "True"


def deployment_of(client: Client, model: ModelSpec, slot: Slot) -> Obj | None:
    """The slot's Deployment, or None."""
    return client.find("Deployment", slot_name(model, slot))
