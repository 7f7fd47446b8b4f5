"""Patience with a hub: wait as told, try again, notice that nothing comes, stop when asked."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from weights.errors import HubUnreachable, Interrupted, Place, Stalled, WeightsError
from weights.events import Reporter

T = TypeVar("T")

LOOK_SECONDS = 2.0  # how often it is looked whether anything comes
LONGEST_BACKOFF_S = 30.0
# A hub that tells us to wait longer than that in all is not going to serve this promotion.
LONGEST_TOLD_WAIT_S = 1800.0


@dataclass(frozen=True)
class Patience:
    """`stall_s`: give up after so long without a byte. `attempts` per request, the first waits
    `first_wait_s`, then twice as long each time, with jitter."""

    stall_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = 1.0


class Pace:
    """Shared by all threads of a fetch: when to wait, when the last byte came, when to stop."""

    def __init__(self, patience: Patience, reporter: Reporter) -> None:
        self.patience = patience
        self._reporter = reporter
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._hold_until = 0.0
        self._told_s = 0.0
        self._alive_at = time.monotonic()
        self._trouble: WeightsError | None = None

    @property
    def look_s(self) -> float:
        """Seconds between two checks."""
        return min(LOOK_SECONDS, self.patience.stall_s / 4)

    def stop(self) -> None:
        """Let the threads end at their next wait or request."""
        self._stop.set()

    def alive(self) -> None:
        """Something came or was done: the watchdog starts anew."""
        self._alive_at = time.monotonic()

    def check(self, place: Place, waiting_for: str, address: str) -> None:
        """Raise what is the matter if nothing has come from the Hub's `address` for `stall_s`,
        told waits not counted."""
        now = time.monotonic()
        silent = now - max(self._alive_at, self._hold_until)
        if silent < self.patience.stall_s:
            return
        if self._trouble is not None:
            raise self._trouble
        raise Stalled(
            f"no byte from the Hub for {silent:.0f} s while waiting for {waiting_for} of {place} "
            f"from {address}",
            "look at the network between the Job and HF_ENDPOINT (proxy, egress policy), then "
            "start again: finished files are kept",
            place=place,
        )

    def answer(self, ask: Callable[[], T], what: str, place: Place, address: str) -> T:
        """What `ask` returns, which asks for `what` of `place`; says that it waits for it.

        It asks in a thread, a daemon: the client can hang, and tries again in silence, for 24 s
        if there is no connection. Raises what `ask` raises, and as check() does.
        """
        asked: Future[T] = Future()

        def work() -> None:
            try:
                asked.set_result(ask())
            except BaseException as error:
                asked.set_exception(error)

        self.alive()
        threading.Thread(target=work, daemon=True).start()
        since, say_after_s = time.monotonic(), 0.0
        while not wait([asked], self.look_s).done:
            waited_s = time.monotonic() - since
            if waited_s >= say_after_s:
                self._reporter.progress(
                    f"waits for {what} of {place} from {address}, {waited_s:.0f} s so far"
                )
                say_after_s = 2 * waited_s
            self.check(place, what, address)
        return asked.result()

    def persist(
        self,
        action: Callable[[], T],
        understand: Callable[[Exception], WeightsError],
    ) -> T:
        """Do `action`; what may pass is tried again, the rest is raised as `understand` says."""
        failures = 0
        while True:
            self._turn()
            try:
                return action()
            except WeightsError:
                raise
            except Exception as error:
                if self._stop.is_set():
                    raise Interrupted("stopped", "start again") from error
                trouble = understand(error)
                if not trouble.transient:
                    raise trouble from error
                if trouble.wait_s is not None:
                    self._hold(trouble)
                    continue
                failures += 1
                if failures >= self.patience.attempts:
                    raise trouble from error
                self._back_off(trouble, failures)

    def _turn(self) -> None:
        """Wait until the Hub may be asked again."""
        while (left := self._hold_until - time.monotonic()) > 0:
            self._sleep(left)
        self._sleep(0)

    def _hold(self, trouble: WeightsError) -> None:
        """All threads wait as long as one of them was told. Raises `trouble` if that's too long."""
        wait = max(1.0, trouble.wait_s or 0.0)
        until = time.monotonic() + wait
        with self._lock:
            fresh = until - self._hold_until > 0.5
            if fresh:
                self._told_s += wait
            self._hold_until = max(self._hold_until, until)
        if self._told_s > LONGEST_TOLD_WAIT_S:
            raise trouble
        if fresh:
            self._reporter.progress(
                f"{trouble.waiting}, {wait:.0f} s: {trouble}", wait_s=round(wait, 1)
            )

    def _back_off(self, trouble: WeightsError, failures: int) -> None:
        wait = min(LONGEST_BACKOFF_S, self.patience.first_wait_s * 2 ** (failures - 1))
        wait *= random.uniform(0.75, 1.25)
        self._trouble = trouble
        if not isinstance(trouble, Stalled | HubUnreachable):
            self.alive()  # an answer, if a bad one
        self._reporter.progress(
            f"{trouble}; try {failures + 1} of {self.patience.attempts} in {wait:.1f} s"
        )
        self._sleep(wait)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Interrupted("stopped", "start again: finished files are kept")
