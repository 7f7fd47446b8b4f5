"""Pass, fail, inconclusive or invalid, and the capacity that follows."""

import pytest

from catalog.offered_load import fewest_requests
from loadtests.answer import Row
from loadtests.engine import Sample
from loadtests.intervals import quantile, wilson
from loadtests.result import Step
from loadtests.verdict import (
    capacity,
    in_flight_at,
    judge,
    limited_by,
    overall,
    prefix_hits,
    restarted,
    untrusted,
    why_again,
)
from tests.loadtests.samples import MS, make_profile, make_row, make_window, steady

PROFILE = make_profile()
SLO = PROFILE.slo


def test_wilson_bounds() -> None:
    # n/(n + z²) when all are good, its mirror when none is, symmetric at one half.
    assert wilson(52, 52) == pytest.approx((52 / (52 + 1.645**2), 1.0))
    assert wilson(0, 52) == pytest.approx((0.0, 1.645**2 / (52 + 1.645**2)))
    low, high = wilson(50, 100)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert low == pytest.approx(0.4187, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("attainment", [0.5, 0.9, 0.95, 0.99])
def test_fewest_requests_just_suffice(attainment: float) -> None:
    n = fewest_requests(attainment)
    assert wilson(n, n)[0] >= attainment
    assert wilson(n - 1, n - 1)[0] < attainment


def test_quantile_interpolates_and_knows_infinity() -> None:
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([], 0.5) is None
    assert quantile([1, 2, 3, float("inf")], 0.5) == 2.5
    assert quantile([1, 2, 3, float("inf")], 0.95) is None


def test_all_good_passes() -> None:
    step = judge([steady(4, 60)], PROFILE, ())
    assert (step.verdict, step.attainment, step.failed) == ("pass", 1.0, 0)
    assert step.ttft_ms.p95 == pytest.approx(100)
    assert step.itl_ms.p95 == pytest.approx(20)
    assert step.rate_achieved == pytest.approx(4)
    # Each is in flight for 160 ms, less 0.1 ms lag: Little's law.
    assert step.in_flight_mean == pytest.approx(4 * 0.1599, rel=0.01)


def test_few_good_ones_are_inconclusive() -> None:
    step = judge([steady(4, 20)], PROFILE, ())
    assert step.verdict == "inconclusive"
    assert "too few requests" in step.reason


def test_more_windows_are_pooled() -> None:
    step = judge([steady(4, 30), steady(4, 30)], PROFILE, ())
    assert (step.verdict, step.scheduled, step.repeats) == ("pass", 60, 2)


def test_slow_first_tokens_fail() -> None:
    step = judge([steady(4, 60, ttft_ms=501)], PROFILE, ())
    assert step.verdict == "fail"
    assert "TTFT p95 501 ms, SLO 500 ms" in step.reason


def test_slow_gaps_fail() -> None:
    step = judge([steady(4, 60, gap_ms=101)], PROFILE, ())
    assert step.verdict == "fail"
    assert "ITL p95 101 ms, SLO 100 ms" in step.reason


def test_failed_requests_miss_and_are_never_dropped_from_the_quantiles() -> None:
    rows = [
        make_row(i * 250, error="error_event" if i % 10 == 0 else None, ttft_ms=100)
        for i in range(100)
    ]
    step = judge([make_window(4, rows)], PROFILE, ())
    assert step.verdict == "fail"
    assert "10 of 100 requests failed: error_event 10" in step.reason
    assert (step.failed, step.misses, step.attainment) == (10, {"error_event": 10}, 0.9)
    assert step.ttft_ms.p50 == pytest.approx(100)
    assert step.ttft_ms.p95 is None


def test_error_rate_of_the_slo_is_allowed() -> None:
    rows = [make_row(i * 250, error="timeout" if i == 7 else None) for i in range(200)]
    window = make_window(4, rows)
    assert judge([window], PROFILE, ()).verdict == "fail"
    assert judge([window], make_profile(slo={"error_rate": 0.01}), ()).verdict == "pass"


TWO = make_profile(models={"m": 9, "adapter": 1})


def mixed(ttft_ms: float) -> list[Row]:
    """600 requests of which each fiftieth is for the adapter, which takes `ttft_ms`."""
    return [
        make_row(i * 250, model="adapter", ttft_ms=ttft_ms) if i % 50 == 0 else make_row(i * 250)
        for i in range(600)
    ]


def test_each_model_has_a_verdict() -> None:
    step = judge([make_window(4, mixed(100))], TWO, ())
    assert (step.verdict, step.models["m"].verdict) == ("pass", "pass")
    # 12 are too few for a pass of its own, but no fail.
    assert step.models["adapter"].verdict == "inconclusive"
    assert {name: part.scheduled for name, part in step.models.items()} == {"adapter": 12, "m": 588}
    assert judge([steady(4, 60)], PROFILE, ()).models == {}


def test_a_model_that_fails_is_not_hidden_by_the_others() -> None:
    window = make_window(4, mixed(501))
    assert judge([window], PROFILE, ()).verdict == "pass"
    step = judge([window], TWO, ())
    assert (step.verdict, step.attainment) == ("fail", 0.98)
    assert step.reason.startswith("adapter: 0 of 12 requests met the SLO")
    assert step.models["m"].verdict == "pass"


def test_growing_ttft_is_no_pass() -> None:
    rows = [make_row(i * 250, ttft_ms=100 + 5 * i) for i in range(60)]
    step = judge([make_window(4, rows)], PROFILE, ())
    assert step.verdict == "invalid"
    assert "not steady: TTFT grew by 295 ms" in step.reason


def test_noise_is_steady() -> None:
    rows = [make_row(i * 250, ttft_ms=100 + 60 * (i * 7919 % 13) / 13) for i in range(60)]
    assert judge([make_window(4, rows)], PROFILE, ()).verdict == "pass"


def test_warm_up_does_not_count() -> None:
    rows = [make_row(-i * 250, ttft_ms=9000, phase="warmup") for i in range(20)]
    rows += [make_row(i * 250) for i in range(60)]
    step = judge([make_window(4, rows)], PROFILE, ())
    assert (step.verdict, step.scheduled) == ("pass", 60)


def test_generator_that_lagged_is_not_trusted() -> None:
    rows = [make_row(i * 250, lag_ms=11 if i % 20 == 0 else 0) for i in range(60)]
    window = make_window(4, rows)
    assert "send lag p99 11.0 ms, at most 10.0" in untrusted(window, PROFILE)
    assert untrusted(window, make_profile(slo={"ttft_p95_ms": 1000})) == ""
    step = judge([window], PROFILE, ["it lagged"])
    assert (step.verdict, step.discarded) == ("invalid", ("it lagged",))


def test_lag_below_five_ms_is_always_allowed() -> None:
    fast = make_profile(slo={"ttft_p95_ms": 20})
    assert untrusted(steady(4, 60, ttft_ms=10, lag_ms=4.9), fast) == ""
    assert "at most 5.0" in untrusted(steady(4, 60, ttft_ms=10, lag_ms=5.1), fast)


def test_rate_that_was_not_reached_is_not_trusted() -> None:
    # The last request left 2 % of the window late; its lag alone is below the p99.
    rows = [make_row(i * 2.5) for i in range(999)] + [make_row(2497.5, lag_ms=60)]
    assert "sent 391" in untrusted(make_window(400, rows), PROFILE)


def test_busy_generator_is_not_trusted() -> None:
    window = make_window(4, [make_row(i * 250) for i in range(60)], cpu=0.81)
    assert "81% of its core" in untrusted(window, PROFILE)


def test_wrong_number_of_tokens_is_not_trusted() -> None:
    assert "ignore_eos" in untrusted(steady(4, 60, tokens=3), PROFILE)


def steps(*outcomes: tuple[float, str]) -> list[Step]:
    windows = {
        "pass": lambda rate: steady(rate, 60),
        "fail": lambda rate: steady(rate, 60, ttft_ms=900),
        "inconclusive": lambda rate: steady(rate, 20),
        "invalid": lambda rate: steady(rate, 60, lag_ms=90),
    }
    judged = [judge([windows[verdict](rate)], PROFILE, ()) for rate, verdict in outcomes]
    assert [step.verdict for step in judged] == [verdict for _, verdict in outcomes]
    return judged


def test_capacity_between_pass_and_fail() -> None:
    rates = capacity(steps((4, "pass"), (8, "pass"), (16, "fail")), SLO)
    # Attainment falls from 1 to 0 over 8 req/s, and 0.95 is wanted.
    assert (rates.lower, rates.upper) == (8, 16)
    assert rates.estimate == pytest.approx(8.4)
    assert not rates.at_least


def test_a_step_without_a_verdict_between_them_is_told() -> None:
    rates = capacity(steps((4, "pass"), (8, "inconclusive"), (16, "fail")), SLO)
    assert (rates.lower, rates.upper) == (4, 16)
    [warning] = rates.warnings
    assert warning.startswith("8 req/s, which λ* may be above or below, was inconclusive")
    assert capacity(steps((4, "pass"), (8, "pass"), (16, "fail")), SLO).warnings == ()


def test_why_a_rate_is_offered_again() -> None:
    lagged, few, well = steady(4, 60, lag_ms=90), steady(4, 5), steady(4, 200)
    assert why_again([lagged], PROFILE).startswith(
        "the window before doesn't count: the generator lagged: send lag p99 90.0 ms"
    )
    assert why_again([lagged, few], PROFILE).startswith("so far 5 of 5 requests met the SLO")
    assert "isn't known well enough" in why_again([well], PROFILE)


def test_capacity_is_at_least_the_highest_that_passed() -> None:
    rates = capacity(steps((4, "pass"), (8, "pass"), (16, "inconclusive")), SLO)
    assert (rates.lower, rates.estimate, rates.upper, rates.at_least) == (8, 8, None, True)


def test_a_pass_above_a_fail_does_not_count() -> None:
    rates = capacity(steps((4, "pass"), (8, "fail"), (16, "pass")), SLO)
    assert (rates.lower, rates.upper) == (4, 8)


def test_no_pass_no_capacity() -> None:
    rates = capacity(steps((4, "fail")), SLO)
    assert (rates.lower, rates.estimate, rates.upper, rates.at_least) == (0, 0, 4, False)
    assert in_flight_at(rates, steps((4, "fail"))) is None


def test_in_flight_at_capacity_by_littles_law() -> None:
    judged = steps((4, "pass"), (8, "pass"), (16, "fail"))
    rates = capacity(judged, SLO)
    assert in_flight_at(rates, judged) == pytest.approx(8.4 * 0.1599, rel=0.01)


def test_gate_is_the_required_rate() -> None:
    assert overall(steps((4, "pass"), (8, "fail")), PROFILE, "")[0] == "pass"
    assert overall(steps((2, "pass"), (4, "fail")), PROFILE, "")[0] == "fail"
    assert overall(steps((4, "inconclusive"), (8, "fail")), PROFILE, "")[0] == "inconclusive"
    assert (
        overall(
            steps(
                (4, "invalid"),
            ),
            PROFILE,
            "",
        )[0]
        == "invalid"
    )
    assert (
        overall(
            steps(
                (2, "pass"),
            ),
            PROFILE,
            "",
        )[0]
        == "invalid"
    )


def test_a_pass_over_a_fail_is_doubtful() -> None:
    verdict, reason = overall(steps((2, "fail"), (4, "pass")), PROFILE, "")
    assert verdict == "inconclusive"
    assert "2 req/s failed" in reason


def test_a_spoiled_run_has_no_verdict() -> None:
    assert overall(steps((4, "pass")), PROFILE, "cache") == ("invalid", "cache")


def sample(second: float, **values: float) -> Sample:
    return Sample(int(second * 1e9), {f"vllm:{name}": value for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"kv_cache_usage_perc": 0.99, "num_requests_waiting": 9.0}, "KV cache: 99%"),
        ({"num_requests_running": 8.0, "num_requests_waiting": 9.0}, "batch slots: 8 run"),
        ({"num_requests_running": 8.0, "num_requests_waiting": 0.0}, "compute: 8.0 run"),
        ({}, "unknown"),
    ],
)
def test_resource_that_ran_out(values: dict[str, float], name: str) -> None:
    rows = [make_row(i * 250, ttft_ms=900) for i in range(60)]
    samples = tuple(sample(second, **values) for second in range(10))
    step = judge([make_window(4, rows, samples=samples)], PROFILE, ())
    assert limited_by([step]).startswith(name)


