"""From the catalog to the load, and from the result to what a person sees."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import JsonValue

from assets import ttft_benchmark as module
from assets.measured import shown
from assets.promoted_model import in_record
from assets.promotion import Promotion, Refused
from assets.rebenchmark import baseline, no_worse
from assets.ttft_benchmark import profile, write_report
from catalog.lengths import Lengths
from catalog.load import catalog
from catalog.model import Slo, Trace, Traffic
from k8s.errors import JobFailed
from k8s.gpus import Gpu
from k8s.manifests import Release
from k8s.manifests.scaling import EXAMPLE_THRESHOLDS
from k8s.records import PromotionRecord
from k8s.rollout import Rollout
from k8s.smoke import SmokeReport
from loadtests.ladder import longest_seconds
from loadtests.profile import Profile, ProfileError
from loadtests.result import (
    Capacity,
    Quantiles,
    Result,
    ResultError,
    Step,
    Verdict,
    pack_rows,
    rows_events,
)

ROLLOUT = Rollout("m-green", "m-green-x", "10.0.0.7", "node-1", "sha256:" + "1" * 64, "abc", 3.5)
SMOKE = SmokeReport(
    (Gpu(0, "NVIDIA-L4", "GPU-1", 23034, 1, "550.1"),), "550.1", 200, "m", "/models", (), 9, ()
)

SLO = Slo(ttft_p95_ms=500, itl_p95_ms=200, required_rate=4)
TRAFFIC = Traffic(prompt_tokens=Lengths(fixed=64), output_tokens=Lengths(fixed=16), rates=(4, 12))


def release(model: str = "smollm2-135m", **changes: Any) -> Release:
    spec = catalog().model(model).model_copy(update=changes)
    cluster = "lab" if model.startswith("smollm2") else "eks-example"  # one with GPUs for it
    return Release(spec, catalog().cluster(cluster), "c" * 40, "green", "run-1", 60)


def load(
    of: Release | None = None, rollout: Rollout = ROLLOUT, shared_gpus: bool = False
) -> Profile:
    return profile(of or release(), rollout, SMOKE, shared_gpus=shared_gpus)


def test_lengths_and_workers_reach_the_profile() -> None:
    lengths = Lengths.model_validate({"lognormal": {"median": 50, "p95": 200, "max": 900}})
    traffic = TRAFFIC.model_copy(update={"prompt_tokens": lengths, "workers": 4})
    found = load(release(traffic=traffic))
    assert (found.prompt_tokens, found.output_tokens.fixed, found.workers) == (lengths, 16, 4)
    traced = TRAFFIC.model_copy(
        update={"arrival": "trace", "trace": Trace(path="chat.jsonl", block_tokens=16)}
    )
    trace = load(release(traffic=traced)).trace
    assert trace is not None
    assert (trace.path, trace.block_tokens) == ("trace.jsonl", 16)
    # One process is no field of a profile: those that were recorded before must be equal.
    assert "workers" not in load().model_dump(exclude_none=True)


def step(rate: float, verdict: Verdict, ttft_p95: float | None) -> Step:
    quantiles = Quantiles(p50=100.0, p95=ttft_p95, p99=ttft_p95)
    return Step(
        rate_asked=rate,
        rate_achieved=rate,
        seconds=5.0,
        scheduled=60,
        failed=0 if ttft_p95 else 9,
        misses={},
        ttft_ms=quantiles,
        itl_ms=Quantiles(p50=20.0, p95=30.0, p99=40.0),
        chunk_gap_ms=Quantiles(p50=20.0, p95=30.0, p99=40.0),
        e2e_ms=quantiles,
        tokens_per_chunk=1.0,
        tokens_in_mean=64.0,
        tokens_out_mean=16.0,
        attainment=1.0 if verdict == "pass" else 0.4,
        attainment_low=0.3,
        attainment_high=1.0,
        in_flight_mean=rate * 0.5,
        server=None,
        send_lag_p99_ms=1.0,
        generator_cpu=0.1,
        reused_connections=0.0,
        repeats=1,
        discarded=(),
        verdict=verdict,
        reason="",
    )


def result(
    verdict: Verdict = "pass",
    *,
    lower: float = 8.0,
    upper: float | None = 12.0,
    ttft: float = 240.0,
) -> Result:
    return Result(
        verdict=verdict,
        reason=f"the SLO at 4 req/s: {verdict}",
        steps=(step(4.0, verdict, ttft), step(12.0, "fail", None)),
        capacity=Capacity(lower=lower, estimate=10.0, upper=upper, at_least=upper is None),
        in_flight_at_capacity=5.0,
        limited_by="the engine",
        profile=load(release(slo=SLO, traffic=TRAFFIC)),
        started_at="2026-01-01T00:00:00+00:00",
        seconds=30.0,
        server={"version": "0.30.0", "root": release().weights_path},
        network={},
        versions={"locust": "2.47"},
    )


@pytest.mark.parametrize("model", catalog().models)
def test_every_model_of_the_catalog_has_a_load(model: str) -> None:
    spec = catalog().model(model)
    made = load(release(model))
    assert made.model == spec.served_name
    assert made.slo.required_rate == spec.slo.required_rate
    assert made.simulated == release(model).cluster.simulated
    assert made.metadata["commit"] == "c" * 40
    fewest = sum(spec.traffic.step_seconds + spec.traffic.warmup_seconds for _ in made.ladder)
    assert fewest < longest_seconds(made) < 24 * 3600


def test_an_ipv6_pod_is_put_in_brackets() -> None:
    from dataclasses import replace

    assert load(rollout=replace(ROLLOUT, pod_ip="fd00::7")).base_url == "http://[fd00::7]:8000"


def test_what_no_benchmark_can_tell_names_the_catalog_file() -> None:
    traffic = catalog().model("smollm2-135m").traffic.model_copy(update={"timeout_seconds": 0.1})
    with pytest.raises(ProfileError, match=r"catalog/models/smollm2-135m.yaml.*timeout_s"):
        load(release(traffic=traffic))


def record(benchmark: dict[str, Any]) -> PromotionRecord:
    return PromotionRecord(
        promotion="run-0",
        cluster="lab",
        slot="blue",
        at="2026-01-01T00:00:00+00:00",
        revision="main",
        commit="c" * 40,
        manifest_digest="sha256:" + "2" * 64,
        weights_bytes=1,
        spec=release().model,
        image_digest=ROLLOUT.image_digest,
        template_hash="abc",
        startup_seconds=60,
        seconds_to_ready=3.5,
        node="node-1",
        gpus=[],
        smoke="",
        benchmark=benchmark,
        thresholds=EXAMPLE_THRESHOLDS,
        trigger="",
        strategy="blue_green",
        simulated=[],
    )


def test_a_rebenchmark_compares_with_the_promotion() -> None:
    promoted = record(in_record(result(lower=8.0)))
    no_worse(promoted, result(lower=8.0))
    with pytest.raises(Refused, match="carries less than at its promotion"):
        no_worse(promoted, result(lower=2.0, upper=4.0))
    other = result()
    other = other.model_copy(update={"profile": other.profile.model_copy(update={"seed": 9})})
    with pytest.raises(Refused, match="another load profile"):
        no_worse(promoted, other)


def test_a_baseline_whose_requests_failed_is_told_too() -> None:
    failed = result()
    steps = (step(4.0, "fail", None), *failed.steps[1:])
    before = in_record(failed.model_copy(update={"steps": steps}))
    told = "TTFT p95 infinite (failed requests), λ* between 8 and 12 req/s"
    assert told in baseline(record(before))


def test_a_baseline_says_at_least_only_where_no_rate_failed() -> None:
    assert "λ* at least 10 req/s" in baseline(record(in_record(result(upper=None))))


@pytest.mark.parametrize("kind", ["profile", "result"])
def test_a_job_of_another_version_is_told_as_that(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object, **__: object) -> object:
        if kind == "profile":
            said = "Job b: ProfileError: profile: mode: is no field. Next: Correct the profile."
            raise JobFailed(said, error="ProfileError")
        return SimpleNamespace(result={"format": 1}, events=[])

    monkeypatch.setattr(module, "run_job", ends)
    promotion = SimpleNamespace(client=SimpleNamespace(apply=lambda _: None), on_event=None)
    with pytest.raises(ResultError) as raised:
        module.measure(
            cast(Promotion, promotion), tmp_path, release(), ROLLOUT, SMOKE, shared_gpus=False
        )
    image = release().cluster.images.jobs
    said = "mode: is no field. This" if kind == "profile" else "has format 1, this program reads"
    for part in (said, image, "different versions", "images/jobs.Containerfile", "lab.yaml"):
        assert part in str(raised.value)
    assert "Correct the profile" not in str(raised.value)


@pytest.mark.parametrize(
    ("verdict", "root", "pod", "why"),
    [
        ("pass", None, {"phase": "Running", "podIP": ROLLOUT.pod_ip}, None),
        ("pass", "/models/other", {"phase": "Running", "podIP": ROLLOUT.pod_ip}, "/models/other"),
        ("fail", "/models/other", {"phase": "Running", "podIP": ROLLOUT.pod_ip}, "/models/other"),
        ("pass", None, {"phase": "Running", "podIP": "10.9.9.9"}, "isn't at that address any more"),
        ("pass", None, {"phase": "Failed", "podIP": ROLLOUT.pod_ip}, "isn't at that address"),
        ("pass", None, None, "isn't at that address any more"),
        ("invalid", None, None, None),
    ],
)
def test_only_the_candidate_itself_is_measured(
    verdict: Verdict,
    root: str | None,
    pod: dict[str, str] | None,
    why: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: dict[str, JsonValue] = {"root": root or release().weights_path}
    made = result(verdict).model_copy(update={"server": served})
    events = tuple(rows_events(pack_rows([])))
    ended = SimpleNamespace(result=made.model_dump(mode="json"), events=events)
    monkeypatch.setattr(module, "run_job", lambda *_, **__: ended)
    client = SimpleNamespace(apply=lambda _: None, find=lambda *_: {"status": pod} if pod else None)
    promotion = cast(
        Promotion,
        SimpleNamespace(client=client, on_event=None, id="run-1", cluster=release().cluster),
    )
    measured = partial(
        module.measure, promotion, tmp_path, release(), ROLLOUT, SMOKE, shared_gpus=False
    )
    if why is None:
        assert measured().verdict == verdict
        return
    with pytest.raises(Refused, match=why):
        measured()
    assert (tmp_path / "report.html").exists(), "to look at it"


@pytest.mark.parametrize(("shared", "shown_as"), [(True, "shared with others"), (False, "its own")])
def test_shared_gpus_stand_in_record_and_metadata(
    shared: bool, shown_as: str, tmp_path: Path
) -> None:
    made = result()
    made = made.model_copy(update={"profile": load(shared_gpus=shared)})
    row = {"rate": 6.0, "phase": "measure", "error": None}
    (tmp_path / "rows.jsonl.gz").write_bytes(pack_rows([row]))
    write_report(tmp_path, made, {})
    assert in_record(made)["shared_gpus"] is shared
    assert shown(made, tmp_path)["GPUs"] == shown_as
    assert "shared_gpus" in (tmp_path / "report.html").read_text()
