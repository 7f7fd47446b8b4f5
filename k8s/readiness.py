"""Wait until a candidate is ready and stays so; stop as soon as it can't come up any more."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from k8s import engine_log, logs, slots
from k8s.client import Client, Obj
from k8s.errors import ConditionFailed, KubernetesError, WaitTimeout
from k8s.gpus import free_gpus
from k8s.manifests import Release
from k8s.manifests.engine import NODE_AND_IMAGE_SECONDS
from k8s.manifests.release import ENGINE, GPU_CHECK
from k8s.wait import Progress
from k8s.waiting import HOPELESS

LOOK_SECONDS = 1.0
LOG_LINES = 200
# A scheduler needs a moment; so does the kubelet to free the GPU of a Pod that has just ended.
UNSCHEDULABLE_SECONDS = 20.0
# A dead engine core that will exit does so within this time; one that hangs never does.
DEAD_SECONDS = 5.0
# After its budget the kubelet ends the engine; only then this gives up, so that the log says so.
SLACK_SECONDS = 30.0
SAME_EXITS = 2  # the engine ended alike that often: it always will
ANY_EXITS = 3  # it ended that often, each time differently
# Marks that keep a Pod where it is while it loads. They are taken off when it is ready: in the
# template they would stay for ever, and no node with an engine could be consolidated.
KEEP = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}


@dataclass
class Watched:
    """What has been seen of a candidate so far."""

    client: Client
    release: Release
    progress: Progress
    failed_before: Collection[str]
    started: float = field(default_factory=time.monotonic)
    engine_since: float | None = None
    unschedulable_since: float | None = None
    dead_since: float | None = None
    exits: dict[str, str] = field(default_factory=dict)  # container id → how that run ended
    kept: set[str] = field(default_factory=set)
    said: str = ""

    def say(self, message: str) -> None:
        """Progress, if it is new."""
        if message != self.said:
            self.said = message
            self.progress(message)


def wait_until_ready(
    client: Client, release: Release, progress: Progress, failed_before: Collection[str]
) -> tuple[Obj, str]:
    """The Pod that is ready and stayed so for rollout.soak_seconds, and its template's hash.

    `failed_before`: uids of Failed Pods of the slot that were there before it was applied. Raises
    ConditionFailed, WaitTimeout.
    """
    watched = Watched(client, release, progress, failed_before)
    soak = release.model.rollout.soak_seconds
    ready_since: float | None = None
    soaking = ""
    while True:
        # Even a new annotation makes the Deployment look changed, until its controller has looked.
        found = slots.settled(client, release.model, release.slot)
        deployment, template = found or (client.get("Deployment", release.name), None)
        pod = _look(watched, deployment, template)
        now = time.monotonic()
        if pod is not None and template and _is_done(deployment, pod):
            mark = f"{pod['metadata']['uid']}/{_restarts(pod)}"
            if ready_since is None:
                ready_since, soaking = now, mark
                watched.say(f"Pod {pod['metadata']['name']}: ready, watched for {soak:g} s")
            elif mark != soaking:
                raise ConditionFailed(_unsteady(watched, pod, template))
            if now - ready_since >= soak:
                _unmark(watched, pod)
                return pod, template
        elif ready_since is not None:
            raise ConditionFailed(_unsteady(watched, pod, template))
        else:
            _check_deadline(watched, pod, now)
        time.sleep(LOOK_SECONDS)


def _is_done(deployment: Obj, pod: Obj) -> bool:
    status = deployment.get("status", {})
    return (
        status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
        and status.get("updatedReplicas", 0) >= 1
        and status.get("readyReplicas", 0) >= 1
        and slots.is_ready(pod)
    )


def _look(watched: Watched, deployment: Obj, template: str | None) -> Obj | None:
    """The newest Pod of the template. Raises ConditionFailed if it can't become ready."""
    name = watched.release.name
    failure = slots.condition(deployment, "ReplicaFailure")
    if failure.get("status") == "True":
        raise ConditionFailed(
            f"Deployment {name}: {failure.get('reason')}: {failure.get('message')}. Look at the "
            "namespace's ResourceQuota, LimitRange and Pod security level"
        )
    if template is None:
        watched.say(f"Deployment {name}: waiting for its controller")
        return None
    model, slot = watched.release.model, watched.release.slot
    failed = [
        pod
        for pod in slots.failed_pods(watched.client, model, slot)
        if pod["metadata"]["uid"] not in watched.failed_before
        and pod["metadata"]["labels"].get(slots.TEMPLATE_HASH) == template
    ]
    if len(failed) >= SAME_EXITS:
        status = failed[0]["status"]
        raise ConditionFailed(
            f"Pod {failed[0]['metadata']['name']} of {name}: {status.get('reason')}: "
            f"{status.get('message')}"
        )
    running = slots.pods(watched.client, model, slot, {slots.TEMPLATE_HASH: template})
    if not running:
        watched.say(f"Deployment {name}: waiting for its Pod")
        return None
    pod = running[0]
    _mark(watched, pod)
    _check_scheduled(watched, pod)
    _check_containers(watched, pod)
    return pod


