"""Stage: users move to the candidate, and the record says what they get."""

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from assets.interrupts import undisturbed
from assets.keda_thresholds import Scaling
from assets.model_revision import Revision
from assets.model_weights import Weights
from assets.partitions import MODELS
from assets.promotion import LEASE_TTL_S, Promotion
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from assets.ttft_benchmark import Measured, write_report
from assets.vllm_deployment import Candidate
from k8s import keda, records, traffic
from k8s.fence import GATES, require
from k8s.manifests import Release, Thresholds
from k8s.records import PromotionRecord
from k8s.smoke import SmokeReport
from loadtests.compare import kept
from loadtests.result import Result


@dg.asset(
    partitions_def=MODELS, group_name="promotion", kinds={"kubernetes"}, config_schema=NO_CONFIG
)
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
        release = vllm_deployment.release(promotion)
        record = record_of(
            promotion,
            model_revision,
            model_weights,
            vllm_deployment,
            gpu_smoke_test,
            ttft_benchmark.result,
            keda_thresholds,
        )
        go_live(promotion, release, record, keda_thresholds.thresholds, GATES)
        folder = Path(ttft_benchmark.folder)
        with promotion.only_warns("Its report lacks the record"):
            write_report(folder, ttft_benchmark.result, record.model_dump(mode="json"))
        return dg.MaterializeResult(
            value=record,
            metadata={
                "model": record.spec.name,
                "commit": record.commit,
                "adapters": dg.MetadataValue.json({a.name: a.commit for a in record.adapters}),
                "slot": record.slot,
                "report": dg.MetadataValue.path(folder / "report.html"),
                "record": dg.MetadataValue.json(record.model_dump(mode="json")),
            },
        )


def record_of(
    promotion: Promotion,
    revision: Revision,
    weights: Weights,
    candidate: Candidate,
    smoke: SmokeReport,
    result: Result,
    scaling: Scaling,
) -> PromotionRecord:
    """What was promoted and the evidence for it, from what the stages gave."""
    rollout = candidate.rollout
    return PromotionRecord(
        promotion=promotion.id,
        cluster=promotion.cluster.name,
        slot=candidate.release(promotion).slot,
        at=now(),
        revision=revision.asked,
        commit=weights.commit,
        manifest_digest=weights.manifest_digest,
        weights_bytes=weights.bytes,
        adapters=weights.adapters,
        spec=promotion.model,
        image_digest=rollout.image_digest,
        template_hash=rollout.template_hash,
        startup_seconds=candidate.startup_seconds,
        seconds_to_ready=rollout.seconds_to_ready,
        node=rollout.node,
        gpus=[asdict(gpu) for gpu in smoke.gpus],
        smoke=smoke.summary(),
        benchmark=in_record(result),
        thresholds=scaling.thresholds,
        trigger=f"{scaling.proof.query} = {scaling.proof.value:g}",
        strategy=candidate.strategy,
        simulated=list(promotion.cluster.simulated),
        versions=result.versions | {"vllm": str(result.server.get("version"))},
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
        **kept(result),
        "itl_p95_ms": step and step.itl_ms.p95,
        "attainment": step and step.attainment,
        "in_flight_at_capacity": result.in_flight_at_capacity,
        "limited_by": result.limited_by,
        "shared_gpus": bool(result.profile.metadata.get("shared_gpus")),
    }


def go_live(
    promotion: Promotion,
    release: Release,
    record: PromotionRecord,
    thresholds: Thresholds,
    gates: Sequence[str],
) -> None:
    """Move users to the release if it has passed `gates`, then let the old slot finish and stop.

    The record is announced before: should this run be killed in between, the next one writes it.
    Once users have moved nothing is taken back any more, and what goes wrong only warns. Raises
    FenceError, KubernetesError before.
    """
    client, model = promotion.client, promotion.model
    old = traffic.live_slot(client, model)
    # A write that is tried for longer than the Lease lasts may land in another run.
    quick, check = client.within(LEASE_TTL_S / 3), promotion.lease.check
    with undisturbed(promotion.log.warning, "moving the traffic"):
        require(client, model, promotion.id, gates)
        records.announce(quick, record)
        traffic.switch(
            quick, model, promotion.cluster, release.slot, progress=promotion.say, check=check
        )
        promotion.live = release.name
        with promotion.only_warns("Its record is left to the next run"):
            records.write(quick, record)
            records.stamp(quick, record)
    promotion.decided_by = f"{release.name} is live with {release.commit[:12]}"
    promotion.log.info(promotion.decided_by)
    with promotion.only_warns(f"Ending {old} is left to the next run"):
        if old is not None and old != release.slot:
            drained = traffic.drain(client, model, old, progress=promotion.say, check=check)
            promotion.say(
                f"{model.name}-{old} drained in {drained.seconds:.1f} s, "
                f"{drained.running_at_end:g} requests left; it is the rollback's target"
            )
    with promotion.only_warns("Lowering its minimum of replicas is left to the next run"):
        check()
        least = release.model.scaling.min_replicas
        keda.apply_scaled_object(client, release, thresholds, min_replicas=least)
