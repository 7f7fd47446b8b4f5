"""Run a program in the cluster as a Job: create or adopt, follow its events, judge its end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k8s.client import Client, Obj


@dataclass(frozen=True)
class JobResult:
    """`result` is the program's `result` event, `events` all its events but log lines.

    `exit_code` may be other than 0 (a benchmark whose SLO is missed): the program then gave a
    result all the same. `seconds` is how long the container ran.
    """

    result: Obj
    events: tuple[Obj, ...]
    pod: str
    node: str
    seconds: float
    exit_code: int
    adopted: bool


def run_job(
    client: Client,
    job: Obj,
    *,
    deadline_s: float,
    on_event: Callable[[Obj], None],
    unschedulable_s: float = 120.0,
) -> JobResult:
    """Create the Job, or adopt the one of the same name and content, and see it through.

    `on_event` gets each JSON event; other lines as {"event": "log", "message": line}.
    Raises JobFailed (program error, OOM, image, quota, Unschedulable), WaitTimeout. A Job that
    is still running is left alone, so that the next run can adopt it.
    """
    raise NotImplementedError


def delete_jobs(
    client: Client, labels: Mapping[str, str], *, deadline_s: float = 60.0
) -> list[str]:
    """Delete the Jobs with these labels and their Pods, and wait for it. Returns the names."""
    raise NotImplementedError
