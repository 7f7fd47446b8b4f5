"""Stage: a candidate with these weights comes up, where no user reaches it."""

from dataclasses import dataclass

import dagster as dg

from assets.gpu_nodes import plan
from assets.model_weights import Weights
from assets.partitions import MODELS
from assets.promotion import Promotion
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from catalog.model import RolloutPolicy
from k8s import traffic
from k8s.gpus import Strategy
from k8s.manifests import Release, ServedAdapter, Slot
from k8s.rollout import Rollout, roll_out

# A volume may be slower than it was when the weights were verified, and loading is not all.
READ_MARGIN = 3.0


@dataclass(frozen=True)
class Candidate:
    """A candidate that is ready, in which slot, and how it came up.

    `shared_gpus`: others may use its GPU at the same time, which makes a benchmark less certain.
    """

    slot: Slot
    commit: str
    strategy: Strategy
    shared_gpus: bool
    startup_seconds: int
    rollout: Rollout
    adapters: tuple[ServedAdapter, ...] = ()

    def release(self, promotion: Promotion) -> Release:
        """What was rolled out, for k8s/."""
        return Release(
            promotion.model,
            promotion.cluster,
            self.commit,
            self.slot,
            promotion.id,
            self.startup_seconds,
            self.adapters,
        )


def startup_seconds(policy: RolloutPolicy, size: int, read_bytes_per_s: float) -> int:
    """How long the engine may take to start: the bytes at the throughput that was measured, with
    a margin, within the catalog's bounds.
    """
    seconds = READ_MARGIN * size / max(read_bytes_per_s, 1.0)
    return round(min(max(seconds, policy.start_seconds_min), policy.start_seconds_max))


@dg.asset(
    partitions_def=MODELS, group_name="promotion", kinds={"kubernetes"}, config_schema=NO_CONFIG
)
def vllm_deployment(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    model_weights: Weights,
) -> dg.MaterializeResult[Candidate]:
    """Roll the candidate out into the slot that is not live, and wait until it stays ready.

    Users stay with the live slot. With strategy `recreate` that one makes room first.
    """
    with stage(context, cluster, reports) as promotion:
        size = model_weights.bytes + sum(adapter.bytes for adapter in model_weights.adapters)
        budget = startup_seconds(promotion.model.rollout, size, model_weights.read_bytes_per_s)
        slot = traffic.idle_slot(promotion.client, promotion.model)
        release = Release(
            promotion.model,
            promotion.cluster,
            model_weights.commit,
            slot,
            promotion.id,
            budget,
            model_weights.adapters,
        )
        planned = plan(promotion, promotion.model)
        ready = roll_out(
            promotion.client, release, strategy=planned.strategy, progress=promotion.say
        )
        promotion.decided_by = f"{release.name} ready after {ready.seconds_to_ready:.1f} s"
        return dg.MaterializeResult(
            value=Candidate(
                slot,
                model_weights.commit,
                planned.strategy,
                planned.budget.shared,
                budget,
                ready,
                model_weights.adapters,
            ),
            metadata={
                "deployment": ready.deployment,
                "strategy": planned.strategy,
                "pod": ready.pod,
                "node": ready.node,
                "image": ready.image_digest,
                "pod template": ready.template_hash,
                "seconds to ready": round(ready.seconds_to_ready, 2),
                "start-up budget (s)": budget,
                "simulated": ", ".join(promotion.cluster.simulated) or "nothing",
            },
        )
