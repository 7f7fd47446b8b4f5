"""Which slot users reach, and moving them to the other one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from catalog import ClusterSpec, ModelSpec
from k8s import keda, manifests, pod_http, prometheus, slots
from k8s.client import Client, Obj
from k8s.errors import (
    ConditionFailed,
    Conflict,
    HttpStatus,
    LeaseLost,
    PodUnreachable,
    WaitTimeout,
)
from k8s.manifests import Slot
from k8s.manifests.release import PORT, SETTLED, SLOT, SLOTS, STANDING_ASIDE, other_slot, slot_name
from k8s.manifests.scaling import RUNNING, WAITING
from k8s.wait import Progress

ENDPOINTS_SECONDS = 60.0
# Proxies learn of new endpoints a little later, and a client with kept-alive connections is
# silent between two requests: so a slot counts as empty only after this many looks at 0.
QUIET_LOOKS = 5
LOOK_SECONDS = 1.0
SELECT_TRIES = 5


@dataclass(frozen=True)
class Drain:
    """The end of an old slot. `running_at_end`: requests still running at the deadline."""

    slot: Slot
    seconds: float
    running_at_end: float


def live_slot(client: Client, model: ModelSpec) -> Slot | None:
    """The slot that the Service selects, or None."""
    service = client.find("Service", model.object_name)
    selected = ((service or {}).get("spec", {}).get("selector") or {}).get(SLOT)
    return next((slot for slot in SLOTS if slot == selected), None)


def idle_slot(client: Client, model: ModelSpec) -> Slot:
    """The slot for the next candidate."""
    live = live_slot(client, model)
    return other_slot(live) if live else "blue"


def ready_replicas(client: Client, model: ModelSpec, slot: Slot) -> int:
    """Ready replicas of the slot's Deployment; 0 if there is none."""
    deployment = slots.deployment_of(client, model, slot)
    return int((deployment or {}).get("status", {}).get("readyReplicas", 0))


