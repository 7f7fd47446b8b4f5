"""A Lease: one promotion a model, one writer a weights folder."""

from types import TracebackType
from typing import Self

from k8s.client import Client


class Lease:
    """A held Lease. As a context manager it is renewed by a thread while the block runs.

    Leaving the block ends the renewal but doesn't give the Lease back: the next stage of the
    same run enters it again. `release()` gives it back.
    """

    lost: str | None  # why it is no longer ours

    @classmethod
    def acquire(
        cls, client: Client, name: str, holder: str, ttl_s: float = 30.0, wait_s: float = 0.0
    ) -> Self:
        """Take the Lease; re-entrant for the same holder.

        Waits up to `wait_s` for another holder to give it back, or to be silent for its ttl
        (so wait_s > ttl_s is needed to succeed a killed holder). Raises LeaseHeld.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Raises LeaseLost if someone else holds it or it wasn't renewed within the ttl."""
        raise NotImplementedError

    def release(self) -> None:
        """Give it back, if it is still ours. Never raises for a Lease that is already gone."""
        raise NotImplementedError
