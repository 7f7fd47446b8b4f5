"""Logs of containers; following survives cut connections without losing or repeating a line."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from datetime import datetime, timedelta

from k8s.client import Client, Obj, split_lines
from k8s.errors import Invalid, NotFound, Unreachable, WaitTimeout
from k8s.kinds import kind_of
from k8s.transport import Backoff, Request

# A quiet log and a half-open connection look alike: after so long, ask again where we were.
_SILENCE_S = 20.0
# The API takes whole seconds, and stdout and stderr may overtake one another a little.
_OVERLAP = timedelta(seconds=1)
_POLL_S = 0.5


def follow(client: Client, pod: str, container: str, *, deadline_s: float) -> Iterator[str]:
    """The lines of one run of the container, from its first, until it has ended.

    Waits for its start. Raises WaitTimeout after `deadline_s`, NotFound when the Pod or its log
    is gone.
    """
    deadline = time.monotonic() + deadline_s
    run = _await_start(client, pod, container, deadline)
    position = _Position()
    backoff = Backoff()
    while True:
        # Asked before the log is read: if it has ended by now, what is read is all there is.
        previous, ended = _standing(client, pod, container, run)
        trouble = "its log ended, but it didn't"
        try:
            silence_s = max(1.0, min(_SILENCE_S, deadline - time.monotonic()))
            for line in _read(client, pod, container, position, previous, not ended, silence_s):
                backoff = Backoff()
                yield line
                if time.monotonic() > deadline:
                    trouble, ended = "it is still writing", False
                    break
            if ended:
                return
        except (Unreachable, Invalid) as error:  # Invalid: the container is just being replaced
            trouble = str(error)
        if not backoff.sleep(deadline):
            what = f"container {container} of Pod {client.namespace}/{pod}"
            last = position.last_line or "none"
            raise WaitTimeout(
                f"{what} hasn't ended after {deadline_s:.0f} s; last line: {last} ({trouble})",
                last_state=f"last line: {last}",
            )


def tail(
    client: Client,
    pod: str,
    container: str,
    lines: int,
    *,
    previous: bool = False,
) -> list[str]:
    """The last lines; `previous`: of the run before the last restart. [] if there is no log."""
    query = {"container": container, "tailLines": str(lines)}
    if previous:
        query["previous"] = "true"
    request = _request(client, pod, query)
    try:
        text = client.transport.call(request).decode("utf-8", "replace")
    except (NotFound, Invalid):  # no such Pod, not started, or nothing previous
        return []
    return text.splitlines()


def container_status(pod: Obj, container: str) -> Obj:
    """The status of a container or init container; {} where the kubelet hasn't written one."""
    status = pod.get("status", {})
    for field in ("containerStatuses", "initContainerStatuses"):
        for entry in status.get(field) or []:
            if entry["name"] == container:
                return dict(entry)
    return {}


class _Position:
    """What was read, so that reading can go on there: lines are known by time stamp and text."""

    def __init__(self) -> None:
        self.since: datetime | None = None
        self.last_line = ""
        self._recent: deque[tuple[datetime, str]] = deque()
        self._again: Counter[str] = Counter()

    def resume(self) -> None:
        """From here on, lines since `since` come once more."""
        self._again = Counter(raw for _, raw in self._recent)

    def take(self, raw: str) -> str | None:
        """The line without its time stamp; None if we have had it. ValueError: no time stamp."""
        stamp, _, line = raw.partition(" ")
        moment = _moment(stamp)
        if self._again[raw] > 0:
            self._again[raw] -= 1
            return None
        self.since = moment - _OVERLAP
        self._recent.append((moment, raw))
        while self._recent[0][0] < self.since:
            self._recent.popleft()
        self.last_line = line
        return line


def _moment(stamp: str) -> datetime:
    """2026-01-02T03:04:05.123456789Z or …+01:00, to the whole second: as the API compares it."""
    zone = stamp[len("2026-01-02T03:04:05") :].lstrip(".0123456789")
    return datetime.fromisoformat(stamp[: len("2026-01-02T03:04:05")] + zone)


def _read(
    client: Client,
    pod: str,
    container: str,
    position: _Position,
    previous: bool,
    more: bool,
    silence_s: float,
) -> Iterator[str]:
    """New lines of one request. `more`: the container runs, so go on with what it writes."""
    query = {"container": container, "timestamps": "true"}
    if previous:
        query["previous"] = "true"
    elif more:
        query["follow"] = "true"
    if position.since is not None:
        query["sinceTime"] = position.since.isoformat()
    position.resume()
    request = _request(client, pod, query)
    with client.transport.stream(request, silence_s) as pieces:
        for raw in split_lines(pieces, last=not more):
            text = raw.decode("utf-8", "replace")
            try:
                line = position.take(text)
            except ValueError:
                # No time stamp: not a line of the log but the kubelet, saying that it has none.
                where = f"container {container} of Pod {client.namespace}/{pod}"
                if more:
                    raise Unreachable(f"the log of {where} can't be read: {text}") from None
                raise NotFound(f"the log of {where} is gone: {text}") from None
            if line is not None:
                yield line


def _request(client: Client, pod: str, query: dict[str, str]) -> Request:
    where = client.namespace
    asked = client.asked("read the log of", kind_of("Pod"), pod, where)
    return Request(asked, "GET", kind_of("Pod").path(where, pod, "log"), query)


def _await_start(client: Client, pod: str, container: str, deadline: float) -> str:
    """Wait until the container runs or has run. Returns the id of that run."""
    state = "no status"
    while True:
        status = container_status(client.get("Pod", pod), container)
        if status.get("containerID"):
            return str(status["containerID"])
        for waiting in status.get("state", {}).values():
            state = " ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
        if time.monotonic() + _POLL_S > deadline:
            raise WaitTimeout(
                f"container {container} of Pod {client.namespace}/{pod} didn't "
                f"start in time; last state: {state}",
                last_state=state,
            )
        time.sleep(_POLL_S)


def _standing(client: Client, pod: str, container: str, run: str) -> tuple[bool, bool]:
    """(whether another run has taken its place, whether it has ended)."""
    status = container_status(client.get("Pod", pod), container)
    if status.get("containerID") not in (None, run):
        return True, True
    # Between a crash and the restart it is "waiting", and its end is in the last state.
    last = (status.get("lastState") or {}).get("terminated") or {}
    return False, "terminated" in (status.get("state") or {}) or last.get("containerID") == run