def test_what_ran_out_first_is_seen_where_the_first_step_failed() -> None:
    rows = [make_row(i * 250, ttft_ms=900) for i in range(60)]
    first, later = (
        judge([make_window(rate, rows, samples=tuple(samples))], PROFILE, ())
        for rate, samples in (
            (4, [sample(s, num_requests_running=8.0, num_requests_waiting=9.0) for s in range(10)]),
            (8, [sample(s, kv_cache_usage_perc=0.99) for s in range(10)]),
        )
    )
    assert limited_by([first, later]).startswith("batch slots")


def test_nothing_ran_out_where_all_passed() -> None:
    assert limited_by(steps((4, "pass"))) == "nothing within the rates tried"


def test_engine_metrics_are_those_of_the_window() -> None:
    samples = tuple(
        sample(second, num_requests_running=float(second), num_preemptions_total=10.0 + second)
        for second in range(-5, 30)
    )
    rows = [make_row(i * 250) for i in range(40)]
    load = judge([make_window(4, rows, samples=samples)], PROFILE, ()).server
    assert load is not None
    assert (load.samples, load.running_max, load.running_mean) == (11, 10, 5)
    assert load.preemptions == 10


def test_prefix_cache_hits_spoil_the_run() -> None:
    before = sample(0, prefix_cache_queries_total=1000.0, prefix_cache_hits_total=500.0)
    few = sample(9, prefix_cache_queries_total=11_000.0, prefix_cache_hits_total=590.0)
    many = sample(9, prefix_cache_queries_total=11_000.0, prefix_cache_hits_total=4500.0)
    assert prefix_hits(before, few, 0, 100) == ""
    assert "40% of the prompt tokens" in prefix_hits(before, many, 0, 100)
    # 40 tokens of template in each of 100 requests may hit.
    assert prefix_hits(before, many, 40, 100) == ""


