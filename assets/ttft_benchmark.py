"""Stage: does the candidate keep its SLO under load, and how much load does it carry?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import ValidationError

from assets.measured import refusal, shown, verdict
from assets.partitions import MODELS
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import NO_CONFIG, stage
from assets.vllm_deployment import Candidate
from catalog import ClusterSpec
from catalog.load import trace_file
from k8s.client import Client
from k8s.errors import JobFailed
from k8s.fence import pass_gate, require
from k8s.jobs import run_job
from k8s.manifests import Release, benchmark_job, deployment
from k8s.manifests.release import PORT
from k8s.rollout import Rollout, still_has_address
from k8s.smoke import SmokeReport
from loadtests import picture, report
from loadtests.ladder import longest_seconds
from loadtests.profile import Profile, ProfileError, describe
from loadtests.result import Result, ResultError, parse_result, rows_from_events, unpack_rows

CHECK = dg.AssetCheckSpec(
    "slo",
    asset="ttft_benchmark",
    blocking=True,
    description="At the SLO's required rate: TTFT, inter-token latency and errors keep the SLO.",
)
JOB_START_S = 780  # for a node that has to come first, and to pull the image


@dataclass(frozen=True)
class Measured:
    """A benchmark's result, and the folder with its raw rows, picture and report."""

    result: Result
    folder: str


def profile(
    release: Release, rollout: Rollout, smoke: SmokeReport, *, shared_gpus: bool
) -> Profile:
    """The load for this candidate, from the catalog. Raises ProfileError."""
    model, traffic, slo = release.model, release.model.traffic, release.model.slo
    host = f"[{rollout.pod_ip}]" if ":" in rollout.pod_ip else rollout.pod_ip
    fields: dict[str, Any] = {
        "base_url": f"http://{host}:{PORT}",
        "model": model.served_name,
        "endpoint": "completions",
        "rates": traffic.rates,
        "mode": traffic.mode,
        "rate_range": traffic.rate_range,
        "budget_seconds": traffic.budget_seconds,
        "step_seconds": traffic.step_seconds,
        "warmup_seconds": traffic.warmup_seconds,
        "arrival": traffic.arrival,
        "gamma_shape": traffic.gamma_shape,
        "seed": traffic.seed,
        "prompt_tokens": traffic.prompt_tokens,
        "output_tokens": traffic.output_tokens,
        "slo": slo.model_dump(),
        "timeout_s": traffic.timeout_seconds,
        "workers": traffic.workers if traffic.workers > 1 else None,
        "trace": traffic.trace and {**traffic.trace.model_dump(), "path": "trace.jsonl"},
        "metadata": {
            "model": model.name,
            "repo": model.repo,
            "commit": release.commit,
            "adapters": {adapter.name: adapter.commit for adapter in release.adapters},
            "promotion": release.promotion,
            "cluster": release.cluster.name,
            "image_digest": rollout.image_digest,
            "args": deployment(release)["spec"]["template"]["spec"]["containers"][0]["args"],
            "node": rollout.node,
            "gpus": [gpu.product for gpu in smoke.gpus],
            "driver": smoke.driver,
            "shared_gpus": shared_gpus,
            "network": "from a Pod straight to the Pod",
            "simulated": list(release.cluster.simulated),
        },
    }
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        raise ProfileError(describe(error, f"catalog/models/{model.name}.yaml")) from None


