"""The fence: a stage runs only if each gate before it passed for just this promotion and Pods.

Neither "materialize downstream" alone nor a re-execution that leaves out a failed check gets
through: the passes are on the slot's Deployment in the cluster, not in Dagster.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from catalog import ModelSpec
from k8s import slots
from k8s.client import Client, Obj
from k8s.errors import KubernetesError
from k8s.manifests import Release, Slot, slot_name
from k8s.manifests.release import GATE, PROMOTION, RECORD, SLOTS

GATES = ("weights", "smoke", "benchmark", "trigger")
MANAGER = "vllm-promotion-gates"  # not the rollout's: an apply must not take the passes away


class FenceError(KubernetesError):
    """A gate has not been passed; the message says which, and what to start."""


@dataclass(frozen=True)
class GatePass:
    """A recorded pass: for which promotion and Pods, when (UTC, ISO 8601), and its number."""

    promotion: str
    template: str
    at: str
    summary: str


def pass_gate(
    client: Client, release: Release, gate: str, summary: str, *, template_hash: str
) -> None:
    """Record on the slot's Deployment that the gate was passed. Raises FenceError if the
    Deployment is no longer this promotion's, or its Pods are others.
    """
    if gate not in GATES:
        raise ValueError(f"no gate {gate!r}; there are {GATES}")
    deployment, now = _settled(client, release.model, release.slot)
    _check_promotion(deployment, release.model, release.promotion)
    if now != template_hash:
        raise FenceError(
            f"gate {gate} was passed by the Pods {template_hash} of Deployment {release.name}, but "
            f"its template is now {now}: someone changed it. {_restart(release.model)}"
        )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    passed = GatePass(release.promotion, template_hash, at, summary)
    note = {GATE + gate: json.dumps(asdict(passed), ensure_ascii=False)}
    client.patch("Deployment", release.name, {"metadata": {"annotations": note}}, manager=MANAGER)


def clear(client: Client, release: Release, deployment: Obj) -> None:
    """Forget all passes of the slot, and the digest of its record: a new candidate comes."""
    old = [key for key in slots.annotations(deployment) if key.startswith(GATE) or key == RECORD]
    if old:
        patch = {"metadata": {"annotations": dict.fromkeys(old)}}
        client.patch("Deployment", release.name, patch, manager=MANAGER)


def require(client: Client, model: ModelSpec, promotion: str, gates: Sequence[str]) -> None:
    """Raises FenceError unless the candidate of this promotion has passed all `gates`."""
    for slot in SLOTS:
        deployment = slots.deployment_of(client, model, slot)
        if deployment and slots.annotations(deployment).get(PROMOTION) == promotion:
            break
    else:
        raise FenceError(
            f"promotion {promotion} has no candidate of {model.name} in namespace "
            f"{client.namespace}. {_restart(model)}"
        )
    deployment, template = _settled(client, model, slot)
    for gate in gates:
        _check_pass(deployment, model, promotion, template, gate)


def _settled(client: Client, model: ModelSpec, slot: Slot) -> tuple[Obj, str]:
    found = slots.settled(client, model, slot)
    if found is None:
        raise FenceError(
            f"Deployment {slot_name(model, slot)} is gone, or its controller doesn't look at it. "
            f"{_restart(model)}"
        )
    return found


def _check_pass(
    deployment: Obj, model: ModelSpec, promotion: str, template: str, gate: str
) -> None:
    where = f"Deployment {deployment['metadata']['name']}"
    text = slots.annotations(deployment).get(GATE + gate)
    if text is None:
        raise FenceError(f"{where} has not passed gate {gate}. {_restart(model)}")
    try:
        passed = GatePass(**json.loads(text))
    except (ValueError, TypeError):
        raise FenceError(
            f"{where}: annotation {GATE}{gate} is unreadable. {_restart(model)}"
        ) from None
    if passed.promotion != promotion:
        raise FenceError(
            f"{where} passed gate {gate} in promotion {passed.promotion}, not in {promotion}. "
            f"{_restart(model)}"
        )
    if passed.template != template:
        raise FenceError(
            f"{where} passed gate {gate} with the Pods {passed.template}, but its template is now "
            f"{template}: someone changed it. {_restart(model)}"
        )


def _check_promotion(deployment: Obj, model: ModelSpec, promotion: str) -> None:
    owner = slots.annotations(deployment).get(PROMOTION)
    if owner != promotion:
        raise FenceError(
            f"Deployment {deployment['metadata']['name']} belongs to promotion {owner}, not to "
            f"{promotion}. {_restart(model)}"
        )


def _restart(model: ModelSpec) -> str:
    return f"Start the whole job `promote` for {model.name}"
