"""A Lease: one promotion a model, one writer a weights folder."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from k8s.client import Client, Obj
from k8s.errors import AlreadyExists, Conflict, KubernetesError, LeaseHeld, LeaseLost, NotFound

_POLL_S = 1.0
_REMIND_S = 60.0  # how often a wait is spoken of
_RELEASE_TRIES = 5


class Lease:
    """A held Lease. As a context manager it is renewed by a thread while the block runs.

    Leaving the block ends the renewal but doesn't give the Lease back: the next stage of the
    same run enters it again. `release()` gives it back.

    Clocks are never compared: another holder is dead when *we* have seen its renewTime unchanged
    for the time to live on our own monotonic clock. `succeeded` names such a holder, whose
    silence made the Lease ours.
    """

    def __init__(self, client: Client, name: str, holder: str, ttl_s: float) -> None:
        self.succeeded = ""
        self._taken_by_others: str | None = None
        # A renewal that hangs on a half-open connection must leave time for the next one.
        self._client = client.within(max(1.0, ttl_s / 3))
        self._name = name
        self._holder = holder
        self._ttl_s = ttl_s
        self._trouble = ""
        self._renewed = 0.0  # _awake_or_not() at which the last successful renewal was sent
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        client: Client,
        name: str,
        holder: str,
        ttl_s: float = 30.0,
        wait_s: float = 0.0,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Take the Lease; re-entrant for the same holder.

        Waits up to `wait_s` for another holder to give it back, or to be silent for its ttl
        (so wait_s > ttl_s is needed to succeed a killed holder). `waiting` is told who holds it
        and since when: at once, when that changes, and every minute. Raises LeaseHeld.
        """
        lease = cls(client, name, holder, ttl_s)
        deadline = time.monotonic() + wait_s
        observed: tuple[str, str] | None = None
        since = time.monotonic()
        told, told_at = "", 0.0
        while True:
            live = client.find("Lease", name)
            spec = (live or {}).get("spec") or {}
            other = spec.get("holderIdentity") or ""
            seen = (other, spec.get("renewTime") or "")
            if seen != observed:
                observed, since = seen, time.monotonic()
            ttl = max(ttl_s, float(spec.get("leaseDurationSeconds") or 0))
            silent_s = time.monotonic() - since
            if (other in ("", holder) or silent_s >= ttl) and lease._take(live):
                lease.succeeded = "" if other == holder else other
                return lease
            if time.monotonic() + _POLL_S > deadline:
                raise LeaseHeld(
                    f"Lease {client.namespace}/{name} is held by {other or 'someone else'} "
                    f"(last renewed {seen[1] or 'never'}). If that run is alive, wait for it or "
                    f"stop it; if it was killed, the Lease is free {ttl:.0f} s after. See it: "
                    f"kubectl -n {client.namespace} get lease {name} -o yaml",
                    holder=other,
                )
            says = (
                f"held by {other or 'someone else'} since {spec.get('acquireTime') or 'just now'}"
            )
            if says != told or time.monotonic() - told_at >= _REMIND_S:
                told, told_at = says, time.monotonic()
                left_s = deadline - told_at
                waiting(f"Lease {name} is {says}; waits for it, {left_s:.0f} s at most")
            time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._heartbeat, name=f"lease {self._name}", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # it may be in a request; it stops after that

    @property
    def lost(self) -> str | None:
        """Why it is not surely ours; None if it is.

        Not renewed for the ttl isn't final: as long as nobody has taken it, the next renewal
        makes it surely ours again.
        """
        if self._taken_by_others:
            return self._taken_by_others
        silent_s = _awake_or_not() - self._renewed
        if silent_s >= self._ttl_s:
            return f"not renewed for {silent_s:.0f} s ({self._trouble or 'no renewal is running'})"
        return None

    def check(self) -> None:
        """Raises LeaseLost if someone else holds it or it wasn't renewed within the ttl.

        Call it before each change that only the holder may make.
        """
        if lost := self.lost:
            raise LeaseLost(
                f"Lease {self._client.namespace}/{self._name} of {self._holder}: {lost}. "
                "Nothing more is changed; start the run again."
            )

    def release(self) -> None:
        """Give it back, if it is still ours. Never raises for a Lease that is already gone.

        Raises Conflict if others keep changing it: then it expires.
        """
        self.__exit__(None, None, None)
        for tries_left in reversed(range(_RELEASE_TRIES)):
            live = self._client.find("Lease", self._name)
            if live is None or (live.get("spec") or {}).get("holderIdentity") != self._holder:
                return
            live["spec"] = {**live["spec"], "holderIdentity": "", "renewTime": _now()}
            try:
                self._client.replace(live)
                return
            except (Conflict, NotFound):  # a last heartbeat came between
                if not tries_left:
                    raise

    def _take(self, live: Obj | None) -> bool:
        """Make it ours as it was seen; False if it has changed since."""
        sent = _awake_or_not()
        spec = dict((live or {}).get("spec") or {})
        if spec.get("holderIdentity") != self._holder:
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + bool(live)
            spec["acquireTime"] = _now()
        spec["holderIdentity"] = self._holder
        spec["leaseDurationSeconds"] = max(1, round(self._ttl_s))
        spec["renewTime"] = _now()
        try:
            if live is None:
                self._client.create(
                    {
                        "apiVersion": "coordination.k8s.io/v1",
                        "kind": "Lease",
                        "metadata": {
                            "name": self._name,
                            "labels": {
                                "app.kubernetes.io/name": "vllm-promotion",
                                "app.kubernetes.io/managed-by": "vllm-promotion-pipeline",
                            },
                        },
                        "spec": spec,
                    }
                )
            else:
                self._client.replace({**live, "spec": spec})
        except (AlreadyExists, Conflict, NotFound):
            return False
        self._renewed = sent
        return True

    def _heartbeat(self) -> None:
        pause_s = self._ttl_s / 3
        while not self._stop.wait(pause_s):
            try:
                self._renew()
                pause_s = self._ttl_s / 3
            except KubernetesError as error:
                self._trouble = str(error)
                pause_s = min(1.0, self._ttl_s / 10)

    def _renew(self) -> None:
        """Once. Raises KubernetesError if it can't be told whether it is ours."""
        live = self._client.find("Lease", self._name)
        holder = ((live or {}).get("spec") or {}).get("holderIdentity")
        if live is None or holder != self._holder:
            self._taken_by_others = f"held by {holder}" if holder else "released by someone else"
        elif not self._take(live):
            raise Conflict("others keep changing it")


def _awake_or_not() -> float:
    """Seconds on a clock that never jumps and, where there is one, goes on while a laptop sleeps:
    others see our silence then, and take the Lease.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _now() -> str:
    """MicroTime: RFC 3339 with six digits."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