def measure(
    promotion: Promotion,
    folder: Path,
    release: Release,
    rollout: Rollout,
    smoke: SmokeReport,
    *,
    shared_gpus: bool,
) -> Result:
    """Run the benchmark Job against this Pod. `folder` gets result, raw rows, picture, report.

    Raises ProfileError, KubernetesError, ResultError (the Job's program is of another version),
    Refused (something else was measured). A missed SLO is a result.
    """
    load = profile(release, rollout, smoke, shared_gpus=shared_gpus)
    deadline = round(JOB_START_S + longest_seconds(load))
    trace = trace_file(release.model).read_text("utf-8") if load.trace else ""
    config, job = benchmark_job(release, load.model_dump_json(), trace, deadline_s=deadline)
    promotion.client.apply(config)
    try:
        done = run_job(
            promotion.client, job, deadline_s=deadline + 60.0, on_event=promotion.on_event
        )
        result = parse_result(done.result)
    except (JobFailed, ResultError) as error:
        if isinstance(error, JobFailed) and error.error != ProfileError.__name__:
            raise
        raise ResultError(of_another_version(str(error), release.cluster)) from None
    (folder / "rows.jsonl.gz").write_bytes(rows_from_events(done.events))
    (folder / "result.json").write_text(result.model_dump_json(indent=1), encoding="utf-8")
    write_report(folder, result, {"promotion": promotion.id, "cluster": promotion.cluster.name})
    if result.verdict in ("pass", "fail"):  # else nothing is said of anybody
        require_measured(promotion.client, release, rollout, result)
    return result


def require_measured(client: Client, release: Release, rollout: Rollout, result: Result) -> None:
    """The load went to an address, which may be another Pod's by now. Raises Refused unless the
    candidate's Pod has it still, and what answered there serves the candidate's weights.
    """
    serves = result.server.get("root")
    if serves != release.weights_path:
        found = f"the engine there serves {serves}, and not {release.weights_path}"
    elif not still_has_address(client, rollout):
        found = f"Pod {rollout.pod} isn't at that address any more"
    else:
        return
    raise Refused(
        f"{release.model.name} at {release.commit[:12]} was not what was measured at "
        f"{rollout.pod_ip}: {found}. Was its Pod evicted, or its node taken away? Start the "
        "`promote` job again."
    )


def of_another_version(error: str, cluster: ClusterSpec) -> str:
    """What to do about a Job that doesn't read our profile, or whose result we don't read."""
    what = error.partition(". Next:")[0]
    return (
        f"{what}. This pipeline and the program in {cluster.images.jobs} don't fit together: they "
        "are of different versions. Build the Jobs' image of this one (images/jobs.Containerfile) "
        f"and name it as images.jobs in catalog/clusters/{cluster.name}.yaml; a lab has the image "
        "that it was started with."
    )


def write_report(folder: Path, result: Result, record: Mapping[str, Any]) -> None:
    """(Re)write ttft.png and report.html."""
    rows = unpack_rows((folder / "rows.jsonl.gz").read_bytes())
    (folder / "ttft.png").write_bytes(picture.ttft_against_rate(result))
    (folder / "report.html").write_text(report.html(result, record, rows), encoding="utf-8")


@dg.asset(
    partitions_def=MODELS,
    group_name="promotion",
    kinds={"locust"},
    check_specs=[CHECK],
    config_schema=NO_CONFIG,
)
def ttft_benchmark(
    context: dg.AssetExecutionContext,
    cluster: Cluster,
    reports: Reports,
    vllm_deployment: Candidate,
    gpu_smoke_test: SmokeReport,
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[Measured]]:
    """Offer the catalog's load to the candidate's Pod, from a Job in the cluster.

    No user's request goes there, and none of the load goes elsewhere. Without a verdict that can
    be trusted, nobody is promoted.
    """
    with stage(context, cluster, reports) as promotion:
        client, model = promotion.client, promotion.model
        require(client, model, promotion.id, ["weights", "smoke"])
        release, rollout = vllm_deployment.release(promotion), vllm_deployment.rollout
        folder = reports.of(promotion)
        result = measure(
            promotion,
            folder,
            release,
            rollout,
            gpu_smoke_test,
            shared_gpus=vllm_deployment.shared_gpus,
        )
        promotion.decided_by = verdict(result)
        metadata = {"model": model.name, "commit": release.commit, **shown(result, folder)}
        yield dg.AssetCheckResult(
            check_name=CHECK.name,
            passed=result.verdict == "pass",
            description=verdict(result),
            metadata=metadata,
        )
        if result.verdict != "pass":
            source = f"catalog/models/{model.name}.yaml"
            raise Refused(refusal(release, result, folder, source))
        pass_gate(
            client, release, "benchmark", verdict(result), template_hash=rollout.template_hash
        )
        yield dg.MaterializeResult(value=Measured(result, str(folder)), metadata=metadata)
