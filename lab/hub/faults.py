"""Faults that the lab's hub shows on demand: for a repository, a path, a number of times."""

import threading
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

Where = Literal["api", "head", "get", "cas", "xorb"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and how often.

    `where`: "api" (resolve, tree, Xet token), "head" or "get" (of a file), "cas" or "xorb" (of the
    simulated Xet storage: what a file is made of, its bytes); None: all of them. `path` is a
    file's path (in Xet storage its hash) or a pattern; it matters for files alone. With `status`
    the hub answers that status, with `retry_after` (seconds) and `body` if given. `clock_off_s`:
    the time to try again is a date, by a clock that is so far ahead. Without `status` the file's
    content is damaged: `delay_s` before the first byte, `stall_after`/`cut_after` N bytes of the
    answer (silence, closed connection), `flip_byte` N of the file, `bytes_per_s` as a limit
    (until it is taken back).
    `redirect` sends the client to another base address; `no_range`: the whole file is sent,
    whatever part was asked for.
    """

    repo: str = "*"
    path: str = "*"
    where: Where | None = None
    times: int | None = None  # None: until it is taken back
    after: int = 0  # that many matching requests are answered well first
    status: int | None = None
    retry_after: str | None = None
    clock_off_s: float | None = None
    error_code: str | None = None
    body: str | None = None
    delay_s: float = 0.0
    stall_after: int | None = None
    cut_after: int | None = None
    flip_byte: int | None = None
    bytes_per_s: float | None = None
    redirect: str | None = None
    no_range: bool = False

    @classmethod
    def parse(cls, raw: Any) -> "Fault":
        """From JSON. Raises ValueError naming the unknown field."""
        if not isinstance(raw, dict):
            raise ValueError(f"a fault is a JSON object, not {raw!r}")
        known = {field.name for field in fields(cls)}
        for name in raw:
            if name not in known:
                raise ValueError(f"unknown field {name!r}; there are: {', '.join(sorted(known))}")
        return cls(**raw)


class Faults:
    """The faults in force. The first one that matches a request is shown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, list[int]]] = []  # with the number of matches so far

    def add(self, *faults: Fault) -> None:
        """Put faults in force, after those that are."""
        with self._lock:
            self._faults += [(fault, [0]) for fault in faults]

    def clear(self) -> None:
        """Take all faults back."""
        with self._lock:
            self._faults.clear()

    def holds(self, fault: Fault) -> bool:
        """Whether it is in force still."""
        with self._lock:
            return any(fault is known for known, _ in self._faults)

    def listing(self) -> list[dict[str, Any]]:
        """The faults in force, with how many requests matched each."""
        with self._lock:
            return [{**asdict(fault), "matched": seen[0]} for fault, seen in self._faults]

    def match(self, repo: str, path: str, where: Where) -> Fault | None:
        """The fault to show for this request; counts it."""
        with self._lock:
            for fault, seen in self._faults:
                if fault.where not in (None, where):
                    continue
                if not fnmatchcase(repo, fault.repo) or not fnmatchcase(path, fault.path):
                    continue
                spent = fault.times is not None and seen[0] >= fault.after + fault.times
                if spent:
                    continue
                seen[0] += 1
                if seen[0] > fault.after:
                    return fault
        return None
