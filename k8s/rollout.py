"""Bring a candidate up in the idle slot, or take it away again."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from catalog import ClusterSpec, ModelSpec, PoolError
from k8s import fence, jobs, keda, manifests, readiness, records, slots, traffic
from k8s.client import Client, Obj
from k8s.errors import ConditionFailed, Conflict, Invalid, KubernetesError, NotFound
from k8s.gpus import Strategy
from k8s.manifests import Release, Slot, slot_name
from k8s.manifests.platform import ENGINES
from k8s.manifests.release import (
    ENGINE_ACCOUNT,
    JOBS_ACCOUNT,
    MODEL,
    PROMOTION,
    SLOTS,
    STANDING_ASIDE,
    UNKNOWN_COMMIT,
    WEIGHTS,
    other_slot,
    unresolved,
)
from k8s.manifests.scaling import EXAMPLE_THRESHOLDS
from k8s.records import PromotionRecord
from k8s.wait import Progress


@dataclass(frozen=True)
class Rollout:
    """A candidate that is ready. `image_digest` is what ran, from the Pod's imageID.

    `seconds_to_ready`: the cold start, from when the Pod had its node until it was ready.
    """

    deployment: str
    pod: str
    pod_ip: str
    node: str
    image_digest: str
    template_hash: str
    seconds_to_ready: float


# Before anything is changed


def preflight(client: Client, cluster: ClusterSpec, model: ModelSpec) -> None:
    """Refuse what can't work, before anything is changed: a missing part of the platform, CRD or
    permission, an object or a scaler of someone else in the way. All by reading and dry runs.

    Raises KubernetesError with the next step.
    """
    apply = f"python -m k8s platform --cluster {cluster.name} | kubectl apply --server-side -f -"
    needed = [
        ("PersistentVolumeClaim", cluster.storage.claim),
        ("ServiceAccount", ENGINE_ACCOUNT),
        ("ServiceAccount", JOBS_ACCOUNT),
        ("PodMonitor", ENGINES),
    ]
    for kind, name in needed:
        if client.find(kind, name) is None:
            raise NotFound(
                f"{kind} {name} is missing in namespace {cluster.namespace} of cluster "
                f"{cluster.name}. An admin applies it once: {apply}",
                code=404,
            )
    slot = traffic.idle_slot(client, model)
    unknown, adapters = UNKNOWN_COMMIT, unresolved(model)
    refuse_conflicts(client, Release(model, cluster, unknown, slot, "preflight", 60, adapters))


def refuse_conflicts(client: Client, release: Release) -> None:
    """A dry run of all that a promotion applies, by the API server. Nothing is changed.

    Raises ConditionFailed (immutable selector, foreign scaler), Conflict (fields of others),
    Invalid.
    """
    if foreign := keda.foreign_scalers(client, release.model):
        raise ConditionFailed(
            f"{'; '.join(foreign)}: not by this pipeline, and two scalers on one target fight. "
            "Delete it; the promotion makes its own"
        )
    rendered = manifests.deployment(release)
    live = client.find("Deployment", release.name)
    if live is not None and live["spec"]["selector"] != rendered["spec"]["selector"]:
        raise ConditionFailed(
            f"Deployment {release.name} exists with the selector "
            f"{json.dumps(live['spec']['selector'])}, this pipeline's is "
            f"{json.dumps(rendered['spec']['selector'])}, and a selector can't be changed. It was "
            "not made by this pipeline and is left as it is: rename it, or rename the model"
        )
    traffic.apply_service(client, release.model, release.cluster, release.slot, dry_run=True)
    scaled = manifests.scaled_object(release, EXAMPLE_THRESHOLDS, 1)
    for obj in (rendered, manifests.pdb(release), scaled):
        try:
            client.apply(obj, dry_run=True)
        except Conflict as error:
            where = f"{obj['kind']} {release.name}"
            raise Conflict(
                f"{where} was changed by someone else: {error}. Undo it, or delete {where}: slot "
                f"{release.slot} is not live",
                fields=error.fields,
            ) from None


# Up


def roll_out(
    client: Client,
    release: Release,
    *,
    strategy: Strategy = "blue_green",
    progress: Progress = lambda _: None,
) -> Rollout:
    """Apply the slot's objects and wait until the candidate is ready and stays so.

    strategy "recreate": the live slot makes room first; abandon() brings it back. A candidate of
    the same promotion that is there already is adopted. Raises Conflict, Invalid or
    ConditionFailed before anything changed; later ConditionFailed as soon as it can't come up any
    more, or WaitTimeout.
    """
    model, name = release.model, release.name
    live = traffic.live_slot(client, model)
    if live == release.slot:
        raise ConditionFailed(f"slot {live} of {model.name} is live: no candidate goes there")
    refuse_conflicts(client, release)
    if strategy == "recreate" and live is not None:
        _stand_aside(client, model, live, release.promotion, progress)
    keda.remove(client, model, release.slot, progress=progress)
    before = client.find("Deployment", name)
    if before is not None:
        fence.clear(client, release, before)
        if before["spec"].get("replicas") and not _is_ours(client, release, before):
            progress(f"Deployment {name}: what is left of an earlier promotion is ended")
            client.scale("Deployment", name, 0)
    progress(f"Deployment {name}: applying commit {release.commit[:12]}")
    failed = {pod["metadata"]["uid"] for pod in slots.failed_pods(client, model, release.slot)}
    client.apply(manifests.deployment(release))
    client.apply(manifests.pdb(release))
    if client.get("Deployment", name)["spec"].get("replicas") != 1:
        client.scale("Deployment", name, 1)
    pod, template = readiness.wait_until_ready(client, release, progress, failed)
    fence.pass_gate(
        client, release, "weights", f"serves {release.weights_path}", template_hash=template
    )
    return Rollout(
        deployment=name,
        pod=pod["metadata"]["name"],
        pod_ip=pod["status"]["podIP"],
        node=pod["spec"]["nodeName"],
        image_digest=readiness.image_digest(pod),
        template_hash=template,
        seconds_to_ready=readiness.seconds_to_ready(client, pod),
    )


def still_has_address(client: Client, rollout: Rollout) -> bool:
    """Whether what answers at the candidate's address is its Pod, and no later one."""
    pod = client.find("Pod", rollout.pod)
    status = pod.get("status", {}) if pod else {}
    return status.get("phase") == "Running" and status.get("podIP") == rollout.pod_ip


