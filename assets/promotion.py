"""One run's hold on one model of a cluster, from its first stage until the run ends."""

import logging
from dataclasses import dataclass
from typing import Any

from assets.interrupts import undisturbed
from catalog import ClusterSpec, ModelSpec
from k8s import rollout
from k8s.client import Client, connect
from k8s.errors import KubernetesError, LeaseHeld
from k8s.lease import Lease

LEASE_TTL_S = 30.0


class Refused(Exception):
    """A gate said no. The message says what was measured, what was wanted, and what to do."""


@dataclass
class Promotion:
    """A model, locked for this run. `id` is the run's; `log` that of the stage under way.

    `decided_by` is the number or sentence that decided the stage under way. `finished`: nothing
    is left to clear up, for the candidate is live or was taken away.
    """

    client: Client
    cluster: ClusterSpec
    model: ModelSpec
    id: str
    lease: Lease
    log: logging.Logger
    decided_by: str = ""
    finished: bool = False

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
        elif event.get("event") == "log" and str(event["message"]).strip():
            self.log.debug(str(event["message"]))

    def clear_up(self) -> None:
        """Take the candidate away, unless it is live. What fails is left to the next run."""
        if self.finished:
            return
        self.finished = True
        with undisturbed(self.log.warning, "clearing up"):
            try:
                rollout.abandon(self.client, self.model, self.id, progress=self.log.info)
            except KubernetesError as error:
                self.log.error(
                    f"Not everything of this run could be cleared up: {error} "
                    f"The next promotion of {self.model.name} does it."
                )

    def end(self) -> None:
        """The run ends: clear up what it didn't finish, and give the lock back."""
        self.clear_up()
        with undisturbed(self.log.warning, "giving the Lease back"):
            try:
                self.lease.release()
            except KubernetesError as error:
                self.log.error(f"The Lease could not be given back: {error} It expires by itself.")


def _lock(client: Client, model: ModelSpec, run_id: str, log: logging.Logger) -> Lease:
    """The Lease of the model. Raises LeaseHeld if another run is alive."""
    name = f"promotion-{model.object_name}"
    try:
        return Lease.acquire(client, name, run_id, ttl_s=LEASE_TTL_S)
    except LeaseHeld as error:
        wait_s = LEASE_TTL_S + 5  # a killed run is silent for the ttl
        log.warning(f"{model.name} is locked by run {error.holder}; waits {wait_s:.0f} s for it")
    return Lease.acquire(client, name, run_id, ttl_s=LEASE_TTL_S, wait_s=wait_s)
