"""Job `rollback`: what was live before comes back."""

import dagster as dg

from assets.promoted_model import await_replicas, go_live, now
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import stage
from k8s import keda, records, rollout, traffic
from k8s.fence import pass_gate, require
from k8s.gpus import choose_strategy, free_gpus
from k8s.manifests import Release, Thresholds
from k8s.records import PromotionRecord
from k8s.smoke import smoke_test


@dg.op
def roll_back(context: dg.OpExecutionContext, cluster: Cluster, reports: Reports) -> None:
    """Bring the previous record's deployment, weights and autoscaling back, smoke-tested again.

    Its benchmark stands in its record and isn't repeated: a rollback must be quick. What was live
    becomes the previous one, so a second rollback undoes this one.
    """
    with stage(context, cluster, reports) as promotion:
        client = promotion.client
        record = previous_record(promotion)
        release = Release(
            record.spec,
            promotion.cluster,
            record.commit,
            traffic.idle_slot(client, promotion.model),
            promotion.id,
            record.startup_seconds,
        )
        live = traffic.live_slot(client, promotion.model)
        serving = traffic.ready_replicas(client, promotion.model, live) if live else 0
        budget = free_gpus(client, promotion.cluster, record.spec)
        strategy = choose_strategy(record.spec, budget, serving)
        if strategy == "recreate" and serving:
            context.log.warning(f"OUTAGE AHEAD: no spare GPU, so {live} is stopped first")
        ready = rollout.roll_out(client, release, strategy=strategy, progress=promotion.say)
        report = smoke_test(client, release, ready, progress=promotion.say)
        if not report.passed:
            raise Refused(
                f"the previous {record.spec.name} ({record.commit[:12]}) fails its smoke test now: "
                + "; ".join(report.failures)
            )
        pass_gate(client, release, "smoke", report.summary(), template_hash=ready.template_hash)
        thresholds = Thresholds(**record.thresholds)
        replicas = keda.candidate_min_replicas(client, record.spec, promotion.cluster)
        keda.apply_scaled_object(client, release, thresholds, min_replicas=replicas)
        await_replicas(promotion, release, replicas)
        require(client, promotion.model, promotion.id, ["weights", "smoke"])
        restored = record.model_copy(
            update={
                "promotion": promotion.id,
                "slot": release.slot,
                "at": now(),
                "image_digest": ready.image_digest,
                "template_hash": ready.template_hash,
                "seconds_to_ready": ready.seconds_to_ready,
                "node": ready.node,
                "smoke": report.summary(),
            }
        )
        go_live(promotion, release, restored, thresholds)
        # After the move: broken autoscaling must not keep users on a bad revision.
        keda.prove_trigger(client, release, progress=promotion.say)
        context.add_output_metadata(
            {"record": dg.MetadataValue.json(restored.model_dump(mode="json"))}
        )


def previous_record(promotion: Promotion) -> PromotionRecord:
    """What was live before. Raises Refused if there was nothing."""
    current, previous = records.read(promotion.client, promotion.model)
    if previous is None:
        raise Refused(
            f"{promotion.model.name} has no previous record in cluster {promotion.cluster.name}: "
            "there is nothing to go back to. Promote another revision instead."
        )
    if current is not None:
        for change in rollout.drift(promotion.client, promotion.cluster, current):
            promotion.log.warning(f"changed since its promotion: {change}")
    return previous