def _is_ours(client: Client, release: Release, before: Obj) -> bool:
    """It is this promotion's candidate, and an apply would not change its Pods."""
    after = client.apply(manifests.deployment(release), dry_run=True)
    return (
        slots.annotations(before).get(PROMOTION) == release.promotion
        and before["spec"]["template"] == after["spec"]["template"]
    )


def _stand_aside(
    client: Client, model: ModelSpec, live: Slot, promotion: str, progress: Progress
) -> None:
    """Scale the live slot to 0. How to bring it back is written down first."""
    name = slot_name(model, live)
    deployment = client.get("Deployment", name)
    serving = int(deployment.get("status", {}).get("readyReplicas", 0))
    # A note that is there already says more than the Deployment, which may be at 0 by now.
    before = slots.standing_aside(deployment) or slots.StandingAside(
        promotion, max(1, int(deployment["spec"].get("replicas", 1))), serving
    )
    note = json.dumps(asdict(replace(before, promotion=promotion)))
    client.patch("Deployment", name, {"metadata": {"annotations": {STANDING_ASIDE: note}}})
    if serving:
        progress(f"OUTAGE of {model.name} begins: {name} makes room for the candidate")
    else:
        progress(f"{name}, which has no ready Pod, makes room for the candidate")
    keda.pause(client, model, live, 0)
    client.scale("Deployment", name, 0)


# Down


