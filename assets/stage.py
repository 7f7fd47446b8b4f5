"""What every stage has around it: the run's lock on the model, and one clear end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from assets.promotion import Promotion, Refused
from assets.resources import Admission, Cluster, Context, NoPartition, Reports
from catalog import CatalogError, PoolError
from k8s.errors import KubernetesError
from loadtests.profile import ProfileError
from loadtests.result import ResultError

# Dagster takes any config for a stage that names none, and the run goes on without a word.
NO_CONFIG: dict[str, object] = {}
# Errors whose message says what, where and what to do. Anything else is a bug of ours, and is
# shown with its stack.
KNOWN = (
    Refused,
    NoPartition,
    CatalogError,
    PoolError,
    KubernetesError,
    ProfileError,
    ResultError,
)


class PromotionFailed(dg.Failure):
    """A failure that another try would not cure, told in one message."""

    def __init__(self, message: str) -> None:
        super().__init__(description=message, allow_retries=False)
        # Dagster prints an exception with its stack, twice, and the message drowns. Python's own
        # switch turns that off; the Cluster resource turns it on again when the run ends.
        sys.tracebacklimit = 0


@contextmanager
def stage(
    context: Context, cluster: Cluster, reports: Reports, admit: Admission | None = None
) -> Iterator[Promotion]:
    """Run a stage with the model locked for this run; put its end into stages.jsonl. `admit` is
    asked before that, and before the cluster is.

    Whatever ends it early, SIGINT and SIGTERM included, takes the candidate away. Raises
    PromotionFailed for what a message can tell, and what isn't known as it came.
    """
    name = context.op_def.name
    started = time.monotonic()
    promotion = None
    try:
        promotion = cluster.promotion(context, admit)
        promotion.decided_by = ""
        promotion.lease.check()
        yield promotion
    except (dg.RetryRequested, GeneratorExit):  # not the end of the run
        raise
    except BaseException as error:
        if promotion is not None:
            promotion.clear_up()
        outcome, message = _told(name, error, promotion)
        if promotion is not None:
            promotion.decided_by = promotion.decided_by or message.partition("\n")[0]
            reports.add_stage(promotion, name, outcome, time.monotonic() - started)
        if isinstance(error, Exception) and not isinstance(error, KNOWN):
            raise
        raise PromotionFailed(message) from None
    reports.add_stage(promotion, name, "passed", time.monotonic() - started)


def _told(name: str, error: BaseException, promotion: Promotion | None) -> tuple[str, str]:
    """The outcome in one word, and the message, which names a candidate that is live."""
    live = promotion.live if promotion else ""
    if isinstance(error, Exception):
        message = str(error) or repr(error)
        outcome = "refused" if isinstance(error, Refused) else "failed"
        return outcome, f"{message} {live} is live." if live else message
    if live:
        state = f"{live} is live, and the next run ends what was live before"
    elif promotion is not None and not promotion.cleared:
        state = "what it leaves is cleared up by the next run"
    else:
        state = "what was live before is live now"
    return "interrupted", f"{name} was interrupted; {state}."
