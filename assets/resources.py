"""Dagster's thin resources: the cluster that is promoted to, and the folder with the reports."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import dagster as dg
from pydantic import PrivateAttr

from assets.promotion import Promotion, Refused
from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog

Context: TypeAlias = dg.AssetExecutionContext | dg.OpExecutionContext
# Raises Refused for what the catalog alone rules out.
Admission: TypeAlias = Callable[[ClusterSpec, ModelSpec], None]

RETRY_NUMBER = "dagster/retry_number"  # Dagster's tag of a run that it tries again as a whole


class NoPartition(Exception):
    """The run doesn't say which model; the message has the command that does."""


class Cluster(dg.ConfigurableResource["Cluster"]):
    """The cluster of that name in the catalog. Nothing is asked of it before the first stage.

    One run has one Promotion of it. In-process execution keeps it across the stages, and ends it
    here, whatever ended the run: a failure, an interrupt between two stages, the last stage.
    """

    name: str
    _promotion: Promotion | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["Cluster"]:
        """Dagster's life cycle of a resource: one a run."""
        try:
            yield self
        finally:
            promotion, self._promotion = self._promotion, None
            if promotion is not None:
                promotion.log = context.log or promotion.log
                promotion.end()
            # assets/stage.py sets it for messages that need no stack.
            if hasattr(sys, "tracebacklimit"):
                del sys.tracebacklimit

    def promotion(self, context: Context, admit: Admission | None = None) -> Promotion:
        """This run's Promotion, begun by its first stage. Raises CatalogError, NoPartition,
        PoolError, KubernetesError, Refused by `admit`, and Refused for a run that Dagster tries
        again by itself.
        """
        if self._promotion is None:
            # The jobs' tag forbids it; runs of single assets have no job, so no tag.
            if RETRY_NUMBER in context.run.tags:
                raise Refused(
                    "Dagster has tried this run again by itself (run_retries in dagster.yaml), and "
                    "what was refused isn't better the second time. Start the `promote` job."
                )
            name = context.run.tags.get("dagster/partition")
            if name is None:
                raise NoPartition(
                    f'which model? Add --tags \'{{"dagster/partition": "<model>"}}\'; the catalog '
                    f"has: {', '.join(catalog().models)}"
                )
            model, cluster = catalog().model(name), catalog().cluster(self.name)
            self._promotion = begin(context, cluster, model, admit)
        self._promotion.log = context.log
        return self._promotion


def begin(
    context: Context, cluster: ClusterSpec, model: ModelSpec, admit: Admission | None
) -> Promotion:
    """This run's Promotion. A run that was killed, whose Lease it has taken over, is told to
    Dagster as failed: nothing else would, and it would count as started for ever.
    """
    if admit is not None:
        admit(cluster, model)
    promotion = Promotion.begin(cluster, model, context.run.run_id, context.log)
    instance, killed = context.instance, promotion.lease.succeeded
    run = instance.get_run_by_id(killed) if killed else None
    if run is not None and not run.is_finished:
        instance.report_run_failed(
            run,
            f"Its process no longer renewed the Lease of {model.name}: it was killed, or is cut "
            f"off from the cluster, where it can change nothing any more. Run {context.run.run_id} "
            "has taken over, and cleared up what it left.",
        )
        context.log.warning(f"Run {killed} was killed: it is marked as failed.")
    return promotion


class Reports(dg.ConfigurableResource["Reports"]):
    """`folder`/<model>/<run id>/ has all that a run leaves to look at."""

    folder: str

    def of(self, promotion: Promotion) -> Path:
        """The folder of this run. It exists."""
        path = Path(self.folder) / promotion.model.name / promotion.id
        path.mkdir(parents=True, exist_ok=True)
        return path

    def add_stage(self, promotion: Promotion, stage: str, outcome: str, seconds: float) -> None:
        """Append a line to stages.jsonl: what `make demo` prints as a table."""
        line = {
            "stage": stage,
            "seconds": round(seconds, 2),
            "outcome": outcome,
            "decided_by": promotion.decided_by,
        }
        try:
            with (self.of(promotion) / "stages.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # no reason to end a promotion, or to hide what ended it
            promotion.log.warning(f"stages.jsonl lacks {line}: {error}")

    def add_failure(self, failure: dict[str, str | None]) -> None:
        """Append a failed run to failures.jsonl."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with (Path(self.folder) / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(failure) + "\n")


def reports_folder() -> str:
    """$DAGSTER_HOME/reports, or .promotions/reports here where Dagster keeps nothing."""
    return str(Path(os.environ.get("DAGSTER_HOME") or ".promotions").absolute() / "reports")