def abandon(
    client: Client, model: ModelSpec, promotion: str, *, progress: Progress = lambda _: None
) -> list[str]:
    """Take away what `promotion` brought up, unless it is live, and bring a live slot back that
    made room for just this promotion. Returns what was done.

    Idempotent. Does all that it can, then raises KubernetesError with what failed.
    """
    traffic.settle(client, model)
    live = traffic.live_slot(client, model)
    todo = _Todo(progress)
    todo.try_(lambda: _end_jobs(client, model, lambda of: of == promotion))
    for slot in SLOTS:
        if slot != live:
            todo.try_(partial(_end_slot, client, model, slot, lambda of: of == promotion))
    if live is not None:
        todo.try_(lambda: _bring_back(client, model, live, lambda of: of == promotion, progress))
    return todo.finish()


def reap(
    client: Client, model: ModelSpec, promotion: str, *, progress: Progress = lambda _: None
) -> list[str]:
    """Put right what killed promotions left: candidates, Jobs, a live slot that made room.

    A download goes on: what it fetches may be just what is wanted (see end_downloads). Call with
    the model's Lease held (then all of that is orphaned), before counting GPUs. Returns what was
    done. Raises KubernetesError.
    """
    live = traffic.live_slot(client, model)
    _refuse_lost_service(client, model, live)
    todo = _Todo(progress)
    todo.try_(
        lambda: _end_jobs(
            client, model, lambda of: of != promotion, lambda marks: WEIGHTS not in marks
        )
    )
    for slot in SLOTS:
        if slot != live:
            todo.try_(partial(_end_slot, client, model, slot, lambda of: of != promotion))
    before = len(todo.done)
    if live is not None:
        todo.try_(lambda: _bring_back(client, model, live, lambda _: True, progress))
        if len(todo.done) > before:
            _wait_for_live(client, model, live, progress)
    return todo.finish()


def end_downloads(
    client: Client, model: ModelSpec, promotion: str, keep: Collection[str]
) -> list[str]:
    """End the downloads that killed promotions of the model left, but for those of the weights
    (weights_key) in `keep`. Call with the model's Lease held. Returns what was done.
    """
    return _end_jobs(
        client,
        model,
        lambda of: of != promotion,
        lambda marks: WEIGHTS in marks and marks[WEIGHTS] not in keep,
    )


class _Todo:
    """Steps that are all tried, whatever becomes of the others."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.done: list[str] = []
        self.failed: list[str] = []

    def try_(self, step: Callable[[], list[str]]) -> None:
        try:
            deeds = step()
        except KubernetesError as error:
            self.failed.append(str(error))
        else:
            self.done += deeds
            for deed in deeds:
                self.progress(deed)

    def finish(self) -> list[str]:
        if self.failed:
            raise KubernetesError("; ".join(self.failed))
        return self.done


def _end_jobs(
    client: Client,
    model: ModelSpec,
    whose: Callable[[str], bool],
    which: Callable[[Mapping[str, str]], bool] = lambda _: True,
) -> list[str]:
    """Delete Jobs that still run. Finished ones stay for those who want to look."""
    done = []
    for job in jobs.running(client, {MODEL: model.name}):
        name, marks = job["metadata"]["name"], job["metadata"]["labels"]
        of = marks.get(PROMOTION)
        if of and whose(of) and which(marks):
            client.delete("Job", name)
            done.append(f"Job {name} deleted")
    for config in client.list("ConfigMap", labels={MODEL: model.name}):
        of = config["metadata"]["labels"].get(PROMOTION)
        if of and whose(of):
            client.delete("ConfigMap", config["metadata"]["name"])
    return done


def _end_slot(
    client: Client, model: ModelSpec, slot: Slot, whose: Callable[[str], bool]
) -> list[str]:
    deployment = slots.deployment_of(client, model, slot)
    of = slots.annotations(deployment).get(PROMOTION) if deployment else None
    if deployment is None or of is None or not whose(of):
        return []
    name = slot_name(model, slot)
    had_scaler = client.find("ScaledObject", name) is not None
    keda.remove(client, model, slot)
    if not had_scaler and not deployment["spec"].get("replicas"):
        return []
    traffic.scale_to_zero(client, model, slot)
    return [f"Deployment {name} of promotion {of} scaled to 0"]


def _bring_back(
    client: Client, model: ModelSpec, live: Slot, whose: Callable[[str], bool], progress: Progress
) -> list[str]:
    """Undo _stand_aside. Raises AutoscalingNotProven if KEDA doesn't take over again."""
    deployment = slots.deployment_of(client, model, live)
    aside = slots.standing_aside(deployment)
    if deployment is None or aside is None or not whose(aside.promotion):
        return []
    name, replicas = slot_name(model, live), aside.replicas
    try:
        keda.unpause(client, model, live)
    finally:  # users wait for the replicas, with autoscaling or without
        if not deployment["spec"].get("replicas"):
            client.scale("Deployment", name, replicas)
    forget = {"metadata": {"annotations": {STANDING_ASIDE: None}}}
    client.patch("Deployment", name, forget)
    progress(f"Deployment {name}: live again with {replicas} replicas, once they have started")
    keda.resume(client, model, live, progress=progress)
    return [f"Deployment {name} brought back to {replicas} replicas"]


