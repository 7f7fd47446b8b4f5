"""Stage: the weights, fetched, verified and published on the cluster's volume."""

from dataclasses import dataclass

import dagster as dg

from assets.model_revision import Revision
from assets.partitions import MODELS
from assets.resources import Cluster, Reports
from assets.stage import stage
from k8s.errors import JobFailed
from k8s.jobs import run_job
from k8s.manifests import download_job

DEADLINE_S = 6.1 * 3600  # the Job's own is 6 h
RETRIES = 2
RETRY_AFTER_S = 15
# weights/ gave up on what may be over in a minute. It keeps what it has fetched.
TRANSIENT = {"HubFailed", "HubUnreachable", "RateLimited", "Stalled"}


@dataclass(frozen=True)
class Weights:
    """Published weights of one commit. `hit`: they were there already, and were verified."""

    commit: str
    path: str
    manifest_digest: str
    files: int
    bytes: int
    read_bytes_per_s: float
    hit: bool


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"huggingface"})
def model_weights(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    model_revision: Revision,
) -> dg.MaterializeResult[Weights]:
    """Let a Job in the cluster put the commit's files onto the volume, each verified by its hash.

    A Hub that is away for a moment is asked again; no other stage is ever retried.
    """
    with stage(context, cluster, reports) as promotion:
        job = download_job(
            promotion.model,
            promotion.cluster,
            model_revision.commit,
            promotion.id,
            attempt=context.retry_number,
        )
        try:
            done = run_job(
                promotion.client, job, deadline_s=DEADLINE_S, on_event=promotion.on_event
            )
        except JobFailed as error:
            if error.error in TRANSIENT and context.retry_number < RETRIES:
                context.log.warning(f"{error} Tries again in {RETRY_AFTER_S} s.")
                raise dg.RetryRequested(RETRIES, RETRY_AFTER_S) from error
            repo, commit = model_revision.repo, model_revision.commit
            if repo in str(error) and commit in str(error):
                raise
            # Killed, the program could not say what it was at.
            raise JobFailed(
                f"{repo}@{commit} was not fetched; finished files are kept: start the `promote` "
                f"job again. {error}",
                error=error.error,
            ) from error
        found = done.result
        weights = Weights(
            commit=str(found["commit"]),
            path=str(found["path"]),
            manifest_digest=str(found["manifest_digest"]),
            files=int(found["files"]),
            bytes=int(found["bytes"]),
            read_bytes_per_s=float(found["read_bytes_per_s"]),
            hit=bool(found["hit"]),
        )
        promotion.decided_by = (
            f"{weights.files} files, {weights.bytes / 1e6:.0f} MB, "
            f"{'were there' if weights.hit else 'fetched'} and verified"
        )
        return dg.MaterializeResult(
            value=weights,
            metadata={
                "commit": weights.commit,
                "path": weights.path,
                "manifest": weights.manifest_digest,
                "files": weights.files,
                "bytes": weights.bytes,
                "read MB/s": round(weights.read_bytes_per_s / 1e6, 1),
                "was there": weights.hit,
                "job seconds": round(done.seconds, 1),
            },
        )
