"""Logs of containers; following survives cut connections without losing or repeating a line."""

from collections.abc import Iterator

from k8s.client import Client


def follow(
    client: Client, pod: str, container: str, *, deadline_s: float, namespace: str | None = None
) -> Iterator[str]:
    """The lines of one run of the container, from its first, until it has ended.

    Waits for its start. Raises WaitTimeout after `deadline_s`, NotFound when the Pod is gone.
    """
    raise NotImplementedError


def tail(
    client: Client,
    pod: str,
    container: str,
    lines: int,
    *,
    previous: bool = False,
    namespace: str | None = None,
) -> list[str]:
    """The last lines; `previous`: of the run before the last restart. [] if there is no log."""
    raise NotImplementedError
