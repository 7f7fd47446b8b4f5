"""What is live is measured again every night, if someone turns this on."""

from collections.abc import Iterator

import dagster as dg

from assets.resources import Cluster
from catalog.load import catalog
from k8s import records
from k8s.client import connect
from k8s.errors import UnreadableRecord
from pipelines.jobs import rebenchmark


@dg.schedule(
    job=rebenchmark,
    cron_schedule="0 3 * * *",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Re-benchmarks every model that is live. Each needs a spare GPU meanwhile.",
)
def rebenchmark_nightly(
    context: dg.ScheduleEvaluationContext, cluster: Cluster
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run for each model with a record in the cluster."""
    spec = catalog().cluster(cluster.name)
    client = connect(spec)
    live, unreadable = [], []
    for name, model in catalog().models.items():
        try:
            if records.read(client, model)[0]:
                live.append(name)
        except UnreadableRecord as error:  # of this model: the others have their night
            context.log.error(f"{name} is left out: {error}")
            unreadable.append(str(error))
    if not live:
        yield dg.SkipReason(
            "; ".join(unreadable) or f"nothing has been promoted to cluster {spec.name} yet"
        )
    for name in live:
        yield dg.RunRequest(
            run_key=f"{name} {context.scheduled_execution_time:%Y-%m-%d}", partition_key=name
        )
