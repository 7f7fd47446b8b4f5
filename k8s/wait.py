"""Wait until, fail on, before a deadline, and say the last state."""

from collections.abc import Callable

from k8s.client import Client, Obj
from k8s.errors import ConditionFailed, Unreachable, WaitTimeout

# Is told what a wait waits for, each time that it changes.
Progress = Callable[[str], None]

# How often the callbacks are asked when nothing changes, in seconds.
_ASK_AGAIN_S = 2.0


def wait(
    client: Client,
    kind: str,
    name: str,
    *,
    until: Callable[[Obj | None], bool],
    fail: Callable[[Obj | None], str | None] = lambda _: None,
    deadline_s: float,
    state: Callable[[Obj | None], str],
    progress: Progress = lambda _: None,
) -> Obj | None:
    """Wait until `until(object)`; the object is None while it doesn't exist.

    All three callbacks are asked about the present object on each change and at least every
    2 s, so they may depend on time. `progress` gets each new state. Returns the object. Raises
    ConditionFailed with what `fail` returned, WaitTimeout after `deadline_s`, also if the API
    server is away by then.
    """
    what = f"{kind} {client.namespace}/{name}"
    last_state = None
    away = ""
    try:
        for obj in client.watch(kind, name=name, timeout_s=deadline_s, window_s=_ASK_AGAIN_S):
            seen = state(obj)
            if seen != last_state:
                last_state = seen
                progress(seen)
            if until(obj):
                return obj
            if why := fail(obj):
                raise ConditionFailed(f"{what}: {why}")
    except Unreachable as error:
        if last_state is None:
            raise
        away = f"; now: {error}"
    raise WaitTimeout(
        f"{what}: not done after {deadline_s:.0f} s; last state: {last_state}{away}",
        last_state=last_state or "never seen",
    )
