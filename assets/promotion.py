"""One run's hold on one model of a cluster, from its first stage until the run ends."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from assets.interrupts import undisturbed
from assets.unfinished import finish_move, live_promotion
from catalog import ClusterSpec, ModelSpec
from k8s import rollout, traffic
from k8s.client import Client, connect
from k8s.errors import KubernetesError
from k8s.lease import Lease
from k8s.manifests import slot_name

LEASE_TTL_S = 30.0
# How long the live model is tried to be brought back that made room: until then nobody answers.
BRING_BACK_S = 180.0
BRING_BACK_PAUSE_S = 5.0


class Refused(Exception):
    """A gate said no. The message says what was measured, what was wanted, and what to do."""


@dataclass
class Promotion:
    """A model, locked for this run. `id` is the run's; `log` that of the stage under way.

    `decided_by` is the number or sentence that decided the stage under way. `outage`: the live
    slot makes room for the candidate. `live`: the candidate's Deployment once users have moved
    to it, "" before. `cleared`: it was taken away. `bring_back_by`: until when what made room is
    tried to be brought back, on the monotonic clock; None before the first try.
    """

    client: Client
    cluster: ClusterSpec
    model: ModelSpec
    id: str
    lease: Lease
    log: logging.Logger
    decided_by: str = ""
    outage: bool = False
    live: str = ""
    cleared: bool = False
    bring_back_by: float | None = None

    @classmethod
    def begin(
        cls, cluster: ClusterSpec, model: ModelSpec, run_id: str, log: logging.Logger
    ) -> "Promotion":
        """Look whether a promotion can work here at all, lock the model for this run, and put
        right what killed runs left. Raises PoolError, KubernetesError.
        """
        cluster.pool(model)
        client = connect(cluster)
        rollout.preflight(client, cluster, model)
        lease = _lock(client, model, run_id, log)
        lease.__enter__()  # renewed between the stages too, until end()
        promotion = cls(client, cluster, model, run_id, lease, log)
        try:
            finish_move(client, cluster, model, promotion.say)
            rollout.reap(client, model, run_id, progress=promotion.say)
        except BaseException:
            promotion.end()
            raise
        return promotion

    def say(self, message: str) -> None:
        """Progress, for the log. Raises LeaseLost when the model is no longer locked for us."""
        self.lease.check()
        self.log.info(message)

    def on_event(self, event: dict[str, Any]) -> None:
        """An event of a program in a Job, for the log."""
        if event.get("event") == "progress":
            self.say(str(event["message"]))
        elif event.get("event") == "warning":
            self.log.warning(str(event["message"]))
        elif event.get("event") == "log" and str(event["message"]).strip():
            self.log.debug(str(event["message"]))

    @contextmanager
    def only_warns(self, of_what: str) -> Iterator[None]:
        """Users have moved: what goes wrong from now on is said, and undoes nothing."""
        try:
            yield
        except (KubernetesError, OSError) as error:
            self.log.warning(f"{self.live} is live. {of_what}: {error}")

    def clear_up(self, *, at_end: bool = False) -> None:
        """Take the candidate away, unless it is live, and bring back what made room for it.

        What fails is tried once more at the end of the run, and left to the next run then; before
        that an outage is fought for BRING_BACK_S.
        """
        if self.live or self.cleared:
            return
        with undisturbed(self.log.warning, "clearing up"):
            if self.bring_back_by is None:
                self.bring_back_by = time.monotonic() + (BRING_BACK_S if self.outage else 0.0)
            while not self._cleared_up(time.monotonic() >= self.bring_back_by, at_end):
                time.sleep(BRING_BACK_PAUSE_S)

    def _cleared_up(self, last: bool, at_end: bool) -> bool:
        """One try. True also when it failed and was the last one."""
        client, model = self.client, self.model
        try:
            rollout.abandon(client, model, self.id, progress=self.log.info)
            # A move that failed and could not be taken back has left users with the candidate.
            live = traffic.live_slot(client, model)
            if live is not None and live_promotion(client, model) == self.id:
                self.live = slot_name(model, live)
            else:
                self.cleared = True
        except KubernetesError as error:
            if not last:
                self.log.warning(f"{model.name} could not be brought back: {error} Tries again.")
                return False
            if not at_end:
                self.log.warning(
                    f"Not everything of this run could be cleared up yet: {error} "
                    "It is tried once more when the run ends."
                )
                return True
            self.log.error(
                f"Not everything of this run could be cleared up: {error} "
                f"The next promotion of {model.name} does it."
            )
        return True

    def end(self) -> None:
        """The run ends: clear up what it didn't finish, and give the lock back."""
        with undisturbed(self.log.warning, "the end of the run"):
            try:
                self.clear_up(at_end=True)
            finally:
                give_back(self.lease, self.log)


def give_back(lease: Lease, log: logging.Logger) -> None:
    """Releases it; where that fails, it only expires later, which is no reason to fail."""
    try:
        lease.release()
    except KubernetesError as error:
        log.warning(f"The Lease could not be given back: {error} It expires.")


def _lock(client: Client, model: ModelSpec, run_id: str, log: logging.Logger) -> Lease:
    """The Lease of the model. Raises LeaseHeld if another run is alive."""
    name = f"promotion-{model.object_name}"
    wait_s = LEASE_TTL_S + 5  # a killed run is silent for the ttl
    return Lease.acquire(
        client, name, run_id, ttl_s=LEASE_TTL_S, wait_s=wait_s, waiting=log.warning
    )
