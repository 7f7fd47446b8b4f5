"""Job `rollback`: what was live before comes back."""

from dataclasses import asdict

import dagster as dg

from assets.gpu_nodes import plan
from assets.keda_thresholds import scale
from assets.promoted_model import go_live, now
from assets.promotion import Promotion, Refused
from assets.rebenchmark import live_record
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from k8s import keda, records, rollout, traffic
from k8s.fence import pass_gate
from k8s.gpus import replicas_at_switch
from k8s.records import PromotionRecord
from k8s.smoke import smoke_test


@dg.op(config_schema=NO_CONFIG)
def roll_back(context: dg.OpExecutionContext, cluster: Cluster, reports: Reports) -> None:
    """Bring the previous record's deployment, weights and autoscaling back, smoke-tested again.

    Its benchmark stands in its record and isn't repeated: a rollback must be quick. What was live
    becomes the previous one, so a second rollback undoes this one.
    """
    with stage(context, cluster, reports) as promotion:
        client = promotion.client
        record = previous_record(promotion)
        release = record.release(
            promotion.cluster,
            slot=traffic.idle_slot(client, promotion.model),
            promotion=promotion.id,
        )
        planned = plan(promotion, record.spec)
        ready = rollout.roll_out(client, release, strategy=planned.strategy, progress=promotion.say)
        report = smoke_test(client, release, ready, progress=promotion.say)
        if not report.passed:
            raise Refused(
                f"the previous {record.spec.name} ({record.commit[:12]}) fails its smoke test now: "
                + "; ".join(report.failures)
            )
        pass_gate(client, release, "smoke", report.summary(), template_hash=ready.template_hash)
        thresholds = record.thresholds
        replicas = replicas_at_switch(client, promotion.cluster, record.spec, release.slot)
        scale(promotion, release, thresholds, replicas)
        restored = record.model_copy(
            update={
                "promotion": promotion.id,
                "slot": release.slot,
                "at": now(),
                "image_digest": ready.image_digest,
                "template_hash": ready.template_hash,
                "seconds_to_ready": ready.seconds_to_ready,
                "node": ready.node,
                "gpus": [asdict(gpu) for gpu in report.gpus],
                "strategy": planned.strategy,
                "smoke": report.summary(),
            }
        )
        go_live(promotion, release, restored, thresholds, ["weights", "smoke"])
        # After the move: broken autoscaling must not keep users on a bad revision.
        with promotion.only_warns("It may not scale"):
            keda.prove_trigger(client, release, progress=promotion.say)
        context.add_output_metadata(
            {"record": dg.MetadataValue.json(restored.model_dump(mode="json"))}
        )


def previous_record(promotion: Promotion) -> PromotionRecord:
    """What was live before. Raises Refused if there was nothing, or only the same, or something
    else is live now than the record says.
    """
    live = live_record(promotion)
    _, previous = records.read(promotion.client, promotion.model)
    if previous is None:
        raise Refused(
            f"{promotion.model.name} has no previous record in cluster {promotion.cluster.name}: "
            "there is nothing to go back to. Promote another revision instead."
        )
    if previous.serves_as(live):
        raise Refused(
            f"the previous record of {promotion.model.name} in cluster {promotion.cluster.name} "
            f"is of what is live now ({live.commit[:12]}): a rollback would change nothing. "
            "Promote the revision that you want instead."
        )
    return previous
