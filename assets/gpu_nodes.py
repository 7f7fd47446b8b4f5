"""Stage: does a node have GPUs for a candidate, and so, how does it come up?"""

from dataclasses import dataclass

import dagster as dg

from assets.partitions import MODELS
from assets.resources import Cluster, Reports
from assets.stage import stage
from k8s import records, rollout, traffic
from k8s.gpus import Strategy, choose_strategy, free_gpus


@dataclass(frozen=True)
class GpuPlan:
    """How the candidate comes up, and the count of GPUs that says so."""

    strategy: Strategy
    counted: str
    shared: bool


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
        if strategy == "recreate" and serving:
            context.log.warning(
                f"OUTAGE AHEAD: no spare GPU, so {model.name}-{live} is stopped while the "
                f"candidate is started and tested. If it is refused, {live} is started again."
            )
        current, _ = records.read(client, model)
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
