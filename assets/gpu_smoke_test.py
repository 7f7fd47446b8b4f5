"""Stage: does the candidate run on the GPU that it should, and does it talk sense?"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.partitions import MODELS
from assets.promotion import Refused
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from assets.vllm_deployment import Candidate
from k8s.fence import pass_gate, require
from k8s.smoke import SmokeReport, smoke_test

CHECK = dg.AssetCheckSpec(
    "smoke",
    asset="gpu_smoke_test",
    blocking=True,
    description="GPU, health, model name, known answers and moving token counters are right.",
)


def shown(report: SmokeReport) -> dict[str, Any]:
    """The report as metadata: GPUs, driver, each known prompt with its answer, what failed."""
    answers = [
        {"prompt": answer.prompt, "expected": answer.expect, "given": answer.text}
        for answer in report.answers
    ]
    return {
        "gpus": dg.MetadataValue.json([f"{gpu.product} {gpu.uuid}" for gpu in report.gpus]),
        "driver": report.driver,
        "answers": dg.MetadataValue.json(answers),
        "failures": dg.MetadataValue.json(list(report.failures)),
    }


@dg.asset(
    partitions_def=MODELS,
    group_name="promotion",
    kinds={"vllm"},
    check_specs=[CHECK],
    config_schema=NO_CONFIG,
)
def gpu_smoke_test(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    vllm_deployment: Candidate,
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[SmokeReport]]:
    """Ask the candidate's own Pod: nvidia-smi, /health, /v1/models, known answers, counters.

    A healthy server that talks nonsense fails here.
    """
    with stage(context, cluster, reports) as promotion:
        client, model = promotion.client, promotion.model
        require(client, model, promotion.id, ["weights"])
        release = vllm_deployment.release(promotion)
        report = smoke_test(client, release, vllm_deployment.rollout, progress=promotion.say)
        facts = {"model": model.name, "commit": release.commit, **shown(report)}
        yield dg.AssetCheckResult(
            check_name=CHECK.name,
            passed=report.passed,
            description=report.summary(),
            metadata=facts,
        )
        if not report.passed:
            raise Refused(
                f"{model.name} at {release.commit[:12]} fails its smoke test: "
                + "; ".join(report.failures)
            )
        pass_gate(
            client,
            release,
            "smoke",
            report.summary(),
            template_hash=vllm_deployment.rollout.template_hash,
        )
        promotion.decided_by = report.summary()
        yield dg.MaterializeResult(value=report, metadata=facts)
