"""Stage: does a node have GPUs for a candidate, and so, how does it come up?"""

from dataclasses import dataclass

import dagster as dg

from assets.partitions import MODELS
from assets.resources import Cluster, Reports
from assets.stage import stage
from catalog import ModelSpec
from k8s import records, rollout, traffic
from k8s.gpus import Strategy, choose_strategy, free_gpus
from k8s.records import PromotionRecord
from loadtests.verdict import fewest_requests

# The live Pods' end, the benchmark's Pod, KEDA's first look at the candidate: as on the lab.
PODS_COME_AND_GO_S = 30.0


@dataclass(frozen=True)
class GpuPlan:
    """How the candidate comes up, and the count of GPUs that says so."""

    strategy: Strategy
    counted: str
    shared: bool


def outage_seconds(model: ModelSpec, current: PromotionRecord | None) -> float:
    """How long nobody answers with strategy `recreate`, if the candidate is good: the live Pods
    end, the candidate starts as the live one did, and is measured at every rate.
    """
    start = current.seconds_to_ready if current else float(model.rollout.start_seconds_min)
    fewest = fewest_requests(model.slo.attainment)
    load = sum(
        max(model.traffic.step_seconds, fewest / rate) + model.traffic.warmup_seconds
        for rate in {*model.traffic.rates, model.slo.required_rate}
    )
    return start + model.rollout.soak_seconds + load + PODS_COME_AND_GO_S


@dg.asset(partitions_def=MODELS, group_name="promotion", kinds={"kubernetes"})
def gpu_nodes(
    context: dg.AssetExecutionContext, cluster: Cluster, reports: Reports
) -> dg.MaterializeResult[GpuPlan]:
    """Count the free GPUs of the model's node pool, before anything is fetched or started.

    A spare GPU: the candidate comes up beside the live model. None: the live one makes room, with
    an outage that is stated here. Too few even so: the promotion ends here. What someone changed
    by hand on the live model since its promotion is named.
    """
    with stage(context, cluster, reports) as promotion:
        client, model = promotion.client, promotion.model
        live = traffic.live_slot(client, model)
        serving = traffic.ready_replicas(client, model, live) if live else 0
        budget = free_gpus(client, promotion.cluster, model)
        strategy = choose_strategy(model, budget, serving)
        current, _ = records.read(client, model)
        if strategy == "recreate" and serving:
            context.log.warning(
                f"OUTAGE AHEAD of about {outage_seconds(model, current):.0f} s: no spare GPU, so "
                f"{model.name}-{live} is stopped while the candidate is started and tested. If it "
                f"is refused, {live} is started again."
            )
        drift = rollout.drift(client, promotion.cluster, current) if current else []
        for change in drift:
            context.log.warning(f"changed since the promotion of {model.name}: {change}")
        promotion.decided_by = f"{strategy}: {budget.describe()}"
        return dg.MaterializeResult(
            value=GpuPlan(strategy, budget.describe(), budget.shared),
            metadata={
                "strategy": strategy,
                "gpus": budget.describe(),
                "live": live or "nothing",
                "drift": dg.MetadataValue.json(drift),
            },
        )
