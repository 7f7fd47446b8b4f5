"""Loads that can't be carried out are refused, at the field, with what is allowed."""

from collections.abc import Callable
from typing import Any

import pytest

from catalog.model import Slo, Traffic
from catalog.offered_load import check, check_windows
from catalog.spec import Misfit

TRAFFIC: dict[str, Any] = {"prompt_tokens": 64, "output_tokens": 16, "rates": (2, 4)}
SEARCH: dict[str, Any] = {"mode": "search", "rates": (), "rate_range": (1, 64)}
DEFAULTS = dict(Traffic(**TRAFFIC))
SLO: dict[str, Any] = {"ttft_p95_ms": 500, "itl_p95_ms": 100, "required_rate": 2}


def refused(traffic: dict[str, Any], slo: dict[str, Any]) -> str:
    """`field: what is wrong`; empty if it is taken."""
    # Made without its own checks, which are the ones that are tested here.
    load = Traffic.model_construct(**{**DEFAULTS, **traffic})
    try:
        check(load)
        check_windows(load, Slo(**{**SLO, **slo}), "traffic")
    except Misfit as error:
        return f"{'.'.join(map(str, error.place))}: {error}"
    return ""


given: Callable[..., dict[str, Any]] = dict


@pytest.mark.parametrize(
    ("good", "bad", "slo", "says"),
    [
        (
            given(rates=(2, 64_000), step_seconds=1, warmup_seconds=0.1),
            given(rates=(2, 1e7), step_seconds=1, warmup_seconds=0.1),
            {},
            "rates.1: 1e+07 req/s can't be sent; 64 workers send 128000 at most, 2000 each",
        ),
        (
            given(SEARCH, warmup_seconds=0.1, rate_range=(1, 64_000)),
            given(SEARCH, rate_range=(1, 1e12)),
            {},
            "rate_range.1: 1e+12 req/s can't be sent; 64 workers send 128000 at most",
        ),
        (
            given(step_seconds=40_000),
            given(step_seconds=1e9),
            {},
            "step_seconds: 1e+09 s is more than a day; give 86400 or less",
        ),
        (given(warmup_seconds=9), given(warmup_seconds=1e9), {}, "warmup_seconds: 1e+09 s is mo"),
        (given(timeout_seconds=9), given(timeout_seconds=1e9), {}, "timeout_seconds: 1e+09 s is "),
        (
            given(SEARCH, budget_seconds=86_400),
            given(SEARCH, budget_seconds=1e9),
            {},
            "budget_seconds: 1e+09 s is more than a day",
        ),
        (
            given(arrival="gamma", gamma_shape=1000),
            given(arrival="gamma", gamma_shape=1e300),
            {},
            "gamma_shape: 1e+300 is above 1000, which is even already; say arrival: constant",
        ),
        (
            given(rates=(3000,), step_seconds=60, warmup_seconds=6),
            given(rates=(3000,), step_seconds=60, warmup_seconds=7),
            {},
            "traffic.rates: at 3000 req/s a window has 201000 requests, 21000 of them in warmup_s",
        ),
        (
            given(rates=(3000,), step_seconds=60, warmup_seconds=7, workers=2),
            given(rates=(9000,), step_seconds=60, warmup_seconds=7, workers=2),
            {},
            "traffic.rates: at 9000 req/s a window has 603000 requests, 63000 of them in warmup_s"
            "econds; 400000 fit into memory, 200000 for each worker",
        ),
        (
            given(SEARCH, rate_range=(1, 9_000)),
            given(SEARCH, rate_range=(1, 90_000)),
            {},
            "traffic.rate_range: at 90000 req/s a window has 1035000 requests",
        ),
        (
            given(rates=(0.000602,)),
            given(rates=(0.000601,)),
            {},
            "traffic.rates: at 0.000601 req/s the 52 requests that a verdict needs take more than "
            "a day; give 0.000602 req/s or more",
        ),
        (
            given(SEARCH, budget_seconds=36),
            given(SEARCH, budget_seconds=35, warmup_seconds=10),
            {},
            "traffic.budget_seconds: 35 s has no room for one window: at slo.required_rate (2) it "
            "takes 26.0 s, and 10.0 s of warm-up; give 36 or more",
        ),
        (
            given(SEARCH, budget_seconds=39),
            given(SEARCH, budget_seconds=38, warmup_seconds=600),
            {},
            "traffic.budget_seconds: 38 s has no room for one window: at slo.required_rate (2) it "
            "takes 26.0 s, and 13.0 s of warm-up; give 39 or more",
        ),
    ],
)
def test_what_cannot_be_carried_out(
    good: dict[str, Any], bad: dict[str, Any], slo: dict[str, Any], says: str
) -> None:
    assert refused(good, slo) == ""
    assert says in refused(bad, slo)


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (
            {"attainment": 0.9999},
            {"attainment": 0.9999999999},
            "slo.attainment: 0.9999999999 takes 27060247759 requests to show, and 200000 are the "
            "most that a window can have; give 0.999986 or less",
        ),
        (
            {"required_rate": 64},
            {"required_rate": 1e12},
            "slo.required_rate: 1e+12 req/s can't be sent",
        ),
        (
            {"required_rate": 0.001},
            {"required_rate": 1e-9},
            "slo.required_rate: at 1e-09 req/s the 52 requests that a verdict needs take more",
        ),
    ],
)
def test_what_no_window_can_show(good: dict[str, Any], bad: dict[str, Any], says: str) -> None:
    assert refused({}, good) == ""
    assert says in refused({}, bad)
