"""Run a program in the cluster as a Job: create or adopt, follow its events, judge its end.

dagster-pipes isn't used: its log reader starts again from the first line after a cut, and knows
no Job that an earlier process started. The events are as plain: one JSON object a line.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

from k8s.client import Client, Obj
from k8s.errors import AlreadyExists, JobFailed, NotFound, WaitTimeout
from k8s.logs import container_status, follow
from k8s.waiting import HOPELESS

SPEC_HASH = "vllm-promotion.io/spec-hash"
_POLL_S = 0.5
# A Job's controller may be refused a Pod for a moment (a ServiceAccount that was just made).
_NO_POD_S = 8.0
_DELETION_S = 120.0
# A pool that scales up from nothing takes 2 to 5 minutes. (Engines, whose GPU nodes come slower
# and bring a large image, get 900 s.)
_NO_NODE_S = 600.0
# A scheduler that comes late, or a node that is just getting free, isn't worth a word.
_SAID_AFTER_S = 3.0
_CREATE_TRIES = 5
# How long the Job's controller may take to notice that the Pod has failed.
_CONTROLLER_S = 10.0
_SIGKILL, _SIGTERM = 137, 143


@dataclass(frozen=True)
class JobResult:
    """`result` is the program's `result` event, `events` all its events but log lines.

    The exit code may be other than 0 (a benchmark whose SLO is missed) when the program gave a
    result all the same. `seconds` is how long the container ran.
    """

    result: Obj
    events: tuple[Obj, ...]
    pod: str
    node: str
    seconds: float


def run_job(
    client: Client,
    job: Obj,
    *,
    deadline_s: float,
    on_event: Callable[[Obj], None],
) -> JobResult:
    """Create the Job, or adopt the one of the same name and content, and see it through.

    A failed one of the same name is deleted and made again. `on_event` gets each JSON event;
    other lines, and what the Pod is waiting for, as {"event": "log", "message": line}. That no
    node takes the Pod comes as {"event": "warning", "message": why}.

    Raises JobFailed (the program's own error, OOM, image, quota, no node for 10 min),
    WaitTimeout. A Job that still runs is left alone then, and on any BaseException: whoever
    called ends it (rollout.abandon, or the next run's rollout.reap).
    """
    deadline = time.monotonic() + deadline_s
    made = _create_or_adopt(client, job, deadline)
    return _see_through(_Watched(client, made, deadline, on_event))


def await_end(
    client: Client, job: Obj, *, deadline_s: float, on_event: Callable[[Obj], None]
) -> str:
    """See a Job through that someone else started. Returns "", or how it failed.

    `on_event` as in run_job. Raises WaitTimeout.
    """
    watched = _Watched(client, job, time.monotonic() + deadline_s, on_event)
    try:
        _see_through(watched)
    except JobFailed as error:
        return str(error)
    return ""


def end(client: Client, labels: Mapping[str, str]) -> list[str]:
    """Delete the Jobs with these labels that have not ended, and wait until their Pods are gone.

    Returns their names. Raises WaitTimeout.
    """
    jobs = running(client, labels)
    for job in jobs:
        _ask_to_delete(client, job)
    for job in jobs:
        _await_gone(client, job, time.monotonic() + _DELETION_S)
    return [job["metadata"]["name"] for job in jobs]


def running(client: Client, labels: Mapping[str, str]) -> list[Obj]:
    """The Jobs with these labels that have not ended."""
    return [
        job
        for job in client.list("Job", labels=labels)
        if not _condition(job, "Failed") and not _condition(job, "Complete")
    ]


def _see_through(watched: "_Watched") -> JobResult:
    client, on_event = watched.client, watched.on_event
    pod = watched.started_pod()
    container = pod["spec"]["containers"][0]["name"]
    events: list[Obj] = []
    lines: list[str] = []
    try:
        for line in follow(
            client,
            pod["metadata"]["name"],
            container,
            deadline_s=watched.deadline - time.monotonic(),
        ):
            event = _event(line)
            on_event(event)
            if event["event"] == "log":
                lines = [*lines[-9:], line]
            else:
                events.append(event)
        pod = client.get("Pod", pod["metadata"]["name"])
    except NotFound as gone:
        watched.vanished(str(gone), lines)
    return watched.judge(pod, container, events, lines)


@dataclass
class _Watched:
    """A Job that is waited for: its last state, and what is said when it fails."""

    client: Client
    job: Obj
    deadline: float
    on_event: Callable[[Obj], None]
    state: str = ""
    warned: bool = False

    @property
    def what(self) -> str:
        return f"Job {self.client.namespace}/{self.job['metadata']['name']}"

    def started_pod(self) -> Obj:
        """Wait until the first container of the Job's Pod runs or has run."""
        refused_since = unschedulable_since = None
        while True:
            self._refresh()
            pod = self._pod()
            if pod is None:
                if failed := _condition(self.job, "Failed"):
                    self._fail(f"{failed.get('reason')}: {failed.get('message')}")
                refusal = self._refusal()
                refused_since = (refused_since or time.monotonic()) if refusal else None
                self._tell(f"no Pod: {refusal}" if refusal else "no Pod yet")
                if refused_since and time.monotonic() - refused_since > _NO_POD_S:
                    self._fail(f"its Pod is refused: {refusal}")
            else:
                container = pod["spec"]["containers"][0]["name"]
                if container_status(pod, container).get("containerID"):
                    return pod
                self._tell(pod_state(pod))
                if why := _hopeless(pod):
                    self._fail(why)
                why = _unschedulable(pod)
                unschedulable_since = (unschedulable_since or time.monotonic()) if why else None
                if unschedulable_since:
                    self._no_node(why, time.monotonic() - unschedulable_since)
                if pod["status"].get("phase") == "Failed":
                    self._fail(pod_state(pod))
            if time.monotonic() + _POLL_S > self.deadline:
                self._late(pod)
            time.sleep(_POLL_S)

    def _no_node(self, why: str, since_s: float) -> None:
        """`why`: the scheduler's reason, for `since_s` now. A node may still come."""
        if since_s > _NO_NODE_S:
            self._fail(f"no node takes its Pod for {_NO_NODE_S:.0f} s: {why}")
        if since_s > _SAID_AFTER_S and not self.warned:
            self.warned = True
            left_s = min(_NO_NODE_S - since_s, self.deadline - time.monotonic())
            message = f"no node takes its Pod: Unschedulable: {why} Waits for one, {left_s:.0f} s"
            self.on_event({"event": "warning", "message": f"{self.what}: {message} at most"})

    def vanished(self, what: str, lines: list[str]) -> NoReturn:
        """The Pod or its log went away before all of it was read."""
        self._refresh()
        self._await_failed()
        self._check_deadline(lines)
        self._fail(f"before its end: {what} (deleted? node drained or lost?)" + _quoted(lines))

    def judge(self, pod: Obj, container: str, events: list[Obj], lines: list[str]) -> JobResult:
        """What the end of the container means."""
        end = (container_status(pod, container).get("state") or {}).get("terminated") or {}
        code = int(end.get("exitCode", -1))
        self._refresh()
        if code:
            # So that a next run, even at once, doesn't take it for one that still runs.
            self._await_failed()
        self._check_deadline(lines)
        errors = [event for event in events if event["event"] == "error"]
        results = [event for event in events if event["event"] == "result"]
        if errors:
            said = errors[-1]
            told = f". Next: {said['next']}" if said.get("next") else ""
            raise JobFailed(
                f"{self.what}: {said.get('error')}: {said.get('message')}{told}",
                error=str(said.get("error", "")),
            )
        if end.get("reason") == "OOMKilled" or (code == _SIGKILL and not _evicted(pod)):
            limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
            sure = (
                "out of memory (OOMKilled)"
                if end.get("reason") == "OOMKilled"
                else ("killed by SIGKILL, most likely out of memory")
            )
            self._fail(
                f"{sure}; the memory limit of container {container!r} is "
                f"{limit.get('memory', 'none: then it is the node that is full')}. Raise it, or "
                "give the program less to hold at a time" + _quoted(lines)
            )
        if _evicted(pod):
            self._fail(f"its Pod was evicted: {pod['status'].get('message')}")
        if code == _SIGTERM:
            self._fail("it was told to stop (exit code 143): Pod deleted or node drained?")
        if not results:
            self._fail(f"it ended with exit code {code} and without a result" + _quoted(lines))
        return JobResult(
            result=results[-1],
            events=tuple(events),
            pod=pod["metadata"]["name"],
            node=pod["spec"].get("nodeName", ""),
            seconds=_seconds_between(end.get("startedAt"), end.get("finishedAt")),
        )

    def _refresh(self) -> None:
        live = self.client.find("Job", self.job["metadata"]["name"])
        if live is None or live["metadata"]["uid"] != self.job["metadata"]["uid"]:
            self._fail("it was deleted by someone else")
        self.job = live

    def _await_failed(self) -> None:
        deadline = min(self.deadline, time.monotonic() + _CONTROLLER_S)
        while not _condition(self.job, "Failed") and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)
            self._refresh()

    def _pod(self) -> Obj | None:
        uid = self.job["metadata"]["uid"]
        pods = self.client.list("Pod", labels={"batch.kubernetes.io/controller-uid": uid})
        return max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)

    def _refusal(self) -> str:
        """Why the Job's controller can't make the Pod (quota, PodSecurity), if it can't."""
        uid = self.job["metadata"]["uid"]
        events = self.client.list(
            "Event", fields={"involvedObject.uid": uid, "reason": "FailedCreate"}
        )
        if not events:
            return ""
        # Each try has another Pod name in its message; the reason is what matters.
        return re.sub(rf'"{self.job["metadata"]["name"]}-\w+" ', "", events[-1].get("message", ""))

    def _check_deadline(self, lines: list[str]) -> None:
        failed = _condition(self.job, "Failed")
        if failed and failed.get("reason") == "DeadlineExceeded":
            limit = self.job["spec"].get("activeDeadlineSeconds")
            self._fail(f"it ran longer than its activeDeadlineSeconds ({limit})" + _quoted(lines))

    def _tell(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.on_event({"event": "log", "message": f"{self.what}: {state}"})

    def _fail(self, why: str) -> NoReturn:
        name, namespace = self.job["metadata"]["name"], self.client.namespace
        raise JobFailed(f"{self.what}: {why}. See: kubectl -n {namespace} describe job {name}")

    def _late(self, pod: Obj | None) -> NoReturn:
        state = self.state
        if pod is not None:
            events = self.client.list(
                "Event", fields={"involvedObject.uid": pod["metadata"]["uid"], "type": "Warning"}
            )
            if events:
                state += f"; {events[-1].get('reason')}: {events[-1].get('message')}"
        raise WaitTimeout(f"{self.what}: its Pod didn't start in time: {state}", last_state=state)


def pod_state(pod: Obj) -> str:
    """In a few words: phase, and what the Pod or a container of it is waiting for."""
    status = pod.get("status", {})
    words = [f"Pod {pod['metadata']['name']} {status.get('phase', 'Unknown')}"]
    if status.get("reason"):
        words.append(f"{status['reason']}: {status.get('message', '')}")
    if why := _unschedulable(pod):
        words.append(f"Unschedulable: {why}")
    for waiting in _waiting(pod):
        words.append(f"{waiting.get('reason')} {waiting.get('message') or ''}".strip())
    return ", ".join(words)


def _waiting(pod: Obj) -> list[Obj]:
    status = pod.get("status", {})
    containers = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    return [c["state"]["waiting"] for c in containers if "waiting" in (c.get("state") or {})]


def _hopeless(pod: Obj) -> str:
    for waiting in _waiting(pod):
        if (reason := waiting.get("reason", "")) in HOPELESS:
            why = waiting.get("message") or "no reason given"
            return f"{reason}: {why}: {HOPELESS[reason]}"
    return ""


def _unschedulable(pod: Obj) -> str:
    for condition in pod.get("status", {}).get("conditions") or []:
        if (condition["type"], condition["status"]) == ("PodScheduled", "False"):
            return str(condition.get("message") or condition.get("reason"))
    return ""


def _evicted(pod: Obj) -> bool:
    return bool(pod["status"].get("reason") == "Evicted")


def _condition(job: Obj, kind: str) -> Obj | None:
    for condition in job.get("status", {}).get("conditions") or []:
        if (condition["type"], condition["status"]) == (kind, "True"):
            return dict(condition)
    return None


def _create_or_adopt(client: Client, job: Obj, deadline: float) -> Obj:
    """The Job in the cluster, if need be made now."""
    wanted_hash = _spec_hash(job)
    meta = {**job["metadata"]}
    meta["annotations"] = {**meta.get("annotations", {}), SPEC_HASH: wanted_hash}
    name = meta["name"]
    for tries_left in reversed(range(_CREATE_TRIES)):
        try:
            return client.create({**job, "metadata": meta})
        except AlreadyExists:
            if not tries_left:  # others keep making it and deleting it
                raise
            live = client.find("Job", name)
        if live is None:
            continue
        same = live["metadata"].get("annotations", {}).get(SPEC_HASH) == wanted_hash
        if not live["metadata"].get("deletionTimestamp"):
            running = not _condition(live, "Failed") and not _condition(live, "Complete")
            if same and (running or _readable(client, live)):
                return live
            if running:
                raise JobFailed(
                    f"Job {client.namespace}/{name} runs already, with another content. Wait for "
                    f"it, or: kubectl -n {client.namespace} delete job {name}"
                )
            _ask_to_delete(client, live)
        _await_gone(client, live, min(deadline, time.monotonic() + _DELETION_S))
    raise AssertionError("the last try returns or raises")


def _readable(client: Client, job: Obj) -> bool:
    """Whether the Job is complete and its Pod, with the log, is still there."""
    labels = {"batch.kubernetes.io/controller-uid": job["metadata"]["uid"]}
    return _condition(job, "Complete") is not None and bool(client.list("Pod", labels=labels))


def _spec_hash(job: Obj) -> str:
    """Of what the Job does. The labels of its Pod say for whom, and that may differ."""
    spec = {**job["spec"], "template": {"spec": job["spec"]["template"]["spec"]}}
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _ask_to_delete(client: Client, job: Obj) -> None:
    meta = job["metadata"]
    client.delete("Job", meta["name"], propagation="Foreground", uid=meta["uid"])


def _await_gone(client: Client, job: Obj, deadline: float) -> None:
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    while (live := client.find("Job", name)) and live["metadata"]["uid"] == uid:
        if time.monotonic() + _POLL_S > deadline:
            pods = client.list("Pod", labels={"batch.kubernetes.io/controller-uid": uid})
            state = ", ".join(map(pod_state, pods)) or "no Pod left"
            raise WaitTimeout(
                f"Job {client.namespace}/{name} was deleted but isn't gone: {state}",
                last_state=state,
            )
        time.sleep(_POLL_S)


def _event(line: str) -> Obj:
    if line.startswith("{"):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    return {"event": "log", "message": line}


def _quoted(lines: list[str]) -> str:
    return "; its last lines:\n  " + "\n  ".join(lines) if lines else "; it wrote nothing"


def _seconds_between(start: str | None, end: str | None) -> float:
    if not start or not end:
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