def switch(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    *,
    progress: Progress = lambda _: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Move users to `slot`; returns when the Service's endpoints are its ready Pods only.

    The old slot goes on serving what reaches it: kept-alive connections stay with its Pods until
    drain(). When the endpoints don't come right, users are moved back. `check` is called before
    the move and at each look at the endpoints; when it (or `progress`) raises LeaseLost, the
    model is another run's, and nothing is moved back. Give a client whose writes can't outlive
    the Lease (Client.within). Raises ConditionFailed if the slot has no ready Pod, Conflict if
    someone else owns the Service's selector, WaitTimeout.
    """
    if not ready_replicas(client, model, slot):
        raise ConditionFailed(
            f"Deployment {slot_name(model, slot)} has no ready Pod: users stay where they are"
        )
    before = live_slot(client, model)
    progress(f"Service {model.object_name}: from slot {before} to {slot}")
    _select(client, model, cluster, slot, check)
    try:
        _wait_for_endpoints(client, model, slot, progress, check)
    except LeaseLost:
        raise
    except BaseException:
        if before is not None and before != slot:
            _select(client, model, cluster, before, check)
        raise


def _select(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    check: Callable[[], None],
) -> None:
    """Apply the Service with this slot if it still is as it was seen, so that a write that takes
    longer than its answer is waited for can be refused (settle).
    """
    for tries_left in reversed(range(SELECT_TRIES)):
        service = client.find("Service", model.object_name)
        version = service["metadata"]["resourceVersion"] if service else None
        check()
        try:
            apply_service(client, model, cluster, slot, version=version)
            return
        except Conflict as error:
            if error.fields or not tries_left:
                raise


def settle(client: Client, model: ModelSpec) -> None:
    """From now on a move whose answer never came, and that is still on its way, is refused: it
    wants the Service as it was. Call before asking which slot is live, to end the other one.
    """
    if client.find("Service", model.object_name) is not None:
        now = {"metadata": {"annotations": {SETTLED: str(time.time_ns())}}}
        client.patch("Service", model.object_name, now)


def apply_service(
    client: Client,
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    *,
    dry_run: bool = False,
    version: str | None = None,
) -> None:
    """Apply the Service with this slot; if there is a `version`, only to the one that has it.

    Raises Conflict if its selector is someone else's.
    """
    service = manifests.service(model, cluster, slot)
    if version is not None:
        service["metadata"]["resourceVersion"] = version
    try:
        client.apply(service, dry_run=dry_run)
    except Conflict as error:
        if version is not None and not error.fields:
            raise
        live = live_slot(client, model)
        # Nobody knows whom a Service without a slot leads to: taking it over would cut them off.
        hand_over = (
            f", or hand it over as it is: {service_command(model, cluster.name, live, force=True)}"
            if live
            else ", or rename the model"
        )
        raise Conflict(
            f"Service {model.object_name} is managed by someone else ({error}). Rename or delete "
            f"that Service{hand_over}",
            fields=error.fields,
        ) from None


def service_command(model: ModelSpec, cluster: str, slot: Slot, *, force: bool = False) -> str:
    """What a person types to get the Service of the slot, and nothing else."""
    return (
        f"python -m k8s render {model.name} --cluster {cluster} --slot {slot} --kind Service | "
        f"kubectl apply --server-side {'--force-conflicts ' if force else ''}"
        "--field-manager=vllm-promotion -f -"
    )


def _wait_for_endpoints(
    client: Client, model: ModelSpec, slot: Slot, progress: Progress, check: Callable[[], None]
) -> None:
    deadline = time.monotonic() + ENDPOINTS_SECONDS
    state = ""
    while time.monotonic() < deadline:
        check()
        ready = _ready_endpoints(client, model)
        ours = {p["metadata"]["name"] for p in slots.pods(client, model, slot)}
        if ready and ready <= ours:
            progress(f"Service {model.object_name}: endpoints are {', '.join(sorted(ready))}")
            return
        state = f"ready endpoints are {sorted(ready)}, Pods of slot {slot} are {sorted(ours)}"
        time.sleep(0.5)
    raise WaitTimeout(
        f"EndpointSlices of Service {model.object_name} don't show the Pods of slot {slot} after "
        f"{ENDPOINTS_SECONDS:.0f} s: {state}. Is the controller manager running?",
        last_state=state,
    )


def _ready_endpoints(client: Client, model: ModelSpec) -> set[str]:
    service = {"kubernetes.io/service-name": model.object_name}
    return {
        str(endpoint.get("targetRef", {}).get("name"))
        for endpoints in client.list("EndpointSlice", labels=service)
        for endpoint in endpoints.get("endpoints") or []
        if endpoint.get("conditions", {}).get("ready")
    }


def drain(
    client: Client,
    model: ModelSpec,
    slot: Slot,
    *,
    progress: Progress = lambda _: None,
    check: Callable[[], None] = lambda: None,
) -> Drain:
    """Let the requests of the old slot end, then scale it to 0 and keep it for a rollback.

    Ends when its Pods have had no request for some seconds, or after rollout.drain_seconds: what
    runs then still has the Pods' own grace (vLLM's --shutdown-timeout). `check` raises LeaseLost
    when the model is another run's. Raises ConditionFailed for the live slot.
    """
    _refuse_live(client, model, slot)
    start = time.monotonic()
    running, quiet, said = 0.0, 0, ""
    while time.monotonic() - start < model.rollout.drain_seconds and quiet < QUIET_LOOKS:
        looked = in_flight(client, slots.pods(client, model, slot))
        if looked is None:
            quiet = 0  # a Pod that doesn't answer may be working
        else:
            running, quiet = looked, quiet + 1 if looked == 0 else 0
        state = f"draining {slot_name(model, slot)}: {running:.0f} requests in flight"
        if state != said:
            progress(state)
            said = state
        time.sleep(LOOK_SECONDS)
    # This process may have been stopped meanwhile, and another run have gone live here.
    for end in (partial(keda.remove, progress=progress), scale_to_zero):
        _refuse_live(client, model, slot)
        check()
        end(client, model, slot)
    progress(f"{slot_name(model, slot)}: scaled to 0, kept for a rollback")
    return Drain(slot, time.monotonic() - start, 0.0 if quiet >= QUIET_LOOKS else running)


def _refuse_live(client: Client, model: ModelSpec, slot: Slot) -> None:
    if live_slot(client, model) == slot:
        raise ConditionFailed(f"slot {slot} of {model.name} is live: it can't be drained")


def in_flight(client: Client, pods: list[Obj]) -> float | None:
    """Running and waiting requests of the Pods, from their own /metrics; None if one is silent.

    A Pod that has no node yet has never had a request.
    """
    total = 0.0
    for pod in pods:
        if not pod["spec"].get("nodeName"):
            continue
        try:
            text = pod_http.get_text(
                client, pod["metadata"]["name"], PORT, "/metrics", timeout_s=10
            )
        except (PodUnreachable, HttpStatus):
            return None
        total += sum(prometheus.samples(text, RUNNING)) + sum(prometheus.samples(text, WAITING))
    return total


def scale_to_zero(client: Client, model: ModelSpec, slot: Slot) -> None:
    """Scale the slot's Deployment to 0, if there is one, and forget that it stood aside."""
    deployment = slots.deployment_of(client, model, slot)
    if deployment is None:
        return
    if deployment["spec"].get("replicas") != 0:
        client.scale("Deployment", slot_name(model, slot), 0)
    if STANDING_ASIDE in slots.annotations(deployment):
        forget = {"metadata": {"annotations": {STANDING_ASIDE: None}}}
        client.patch("Deployment", slot_name(model, slot), forget)
