"""Stage: the weights, fetched, verified and published on the cluster's volume."""

import time
from dataclasses import asdict, dataclass

import dagster as dg

from assets.model_revision import Revision
from assets.partitions import MODELS
from assets.promotion import LEASE_TTL_S, Promotion, give_back
from assets.resources import Cluster, Reports
from assets.stage import stage
from k8s import collection, rollout
from k8s.client import Obj
from k8s.errors import JobFailed
from k8s.jobs import JobResult, await_end, run_job, running
from k8s.lease import Lease
from k8s.manifests import ServedAdapter, adapter_job, download_job
from k8s.manifests.release import PROMOTION, WEIGHTS

DEADLINE_S = 6.1 * 3600  # the Job's own is 6 h
RETRIES = 2
RETRY_AFTER_S = 15
# weights/ gave up on what may be over in a minute. It keeps what it has fetched.
TRANSIENT = {"HubFailed", "HubUnreachable", "RateLimited", "Stalled"}


@dataclass(frozen=True)
class Weights:
    """Published weights of one commit, and of the model's LoRA adapters.

    `hit`: all of it was there already, and was verified. `seconds`: that the Jobs ran.
    """

    commit: str
    path: str
    manifest_digest: str
    files: int
    bytes: int
    read_bytes_per_s: float
    hit: bool
    seconds: float
    adapters: tuple[ServedAdapter, ...] = ()


class WeightsConfig(dg.Config):
    """`rehash`: read every byte of what is on the volume already, whenever that was done last."""

    rehash: bool = False


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"huggingface"})
def model_weights(
    context: dg.AssetExecutionContext,
    config: WeightsConfig,
    cluster: Cluster,
    reports: Reports,
    model_revision: Revision,
) -> dg.MaterializeResult[Weights]:
    """Let a Job in the cluster put the commit's files onto the volume, each verified by its hash.

    A Hub that is away for a moment is asked again; no other stage is ever retried.
    """
    with stage(context, cluster, reports) as promotion:
        try:
            weights = fetch(promotion, model_revision, context.retry_number, rehash=config.rehash)
        except JobFailed as error:
            if error.error in TRANSIENT and context.retry_number < RETRIES:
                context.log.warning(f"{error} Tries again in {RETRY_AFTER_S} s.")
                raise dg.RetryRequested(RETRIES, RETRY_AFTER_S) from error
            raise
        adapters = "".join(
            f", adapter {adapter.name} (rank {adapter.rank}, {adapter.bytes / 1e6:.1f} MB)"
            for adapter in weights.adapters
        )
        promotion.decided_by = (
            f"{weights.files} files, {weights.bytes / 1e6:.0f} MB{adapters}, "
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
                "job seconds": round(weights.seconds, 1),
                "adapters": dg.MetadataValue.json([asdict(a) for a in weights.adapters]),
            },
        )


def fetch(
    promotion: Promotion, revision: Revision, attempt: int, *, rehash: bool = False
) -> Weights:
    """See to it that the weights and the adapters, which are compared with them, are published.

    A download that a killed run of this model left is ended if it is of other weights. Raises
    JobFailed, LeaseHeld, WaitTimeout.
    """
    model, cluster, run = promotion.model, promotion.cluster, promotion.id
    jobs = [download_job(model, cluster, revision.commit, run, attempt, rehash=rehash)]
    jobs += [
        adapter_job(
            model,
            cluster,
            adapter,
            revision.adapters[adapter.name],
            run,
            attempt,
            base=revision.commit,
            rehash=rehash,
        )
        for adapter in model.adapters
    ]
    wanted = [job["metadata"]["labels"][WEIGHTS] for job in jobs]
    for deed in rollout.end_downloads(promotion.client, model, run, wanted):
        promotion.say(deed)
    sources = [(model.repo, revision.commit)]
    sources += [(adapter.repo, revision.adapters[adapter.name]) for adapter in model.adapters]
    done = [_run(promotion, job, *source) for job, source in zip(jobs, sources, strict=True)]
    found, *others = [one.result for one in done]
    return Weights(
        commit=str(found["commit"]),
        path=str(found["path"]),
        manifest_digest=str(found["manifest_digest"]),
        files=int(found["files"]),
        bytes=int(found["bytes"]),
        read_bytes_per_s=float(found["read_bytes_per_s"]),
        hit=all(one.result["hit"] for one in done),
        seconds=sum(one.seconds for one in done),
        adapters=tuple(
            ServedAdapter(
                name=adapter.name,
                repo=adapter.repo,
                revision=adapter.revision,
                commit=str(fetched["commit"]),
                rank=int(fetched["rank"]),
                bytes=int(fetched["bytes"]),
                manifest_digest=str(fetched["manifest_digest"]),
            )
            for adapter, fetched in zip(model.adapters, others, strict=True)
        ),
    )


def _run(promotion: Promotion, job: Obj, repo: str, commit: str) -> JobResult:
    try:
        return only_writer(promotion, job)
    except JobFailed as error:
        if repo in str(error) and commit in str(error):
            raise
        # Killed, the program could not say what it was at.
        raise JobFailed(
            f"{repo}@{commit} was not fetched; finished files are kept: start the `promote` "
            f"job again. {error}",
            error=error.error,
        ) from error


def only_writer(promotion: Promotion, job: Obj) -> JobResult:
    """Run a download Job while no other promotion, of whatever model, fetches the same commit.

    Who waited finds the commit published. Two writers could spoil nothing, so a Lease that is
    lost on the way is no reason to stop: it only keeps bytes from being fetched twice. The Job of
    a run that was killed goes on without a Lease, and is waited for likewise.
    """
    client, weights = promotion.client, job["metadata"]["labels"][WEIGHTS]
    holder = f"{promotion.model.name}/{promotion.id}"
    lease = Lease.acquire(
        client,
        weights,
        holder,
        ttl_s=LEASE_TTL_S,
        wait_s=DEADLINE_S,
        waiting=promotion.say,
    )
    try:
        with lease:
            collection.await_none(client, holder, promotion.say)
            _await_orphans(promotion, job)
            return run_job(client, job, deadline_s=DEADLINE_S, on_event=promotion.on_event)
    finally:
        give_back(lease, promotion.log)


def _await_orphans(promotion: Promotion, job: Obj) -> None:
    """Wait for the downloads of the same commit that still run, though the Lease is ours."""
    weights, own = job["metadata"]["labels"][WEIGHTS], job["metadata"]["name"]
    deadline = time.monotonic() + DEADLINE_S
    for other in running(promotion.client, {WEIGHTS: weights}):
        meta = other["metadata"]
        if meta["name"] == own:  # run_job adopts it
            continue
        promotion.say(
            f"Job {meta['name']} of run {meta['labels'].get(PROMOTION)} fetches these weights, and "
            "nobody holds their Lease any more: waits for its end"
        )
        failure = await_end(
            promotion.client,
            other,
            deadline_s=deadline - time.monotonic(),
            on_event=promotion.on_event,
        )
        if failure:
            promotion.say(f"{failure} Fetches them itself.")