@pytest.mark.parametrize("metric", ["prefix_cache_queries_total", "prefix_cache_hits_total"])
def test_without_the_prefix_metrics_the_run_is_spoiled(metric: str) -> None:
    counts = {"prefix_cache_queries_total": 0.0, "prefix_cache_hits_total": 0.0}
    whole = sample(0, **counts)
    less = sample(9, **{name: count for name, count in counts.items() if name != metric})
    assert prefix_hits(whole, whole, 0, 100) == ""
    assert f"no vllm:{metric} of this model" in prefix_hits(whole, less, 0, 100)
    assert f"no vllm:{metric} of this model" in prefix_hits(less, whole, 0, 100)


def test_restart_shows_in_the_counters() -> None:
    def counts(*values: float) -> list[Sample]:
        return [sample(i, generation_tokens_total=value) for i, value in enumerate(values)]

    assert not restarted(counts(1, 5, 5, 9))
    assert restarted(counts(1, 5, 2, 9))


def test_time_is_integrated_over_the_window_only() -> None:
    # In flight from before the window to its middle.
    rows = [make_row(-1000, ttft_ms=3000, gap_ms=0, phase="warmup")]
    rows += [make_row(3999, ttft_ms=1, gap_ms=0) for _ in range(16)]
    window = make_window(4, rows)
    assert window.end == 4000 * MS
    step = judge([window], make_profile(), ())
    assert step.in_flight_mean == pytest.approx(0.5, abs=0.01)


def test_a_run_without_any_step_is_invalid() -> None:
    verdict, why = overall([], make_profile(), "")
    assert verdict == "invalid"
    assert "budget_seconds is too little" in why


def test_the_gaps_that_the_slo_limits_are_each_requests_own() -> None:
    """A tenth of the requests is slow, so the 95th percentile is; of two in a hundred it is not."""
    rows = [make_row(at * 250, gap_ms=420 if at % 10 == 0 else 20) for at in range(100)]
    step = judge([make_window(4, rows)], make_profile(), ())
    assert step.own_itl_p95_ms == pytest.approx(420)
    rows = [make_row(at * 250, gap_ms=420 if at % 50 == 0 else 20) for at in range(100)]
    assert judge([make_window(4, rows)], make_profile(), ()).own_itl_p95_ms == pytest.approx(20)
