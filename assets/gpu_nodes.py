"""Stage, the admission: has a node GPUs for a candidate, and so, how does it come up?"""

import dagster as dg

from assets.partitions import MODELS
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from catalog import ClusterSpec, ModelSpec
from catalog.offered_load import fewest_requests
from k8s import gpus, records, rollout
from k8s.gpus import Plan
from k8s.manifests import slot_name
from k8s.records import PromotionRecord

# The live Pods' end, the benchmark's Pod, KEDA's first look at the candidate: as on the lab.
PODS_COME_AND_GO_S = 30.0


def refuse_placeholders(cluster: ClusterSpec, model: ModelSpec) -> None:
    """An image that is still an example's ends the promotion before the cluster is asked."""
    if problem := cluster.placeholder(model):
        raise Refused(problem)


def plan(promotion: Promotion, model: ModelSpec) -> Plan:
    """How a candidate comes up with the GPUs that are free now. An outage is announced.

    Asked again just before the rollout: GPUs come and go while weights are fetched. Raises NoGpus.
    """
    planned = gpus.plan(promotion.client, promotion.cluster, model)
    promotion.outage = planned.strategy == "recreate"
    if planned.live and planned.serving and promotion.outage:
        promotion.log.warning(
            f"OUTAGE AHEAD: no spare GPU, so {slot_name(model, planned.live)} is stopped while the "
            f"candidate is started and tested. If it is refused, {planned.live} is started again."
        )
    return planned


def outage_seconds(model: ModelSpec, current: PromotionRecord | None) -> float:
    """How long nobody answers with strategy `recreate`, if the candidate is good: the live Pods
    end, the candidate starts as the live one did, and is measured at every rate, or for as long as
    a search may take.
    """
    start = current.seconds_to_ready if current else float(model.rollout.start_seconds_min)
    if model.traffic.mode == "search":
        load = model.traffic.budget_seconds
    else:
        fewest = fewest_requests(model.slo.attainment)
        load = sum(
            max(model.traffic.step_seconds, fewest / rate) + model.traffic.warmup_seconds
            for rate in {*model.traffic.rates, model.slo.required_rate}
        )
    return start + model.rollout.soak_seconds + load + PODS_COME_AND_GO_S


@dg.asset(
    partitions_def=MODELS, group_name="promotion", kinds={"kubernetes"}, config_schema=NO_CONFIG
)
def gpu_nodes(
    context: dg.AssetExecutionContext, cluster: Cluster, reports: Reports
) -> dg.MaterializeResult[str]:
    """Count the free GPUs of the model's node pool, before anything is fetched or started.

    A spare GPU: the candidate comes up beside the live model. None: the live one makes room, with
    an outage that is stated here. Too few even so: the promotion ends here, as where an image is
    still an example's. What someone changed by hand on the live model since its promotion is named.
    The value says how the candidate would come up now.
    """
    with stage(context, cluster, reports, refuse_placeholders) as promotion:
        client, model = promotion.client, promotion.model
        current, _ = records.read(client, model)
        planned = plan(promotion, model)
        if planned.strategy == "recreate" and planned.serving:
            context.log.warning(
                f"If all goes well, nobody answers for about {outage_seconds(model, current):.0f} s"
            )
        drift = rollout.drift(client, promotion.cluster, current) if current else []
        for change in drift:
            context.log.warning(f"changed since the promotion of {model.name}: {change}")
        promotion.decided_by = f"{planned.strategy}: {planned.budget.describe()}"
        return dg.MaterializeResult(
            value=planned.strategy,
            metadata={
                "strategy": planned.strategy,
                "gpus": planned.budget.describe(),
                "live": planned.live or "nothing",
                "drift": dg.MetadataValue.json(drift),
            },
        )