def _check_scheduled(watched: Watched, pod: Obj) -> None:
    name = pod["metadata"]["name"]
    scheduled = slots.condition(pod, "PodScheduled")
    if scheduled.get("status") != "False":
        if not pod["spec"].get("nodeName"):
            watched.say(f"Pod {name}: waiting for a node")
        watched.unschedulable_since = None
        return
    why = scheduled.get("message", "no node fits")
    watched.say(f"Pod {name}: {scheduled.get('reason')}: {why}")
    now = time.monotonic()
    since = watched.unschedulable_since = watched.unschedulable_since or now
    if now - since < UNSCHEDULABLE_SECONDS:
        return
    budget = free_gpus(watched.client, watched.release.cluster, watched.release.model)
    # A new node takes minutes, and a Pod that is ending has its GPU until its grace is over.
    if budget.growable or _someone_is_leaving(watched):
        return
    raise ConditionFailed(
        f"Pod {name} of {watched.release.name} finds no node: {why} ({budget.describe()}). "
        "Free GPUs, or let the node pool grow"
    )


def _someone_is_leaving(watched: Watched) -> bool:
    resource = watched.release.model.gpus.resource
    return any(
        resource in container.get("resources", {}).get("limits", {})
        for pod in watched.client.list("Pod", namespace="*")
        if "deletionTimestamp" in pod["metadata"]
        for container in pod["spec"]["containers"]
    )


def _check_containers(watched: Watched, pod: Obj) -> None:
    name, status = pod["metadata"]["name"], pod["status"]
    check = _container(status.get("initContainerStatuses"), GPU_CHECK)
    engine = _container(status.get("containerStatuses"), ENGINE)
    for container, of in ((GPU_CHECK, check), (ENGINE, engine)):
        waiting = of.get("state", {}).get("waiting", {})
        reason = waiting.get("reason", "")
        if reason in HOPELESS:
            raise ConditionFailed(
                f"Pod {name}, container {container}: {reason}: {waiting.get('message', '')}: "
                f"{HOPELESS[reason]}"
            )
    ended = check.get("state", {}).get("terminated") or check.get("lastState", {}).get("terminated")
    if ended and ended["exitCode"] != 0:
        lines = _tail(watched, pod, GPU_CHECK, previous="terminated" not in check["state"])
        raise ConditionFailed(
            f"Pod {name}: nvidia-smi ended with {ended['exitCode']} on node "
            f"{pod['spec'].get('nodeName')}: {engine_log.last_words(lines)}. Is the driver there, "
            "and does the device plugin see the GPU?"
        )
    state = engine.get("state", {})
    if "running" in state:
        _check_running(watched, pod)
    elif pod["spec"].get("nodeName") and not engine.get("restartCount"):
        reason = state.get("waiting", {}).get("reason", "")
        if "terminated" not in state:
            watched.say(f"Pod {name}: {reason or 'starting'} (node {pod['spec']['nodeName']})")
    _check_exits(watched, pod, engine)


def _check_running(watched: Watched, pod: Obj) -> None:
    """The engine loads. It may be dead although its process is there."""
    name, now = pod["metadata"]["name"], time.monotonic()
    watched.engine_since = watched.engine_since or now
    if slots.is_ready(pod):
        return
    watched.say(f"Pod {name}: engine started, waiting for /health")
    lines = _tail(watched, pod, ENGINE)
    if not engine_log.is_dead(lines):
        watched.dead_since = None
        return
    watched.dead_since = watched.dead_since or now
    if now - watched.dead_since >= DEAD_SECONDS:
        raise ConditionFailed(
            f"Pod {name}: the engine is dead but does not exit: {engine_log.last_words(lines)}"
        )


def _check_exits(watched: Watched, pod: Obj, engine: Obj) -> None:
    """Two equal ends are enough: the engine will end like this each time."""
    name = pod["metadata"]["name"]
    for state, previous in (("state", "running" in engine.get("state", {})), ("lastState", True)):
        ended = engine.get(state, {}).get("terminated")
        if not ended or ended.get("containerID", "") in watched.exits:
            continue
        if ended.get("reason") == "OOMKilled":
            limit = watched.release.model.resources.memory
            raise ConditionFailed(
                f"Pod {name}: the engine was OOMKilled at its memory limit of {limit}. Raise "
                f"resources.memory in catalog/models/{watched.release.model.name}.yaml"
            )
        waiting = "waiting" in engine.get("state", {})
        lines = _tail(watched, pod, ENGINE, previous=previous and not waiting)
        words = engine_log.last_words(lines)
        how = f"exit {ended['exitCode']}: {words}"
        watched.exits[ended.get("containerID", "")] = how
        watched.dead_since = None
        watched.progress(f"Pod {name}: engine ended with {how}")
    hows = list(watched.exits.values())
    if any(hows.count(how) >= SAME_EXITS for how in hows):
        raise ConditionFailed(f"Pod {name}: the engine ends alike at each start, with {hows[-1]}")
    if max(len(hows), engine.get("restartCount", 0)) >= ANY_EXITS:
        raise ConditionFailed(f"Pod {name}: the engine ends at each start, with {'; '.join(hows)}")


