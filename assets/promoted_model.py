"""Stage: users move to the candidate, and the record says what they get."""

import datetime
from dataclasses import asdict

import dagster as dg

from assets.interrupts import undisturbed
from assets.keda_thresholds import Scaling
from assets.model_revision import Revision
from assets.model_weights import Weights
from assets.partitions import MODELS
from assets.promotion import Promotion
from assets.resources import Cluster, Reports
from assets.stage import stage
from assets.ttft_benchmark import Measured, write_report
from assets.vllm_deployment import Candidate
from k8s import keda, records, traffic
from k8s.client import Obj
from k8s.fence import GATES, require
from k8s.manifests import Release, Slot, Thresholds
from k8s.records import PromotionRecord
from k8s.smoke import SmokeReport
from k8s.wait import wait
from loadtests.result import Result


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"kubernetes"})
def promoted_model(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    model_revision: Revision,
    model_weights: Weights,
    vllm_deployment: Candidate,
    gpu_smoke_test: SmokeReport,
    ttft_benchmark: Measured,
    keda_thresholds: Scaling,
) -> dg.MaterializeResult[PromotionRecord]:
    """Move the traffic, if every gate passed for just these Pods; then let the old slot go.

    The record is written with the switch. It holds all that a rollback needs.
    """
    with stage(context, cluster, reports) as promotion:
        require(promotion.client, promotion.model, promotion.id, GATES)
        release = vllm_deployment.release(promotion)
        rollout = vllm_deployment.rollout
        record = PromotionRecord(
            promotion=promotion.id,
            cluster=promotion.cluster.name,
            slot=release.slot,
            at=now(),
            revision=model_revision.asked,
            commit=model_weights.commit,
            manifest_digest=model_weights.manifest_digest,
            weights_bytes=model_weights.bytes,
            spec=promotion.model,
            image_digest=rollout.image_digest,
            template_hash=rollout.template_hash,
            startup_seconds=vllm_deployment.startup_seconds,
            seconds_to_ready=rollout.seconds_to_ready,
            node=rollout.node,
            gpus=[asdict(gpu) for gpu in gpu_smoke_test.gpus],
            smoke=gpu_smoke_test.summary(),
            benchmark=in_record(ttft_benchmark.result),
            thresholds=asdict(keda_thresholds.thresholds),
            trigger=f"{keda_thresholds.proof.query} = {keda_thresholds.proof.value:g}",
            strategy=vllm_deployment.strategy,
            simulated=list(promotion.cluster.simulated),
            versions=ttft_benchmark.result.versions,
        )
        await_replicas(promotion, release, keda_thresholds.min_replicas)
        go_live(promotion, release, record, keda_thresholds.thresholds)
        folder = reports.of(promotion)
        write_report(folder, ttft_benchmark.result, record.model_dump(mode="json"))
        return dg.MaterializeResult(
            value=record,
            metadata={
                "model": record.spec.name,
                "commit": record.commit,
                "slot": record.slot,
                "report": dg.MetadataValue.path(folder / "report.html"),
                "record": dg.MetadataValue.json(record.model_dump(mode="json")),
            },
        )


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def in_record(result: Result) -> dict[str, object]:
    """What the record keeps of a benchmark: the baseline of the next one."""
    step = result.step_at_required_rate()
    return {
        "verdict": result.verdict,
        "reason": result.reason,
        "required_rate": result.profile.slo.required_rate,
        "ttft_p95_ms": step and step.ttft_ms.p95,
        "itl_p95_ms": step and step.itl_ms.p95,
        "attainment": step and step.attainment,
        "capacity": result.capacity.model_dump(),
        "in_flight_at_capacity": result.in_flight_at_capacity,
        "limited_by": result.limited_by,
        "profile": result.profile.model_dump(mode="json", exclude={"metadata", "base_url"}),
    }


def await_replicas(promotion: Promotion, release: Release, replicas: int) -> None:
    """Wait until the candidate has the replicas that the present load needs."""

    def ready(deployment: Obj | None) -> int:
        return int(((deployment or {}).get("status") or {}).get("readyReplicas") or 0)

    wait(
        promotion.client,
        "Deployment",
        release.name,
        until=lambda deployment: ready(deployment) >= replicas,
        deadline_s=release.startup_seconds + 60.0,
        state=lambda deployment: f"{ready(deployment)} of {replicas} replicas ready",
        progress=promotion.say,
    )


def go_live(
    promotion: Promotion, release: Release, record: PromotionRecord, thresholds: Thresholds
) -> None:
    """Move users to the release, write its record, and let the old slot finish and stop.

    If the move fails, users go back to the old slot. Once record and traffic agree, nothing is
    taken back any more: an interrupt then leaves the old slot to the next run.
    """
    client, model, cluster = promotion.client, promotion.model, promotion.cluster
    old = traffic.live_slot(client, model)
    promotion.lease.check()
    with undisturbed(promotion.log.warning, "moving the traffic"):
        try:
            traffic.switch(client, model, cluster, release.slot, progress=promotion.say)
            records.write(client, record)
        except BaseException:
            _back(promotion, old, release.slot)
            raise
        promotion.finished = True
    promotion.decided_by = f"{release.name} is live with {release.commit[:12]}"
    promotion.say(promotion.decided_by)
    if old is not None and old != release.slot:
        drained = traffic.drain(client, model, old, progress=promotion.say)
        promotion.say(
            f"{model.name}-{old} drained in {drained.seconds:.1f} s, "
            f"{drained.running_at_end:g} requests left; it is the rollback's target"
        )
    keda.apply_scaled_object(client, release, thresholds, min_replicas=model.scaling.min_replicas)


def _back(promotion: Promotion, old: Slot | None, new: Slot) -> None:
    """Users go back to the old slot, if it can serve."""
    client, model = promotion.client, promotion.model
    if old is None or old == new or not traffic.ready_replicas(client, model, old):
        return
    promotion.log.warning(f"the move failed; users go back to {model.name}-{old}")
    traffic.switch(client, model, promotion.cluster, old)
