"""Job `rebenchmark`: does what is live still keep its SLO?"""

import dagster as dg

from assets.measured import milliseconds, refusal, shown, verdict
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from assets.ttft_benchmark import measure
from assets.unfinished import live_promotion
from catalog import ModelSpec
from k8s import records, rollout, traffic
from k8s.gpus import GpuBudget, free_gpus
from k8s.records import PromotionRecord
from k8s.smoke import smoke_test
from loadtests.compare import Comparison, compare, kept
from loadtests.result import Capacity, Result


@dg.op(config_schema=NO_CONFIG)
def rebenchmark_live(context: dg.OpExecutionContext, cluster: Cluster, reports: Reports) -> None:
    """Measure a copy of the live model in the other slot, and compare with its promotion.

    The live Pods get no load from it. Needs a spare GPU: a measurement is no reason for an outage.
    """
    with stage(context, cluster, reports) as promotion:
        record = live_record(promotion)
        release = record.release(
            promotion.cluster,
            slot=traffic.idle_slot(promotion.client, promotion.model),
            promotion=promotion.id,
        )
        budget = spare_gpus(promotion, record.spec)
        ready = rollout.roll_out(promotion.client, release, progress=promotion.say)
        smoke = smoke_test(promotion.client, release, ready, progress=promotion.say)
        if not smoke.passed:
            raise Refused(
                f"a fresh copy of what is live ({record.commit[:12]}) fails its smoke test: "
                + "; ".join(smoke.failures)
            )
        folder = reports.of(promotion)
        result = measure(promotion, folder, release, ready, smoke, shared_gpus=budget.shared)
        promotion.decided_by = verdict(result)
        context.log_event(
            dg.AssetObservation(
                "ttft_benchmark",
                partition=promotion.model.name,
                description=f"measured again: {verdict(result)}",
                metadata={
                    **shown(result, folder),
                    "at its promotion": dg.MetadataValue.json(record.benchmark),
                    "compared": compare(record.benchmark, kept(result)).sentence(),
                },
            )
        )
        if result.verdict != "pass":
            source = f"its promotion {record.promotion}, not the catalog's of today"
            raise Refused(refusal(release, result, folder, source))
        found = no_worse(record, result)
        promotion.say(
            f"{promotion.decided_by}; at its promotion {baseline(record)}; {found.sentence()}"
        )
        promotion.clear_up()


def live_record(promotion: Promotion) -> PromotionRecord:
    """The record of what is live. Raises Refused if there is none or it is of something else;
    warns of what was changed by hand since.
    """
    record, _ = records.read(promotion.client, promotion.model)
    if record is None:
        raise Refused(
            f"{promotion.model.name} has no record in cluster {promotion.cluster.name}: nothing "
            "was promoted there. Run the `promote` job first."
        )
    promoted = live_promotion(promotion.client, promotion.model)
    if promoted not in (None, record.promotion):
        raise Refused(
            f"{promotion.model.name} is live as promotion {promoted} brought it up, but its record "
            f"is of {record.promotion}: what it says isn't what users get. Run the `promote` job, "
            "which writes a new one."
        )
    for change in rollout.drift(promotion.client, promotion.cluster, record):
        promotion.log.warning(f"changed since its promotion: {change}")
    return record


def baseline(record: PromotionRecord) -> str:
    """The numbers of the promotion, as text."""
    before = record.benchmark
    found = Capacity.model_validate(before["capacity"])
    # Early records have no profile: there were only ladders then.
    mode = (before.get("profile") or {}).get("mode", "ladder")
    return f"TTFT p95 {milliseconds(before['ttft_p95_ms'])}, λ* {found.text(mode)}"


def spare_gpus(promotion: Promotion, model: ModelSpec) -> GpuBudget:
    """The free GPUs. Raises Refused if they don't do for one copy beside what is live."""
    budget = free_gpus(promotion.client, promotion.cluster, model)
    if budget.replicas(model.gpus.count) < 1:
        raise Refused(
            f"{model.name} is live and no GPU is spare to measure a copy: {budget.describe()}"
        )
    return budget


def no_worse(record: PromotionRecord, result: Result) -> Comparison:
    """Than at its promotion. Raises Refused when it is worse beyond both intervals.

    Only like is compared with like: another load profile gives no comparison, which is said.
    """
    found = compare(record.benchmark, kept(result))
    if found.differs:
        raise Refused(
            f"{record.spec.name} keeps its SLO, but was promoted with another load profile, so the "
            f"two can't be compared: {'; '.join(found.differs)}. Promote it again to get a new "
            "baseline."
        )
    if found.regressions:
        raise Refused(
            f"{record.spec.name} keeps its SLO but carries less than at its promotion, or "
            f"is slower: {found.sentence()}. Compare image, GPU and driver."
        )
    return found
