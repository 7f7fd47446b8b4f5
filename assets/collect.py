"""Job `collect`: weights that nothing needs any more leave the volume."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from assets.interrupts import undisturbed
from assets.promotion import Refused, give_back
from assets.resources import Cluster
from assets.stage import KNOWN, PromotionFailed
from catalog import ClusterSpec
from catalog.load import catalog
from k8s import collection, jobs
from k8s.client import Client, connect
from k8s.jobs import JobResult, run_job
from k8s.lease import Lease
from k8s.manifests import collect_job
from k8s.manifests.jobs import COLLECT, COLLECT_SECONDS
from k8s.manifests.release import PROMOTION
from weights.collect import policy
from weights.errors import UsageError

# Another collection, or a fetch that looks for one, may hold the Lease for a moment.
WAIT_S = 60.0


class CollectConfig(dg.Config):
    """What to remove. Weights in use stay in any case."""

    dry_run: bool = Field(default=True, description="Only say what would be removed.")
    older_than_days: float | None = Field(
        default=30.0, description="Remove what no promotion has used for so long; null: by space."
    )
    free: str | None = Field(
        default=None, description="Remove the oldest until so much is free: 500GiB, 500GB, bytes."
    )


@dg.op
def collect_weights(
    context: dg.OpExecutionContext, config: CollectConfig, cluster: Cluster
) -> None:
    """Ask the cluster what is in use, and let a Job in it remove the rest, by age and by space."""
    try:
        check(config)
        done, uses = run(context, config, catalog().cluster(cluster.name))
    except KNOWN as error:
        raise PromotionFailed(str(error)) from None
    rows = table(done.events, uses, dry_run=config.dry_run)
    result = {name: value for name, value in done.result.items() if name != "event"}
    say = context.log.warning if result["short_bytes"] else context.log.info
    say(summary(result))
    context.add_output_metadata(
        {
            "weights": dg.MetadataValue.table(rows, schema=SCHEMA),
            "not touched": dg.MetadataValue.json(foreign(done.events)),
            **{name: dg.MetadataValue.text(str(value)) for name, value in result.items()},
        }
    )


def check(config: CollectConfig) -> None:
    """Raise Refused for what the Job would refuse, before anything is asked of the cluster."""
    try:
        policy([], config.older_than_days, config.free)
    except UsageError as error:
        said = f"{error}; {error.next_step}"
        said = said.replace("--older-than", "older_than_days").replace("--free", "free")
        raise Refused(f"ops: collect_weights: config: {said}") from None


def run(
    context: dg.OpExecutionContext, config: CollectConfig, cluster: ClusterSpec
) -> tuple[JobResult, dict[str, str]]:
    """The Job's end, and what is in use. Raises Refused, KubernetesError; then nothing is removed,
    or whole commits are.
    """
    client = connect(cluster)
    lease = collection.lock(client, context.run_id, context.log.info, wait_s=WAIT_S)
    try:
        with lease:
            uses = collection.in_use(client)
            if not uses:
                raise Refused(
                    f"no weights are in use in namespace {cluster.namespace} of cluster "
                    f"{cluster.name}: nothing was promoted there, so nothing is known of what is "
                    "on its volume, and nothing is removed. Is it the right cluster?"
                )
            for commit, why in uses.items():
                context.log.info(f"keeps {commit}: {why}")
            return watched(client, lease, context, config, cluster, uses), uses
    finally:
        give_back(lease, context.log)


def watched(
    client: Client,
    lease: Lease,
    context: dg.OpExecutionContext,
    config: CollectConfig,
    cluster: ClusterSpec,
    uses: Mapping[str, str],
) -> JobResult:
    """See the Job through; it never outlives the run, which holds the Lease for it."""

    def on_event(event: dict[str, Any]) -> None:
        lease.check()
        if event["event"] == "progress":
            context.log.info(str(event["message"]))
        elif event["event"] == "warning":
            context.log.warning(str(event["message"]))

    job = collect_job(
        cluster,
        context.run_id,
        uses,
        older_than_days=config.older_than_days,
        free=config.free,
        dry_run=config.dry_run,
    )
    lease.check()
    try:
        return run_job(client, job, deadline_s=COLLECT_SECONDS + 300, on_event=on_event)
    except BaseException:
        with undisturbed(context.log.warning, "ending the Job"):
            jobs.end(client, {collection.COMPONENT: COLLECT, PROMOTION: context.run_id})
        raise


SCHEMA = dg.TableSchema(
    columns=[
        dg.TableColumn("repo"),
        dg.TableColumn("commit"),
        dg.TableColumn("MB", "float"),
        dg.TableColumn("last used"),
        dg.TableColumn("what"),
        dg.TableColumn("why"),
    ]
)


def table(
    events: Sequence[Mapping[str, Any]], uses: Mapping[str, str], *, dry_run: bool
) -> list[dg.TableRecord]:
    """A row for everything of this program on the volume: removed, or kept, and why."""
    removed = "would be removed" if dry_run else "removed"
    return [
        dg.TableRecord(
            {
                "repo": str(event["repo"]),
                "commit": str(event["commit"]),
                "MB": round(event["size_bytes"] / 1e6, 1),
                "last used": str(event["last_used"] or ""),
                "what": removed if event["removed"] else "kept",
                "why": str(event["why"])
                if event["removed"]
                else uses.get(event["commit"], str(event["why"])),
            }
        )
        for event in events
        if "removed" in event and "commit" in event
    ]


def foreign(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Folders that this program didn't make -> why it thinks so."""
    return {str(event["not_ours"]): str(event["why"]) for event in events if "not_ours" in event}


def summary(result: Mapping[str, Any]) -> str:
    """One line."""
    deed = "would be removed" if result["dry_run"] else "removed"
    text = (
        f"{result['removed']} {deed} ({result['bytes'] / 1e6:.0f} MB), {result['kept']} kept, "
        f"{result['foreign']} not touched; {result['free_bytes'] / 1e9:.1f} GB free"
    )
    if result["short_bytes"]:
        text += f", {result['short_bytes'] / 1e9:.1f} GB less than asked: the rest is in use"
    return text
