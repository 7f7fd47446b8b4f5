"""Stage: what KEDA scales the candidate by, and the proof that it would."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from assets.partitions import MODELS
from assets.promotion import Refused
from assets.resources import Cluster, Reports
from assets.stage import stage
from assets.ttft_benchmark import Measured
from assets.vllm_deployment import Candidate
from k8s import keda
from k8s.fence import pass_gate, require
from k8s.keda import AutoscalingNotProven, TriggerProof
from k8s.manifests import Thresholds

CHECK = dg.AssetCheckSpec(
    "trigger",
    asset="keda_thresholds",
    blocking=True,
    description="KEDA's query has one fresh series that agrees with the Pods; the HPA works.",
)


@dataclass(frozen=True)
class Scaling:
    """Thresholds per replica, the replicas that take over, and what the trigger said."""

    thresholds: Thresholds
    min_replicas: int
    proof: TriggerProof


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"keda"}, check_specs=[CHECK])
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
        replicas = keda.candidate_min_replicas(client, model, promotion.cluster)
        keda.apply_scaled_object(client, release, thresholds, min_replicas=replicas)
        facts: dict[str, Any] = {
            "model": model.name,
            "commit": release.commit,
            "requests in flight per replica": thresholds.in_flight,
            "requests waiting per replica": thresholds.waiting,
            "headroom": round(thresholds.headroom, 3),
            "lead time (s)": round(thresholds.lead_seconds, 1),
            "replicas at the switch": replicas,
        }
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
            value=Scaling(thresholds, replicas, proof),
            metadata=facts | {"query": proof.query, "hpa": proof.hpa},
        )
