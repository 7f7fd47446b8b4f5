"""Which rates are run, and how often."""

import pytest

from catalog.offered_load import requests_of_step
from loadtests.ladder import climb, longest_seconds
from loadtests.verdict import Window
from tests.loadtests.samples import make_profile, steady

PROFILE = make_profile(rates=[2, 4, 8, 16, 32])


class Bench:
    """An engine that fails above `capacity`; windows named in `lagged` are invalid."""

    def __init__(self, capacity: float, lagged: tuple[tuple[float, int], ...] = ()) -> None:
        self.capacity = capacity
        self.lagged = lagged
        self.measured: list[tuple[float, int]] = []
        self.count = 60

    def measure(self, rate: float, repeat: int) -> Window:
        self.measured.append((rate, repeat))
        lag = 90.0 if (rate, repeat) in self.lagged else 0.0
        return steady(rate, self.count, 100 if rate <= self.capacity else 900, lag_ms=lag)


def verdicts(bench: Bench) -> list[tuple[float, str]]:
    return [(step.rate_asked, step.verdict) for step in climb(PROFILE, bench.measure)]


def test_stops_after_the_first_clear_fail() -> None:
    bench = Bench(10)
    assert verdicts(bench) == [(2, "pass"), (4, "pass"), (8, "pass"), (16, "fail")]


def test_runs_the_required_rate_after_a_fail_below_it() -> None:
    assert verdicts(Bench(1)) == [(2, "fail"), (4, "fail")]


def test_whole_ladder_if_all_passes() -> None:
    assert [rate for rate, _ in verdicts(Bench(99))] == [2, 4, 8, 16, 32]


def test_lagged_window_is_thrown_away_and_repeated() -> None:
    bench = Bench(99, lagged=((8, 0),))
    steps = {step.rate_asked: step for step in climb(PROFILE, bench.measure)}
    assert bench.measured.count((8, 1)) == 1
    assert steps[8].verdict == "pass"
    assert steps[8].scheduled == 60
    assert "lagged" in steps[8].discarded[0]


def test_a_generator_at_its_limit_ends_the_ladder() -> None:
    bench = Bench(99, lagged=((8, 0), (8, 1)))
    assert verdicts(bench) == [(2, "pass"), (4, "pass"), (8, "invalid")]


def test_the_required_rate_is_tried_harder_and_not_for_ever() -> None:
    bench = Bench(99, lagged=tuple((4, repeat) for repeat in range(9)))
    assert verdicts(bench)[1] == (4, "invalid")
    assert bench.measured.count((4, 4)) == 1
    assert bench.measured.count((4, 5)) == 0


def test_inconclusive_at_the_required_rate_gets_more_requests() -> None:
    bench = Bench(99)
    bench.count = 20
    steps = {step.rate_asked: step for step in climb(PROFILE, bench.measure)}
    assert (steps[4].verdict, steps[4].scheduled, steps[4].repeats) == ("pass", 60, 3)
    assert (steps[8].verdict, steps[8].repeats) == ("inconclusive", 1)


@pytest.mark.parametrize(("rate", "requests"), [(1, 52), (4, 52), (8, 80)])
def test_a_step_has_enough_requests_for_a_verdict(rate: float, requests: int) -> None:
    assert requests_of_step(rate, PROFILE.step_seconds, PROFILE.slo) == requests


def test_longest_run() -> None:
    profile = make_profile(rates=[4, 8], warmup_seconds=2, timeout_s=10)
    # 4 req/s is required: 5 windows of 52 requests; 8 req/s: 2 of 80.
    assert longest_seconds(profile) == 5 * (2 + 13 + 10 + 1) + 2 * (2 + 10 + 10 + 1)