def _check_deadline(watched: Watched, pod: Obj | None, now: float) -> None:
    budget = watched.release.startup_seconds
    if watched.engine_since is None:
        if now - watched.started > NODE_AND_IMAGE_SECONDS:
            raise WaitTimeout(
                f"{watched.release.name}: no engine has started after {NODE_AND_IMAGE_SECONDS} s; "
                f"last state: {watched.said}. Look at the node pool, and at the image's size",
                last_state=watched.said,
            )
    elif now - watched.engine_since > budget + SLACK_SECONDS:
        if pod is None:
            raise WaitTimeout(
                f"{watched.release.name}: not ready {budget} s after its engine started, and its "
                f"Pod is gone; last state: {watched.said}. Was it scaled to 0, or evicted? See: "
                f"kubectl -n {watched.client.namespace} describe deployment "
                f"{watched.release.name}",
                last_state=watched.said,
            )
        words = engine_log.last_words(_tail(watched, pod, ENGINE))
        raise WaitTimeout(
            f"Pod {pod['metadata']['name']}: not ready {budget} s after its engine started; its "
            f"log: {words}. If it only needs longer, raise rollout.start_seconds_min in "
            f"catalog/models/{watched.release.model.name}.yaml",
            last_state=watched.said,
        )


def _unsteady(watched: Watched, pod: Obj | None, template: str | None) -> str:
    soak = watched.release.model.rollout.soak_seconds
    if template is None:
        return (
            f"{watched.release.name} was ready, but the controller manager has not looked at it "
            f"for {slots.SETTLE_SECONDS:.0f} s. Is it running?"
        )
    if pod is None:
        return f"{watched.release.name} was ready, but its Pod went away within {soak:g} s"
    words = engine_log.last_words(_tail(watched, pod, ENGINE, previous=_restarts(pod) > 0))
    return (
        f"Pod {pod['metadata']['name']} was ready, but not for {soak:g} s "
        f"({_restarts(pod)} restarts): {words}"
    )


def _restarts(pod: Obj) -> int:
    return int(_container(pod["status"].get("containerStatuses"), ENGINE).get("restartCount", 0))


def _container(statuses: list[Obj] | None, name: str) -> Obj:
    return next((dict(status) for status in statuses or [] if status["name"] == name), {})


def _tail(watched: Watched, pod: Obj, container: str, *, previous: bool = False) -> list[str]:
    """The log's end; a log that can't be read must not hide what it was wanted for."""
    name = pod["metadata"]["name"]
    try:
        return logs.tail(watched.client, name, container, LOG_LINES, previous=previous)
    except KubernetesError:
        return []


def _mark(watched: Watched, pod: Obj) -> None:
    name = pod["metadata"]["name"]
    if name not in watched.kept:
        watched.kept.add(name)
        watched.client.patch("Pod", name, {"metadata": {"annotations": KEEP}})


def _unmark(watched: Watched, pod: Obj) -> None:
    forget = {"metadata": {"annotations": dict.fromkeys(KEEP)}}
    watched.client.patch("Pod", pod["metadata"]["name"], forget)


def seconds_to_ready(client: Client, pod: Obj) -> float:
    """The cold start by the cluster's own clock, in seconds: until the Pod was ready, from when
    it got its node; a node that was made for it counts too. Not that it waited for a GPU that
    another Pod still had.
    """
    ready = _time(slots.condition(pod, "Ready")["lastTransitionTime"])
    created = _time(pod["metadata"]["creationTimestamp"])
    node = client.find("Node", pod["spec"]["nodeName"])
    if node is not None and _time(node["metadata"]["creationTimestamp"]) > created:
        return (ready - created).total_seconds()
    scheduled = slots.condition(pod, "PodScheduled").get("lastTransitionTime")
    return (ready - (_time(scheduled) if scheduled else created)).total_seconds()


def _time(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)


def image_digest(pod: Obj) -> str:
    """What really ran, not what was asked for."""
    engine = _container(pod["status"].get("containerStatuses"), ENGINE)
    return str(engine.get("imageID", "")).removeprefix("docker-pullable://")
