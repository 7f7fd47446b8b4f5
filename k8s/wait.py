"""Wait until, fail on, before a deadline, and say the last state."""

from collections.abc import Callable

from k8s.client import Client, Obj


def wait(
    client: Client,
    kind: str,
    name: str,
    *,
    until: Callable[[Obj | None], bool],
    fail: Callable[[Obj | None], str | None] = lambda _: None,
    deadline_s: float,
    state: Callable[[Obj | None], str],
    progress: Callable[[str], None] = lambda _: None,
    namespace: str | None = None,
) -> Obj | None:
    """Wait until `until(object)`; the object is None while it doesn't exist.

    All three callbacks are asked about the present object on each change and at least every
    2 s, so they may depend on time. Returns the object. Raises ConditionFailed with what `fail`
    returned, WaitTimeout after `deadline_s`.
    """
    raise NotImplementedError