def _wait_for_live(client: Client, model: ModelSpec, live: Slot, progress: Progress) -> None:
    """A live slot that was just brought back needs its start-up time. Goes on when it is over."""
    name = slot_name(model, live)
    deployment = client.get("Deployment", name)
    deadline = time.monotonic() + deployment["spec"].get("progressDeadlineSeconds", 600)
    progress(f"Deployment {name}: waiting until it is ready again")
    while not traffic.ready_replicas(client, model, live):
        if time.monotonic() > deadline:
            progress(f"Deployment {name} is live and has no ready Pod")
            return
        time.sleep(1)


def _refuse_lost_service(client: Client, model: ModelSpec, live: Slot | None) -> None:
    """Where the Service leads to nobody, the slot that it should lead to must not be ended."""
    if live is not None and traffic.ready_replicas(client, model, live):
        return
    current, _ = records.read(client, model)
    if current is None or current.slot == live:
        return
    if traffic.ready_replicas(client, model, current.slot):
        state = (
            f"selects slot {live}, which has no ready Pod" if live else "is gone or selects no slot"
        )
        raise ConditionFailed(
            f"the record says that slot {current.slot} of {model.name} is live, and it runs, but "
            f"Service {model.object_name} {state}. Restore it: "
            + traffic.service_command(model, current.cluster, current.slot)
        )


# Drift


def drift(client: Client, cluster: ClusterSpec, record: PromotionRecord) -> list[str]:
    """What someone changed on the live slot since `record`: one sentence each, by field and
    manager where the API server knows them. Also what of the record's spec this cluster doesn't
    take any more (a node pool that was renamed).
    """
    release = record.release(cluster)
    settled = slots.settled(client, record.spec, record.slot)
    if settled is None:
        return [f"Deployment {release.name} is gone"]
    template = settled[1]
    found = []
    minimum = record.spec.scaling.min_replicas
    rendered: list[Obj] = [manifests.service(record.spec, cluster, record.slot)]
    try:
        rendered.append(manifests.deployment(release))
        rendered.append(manifests.scaled_object(release, record.thresholds, minimum))
    except PoolError as error:
        found.append(f"Deployment {release.name} could not be promoted again: {error}")
    for obj in rendered:
        try:
            client.apply(obj, dry_run=True)
        except Conflict as error:
            found += [
                f"{obj['kind']} {obj['metadata']['name']}: {field} was set by {manager}"
                for field, manager in error.fields.items()
            ] or [f"{obj['kind']} {obj['metadata']['name']}: {error}"]
        except Invalid as error:
            found.append(f"{obj['kind']} {obj['metadata']['name']} could not be applied: {error}")
    if template != record.template_hash:
        found.append(
            f"Deployment {release.name}: its Pods are {template}, those promoted were "
            f"{record.template_hash}"
        )
    live = traffic.live_slot(client, record.spec)
    if live == other_slot(record.slot):
        found.append(f"Service {record.spec.object_name}: selects slot {live}, not {record.slot}")
    return found
