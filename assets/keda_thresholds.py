"""Stage: what KEDA scales the candidate by, and the proof that it would."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from assets.partitions import MODELS
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from assets.ttft_benchmark import Measured
from assets.vllm_deployment import Candidate
from k8s import keda
from k8s.client import Obj
from k8s.fence import pass_gate, require
from k8s.gpus import replicas_at_switch
from k8s.keda import AutoscalingNotProven, TriggerProof
from k8s.manifests import Release, Thresholds
from k8s.manifests.engine import NODE_AND_IMAGE_SECONDS
from k8s.wait import wait

CHECK = dg.AssetCheckSpec(
    "trigger",
    asset="keda_thresholds",
    blocking=True,
    description="KEDA's query has one fresh series that agrees with the Pods; the HPA works.",
)


@dataclass(frozen=True)
class Scaling:
    """Thresholds per replica, and what the trigger said."""

    thresholds: Thresholds
    proof: TriggerProof


@dg.asset(
    partitions_def=MODELS,
    group_name="promotion",
    kinds={"keda"},
    check_specs=[CHECK],
    config_schema=NO_CONFIG,
)
def keda_thresholds(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    vllm_deployment: Candidate,
    ttft_benchmark: Measured,
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[Scaling]]:
    """Turn the measured capacity and cold start into a threshold per replica, and try it.

    The candidate gets as many replicas as the live slot has now: it is about to take its load.
    """
    with stage(context, cluster, reports) as promotion:
        client, model = promotion.client, promotion.model
        require(client, model, promotion.id, ["weights", "smoke", "benchmark"])
        release = vllm_deployment.release(promotion)
        result = ttft_benchmark.result
        if result.in_flight_at_capacity is None:
            raise Refused(f"{model.name}: no rate passed, so no threshold follows: {result.reason}")
        thresholds = keda.thresholds(
            result.in_flight_at_capacity,
            result.capacity.estimate,
            vllm_deployment.rollout.seconds_to_ready,
            promotion.cluster,
            model,
        )
        replicas = replicas_at_switch(client, promotion.cluster, model, release.slot)
        facts: dict[str, Any] = {
            "model": model.name,
            "commit": release.commit,
            "requests in flight per replica": thresholds.in_flight,
            "requests waiting per replica": thresholds.waiting,
            "share of L* that is used": round(thresholds.headroom, 3),
            "lead time (s)": round(thresholds.lead_seconds, 1),
            "replicas at the switch": replicas,
        }
        scale(promotion, release, thresholds, replicas)
        try:
            proof = keda.prove_trigger(client, release, progress=promotion.say)
        except AutoscalingNotProven as error:
            yield dg.AssetCheckResult(
                check_name=CHECK.name, passed=False, description=str(error), metadata=facts
            )
            raise Refused(str(error)) from None
        summary = (
            f"{thresholds.in_flight} in flight per replica; query {proof.value:g} = Pods "
            f"{proof.pods_value:g}, {proof.age_seconds:.0f} s old"
        )
        yield dg.AssetCheckResult(
            check_name=CHECK.name,
            passed=True,
            description=summary,
            metadata=facts | {"proof": dg.MetadataValue.json(asdict(proof))},
        )
        pass_gate(
            client,
            release,
            "trigger",
            summary,
            template_hash=vllm_deployment.rollout.template_hash,
        )
        promotion.decided_by = summary
        yield dg.MaterializeResult(
            value=Scaling(thresholds, proof),
            metadata=facts | {"query": proof.query, "hpa": proof.hpa},
        )


def scale(promotion: Promotion, release: Release, thresholds: Thresholds, replicas: int) -> None:
    """Hand the candidate to KEDA with at least `replicas`, and wait until they are ready.

    Each may need a new node, the image and the weights. Raises Conflict, WaitTimeout.
    """
    keda.apply_scaled_object(promotion.client, release, thresholds, min_replicas=replicas)

    def ready(deployment: Obj | None) -> int:
        return int(((deployment or {}).get("status") or {}).get("readyReplicas") or 0)

    wait(
        promotion.client,
        "Deployment",
        release.name,
        until=lambda deployment: ready(deployment) >= replicas,
        deadline_s=release.startup_seconds + NODE_AND_IMAGE_SECONDS,
        state=lambda deployment: f"{ready(deployment)} of {replicas} replicas ready",
        progress=promotion.say,
    )
