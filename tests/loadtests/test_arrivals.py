"""Arrivals follow the asked process at the asked rate, and a seed repeats them."""

import math
from itertools import pairwise

import pytest

from loadtests.arrivals import Arrival, draw, even, replay


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise([0.0, *times])]


def ks_exponential(values: list[float], rate: float) -> float:
    """Kolmogorov and Smirnov's distance to the exponential law, times sqrt(n)."""
    ordered, n = sorted(values), len(values)
    distance = 0.0
    for rank, value in enumerate(ordered):
        law = 1 - math.exp(-rate * value)
        distance = max(distance, law - rank / n, (rank + 1) / n - law)
    return distance * math.sqrt(n)


@pytest.mark.parametrize("seed", range(10))
def test_poisson_gaps_are_exponential(seed: int) -> None:
    # 1.36: the 5 % point. The gaps are scaled to the window, which only narrows the distance.
    assert ks_exponential(gaps(draw("poisson", 50, 3000, seed)), 50) < 1.36


@pytest.mark.parametrize("shape", [0.3, 4.0])
def test_gamma_is_not_poisson(shape: float) -> None:
    assert ks_exponential(gaps(draw("gamma", 50, 3000, 1, shape)), 50) > 1.36


def test_gamma_below_one_is_burstier() -> None:
    def variation(times: list[float]) -> float:
        values = gaps(times)
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / len(values) / mean**2

    assert variation(draw("gamma", 10, 5000, 1, 0.25)) == pytest.approx(4.0, rel=0.2)
    assert variation(draw("poisson", 10, 5000, 1)) == pytest.approx(1.0, rel=0.2)


def test_constant_gaps_are_equal() -> None:
    assert {round(gap, 9) for gap in gaps(draw("constant", 4, 8, 1))[1:]} == {0.25}


@pytest.mark.parametrize("arrival", ["poisson", "constant", "gamma"])
def test_asked_rate_fills_the_window(arrival: Arrival) -> None:
    times = draw(arrival, 20, 60, 3, 0.5)
    assert len(times) == 60
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= 3.0


def test_seed_repeats_and_another_differs() -> None:
    assert draw("poisson", 5, 50, "1 5.0 0 measure") == draw("poisson", 5, 50, "1 5.0 0 measure")
    assert draw("poisson", 5, 50, "1 5.0 0 measure") != draw("poisson", 5, 50, "2 5.0 0 measure")


def test_no_requests_no_arrivals() -> None:
    assert draw("poisson", 5, 0, 1) == []


def test_a_record_is_replayed_at_the_asked_rate() -> None:
    record = [0.0, 0.1, 0.2, 3.0]  # mean gap 1 s
    times = replay(record, 2.0, 4, 0)
    # All gaps are stretched alike, the one that closes the window too.
    assert gaps(times) == pytest.approx([0.4, 0.04, 0.04, 1.12])
    assert times[-1] + 0.4 == pytest.approx(2.0)


def test_a_short_record_starts_again_where_the_window_before_ended() -> None:
    record = [0.0, 1.0, 4.0]  # mean gap 2 s
    assert gaps(replay(record, 1.0, 7, 2)) == pytest.approx(
        [g * 7 / 17 for g in (3, 2, 1, 3, 2, 1, 3)]
    )


def test_arrivals_at_one_point_in_time() -> None:
    assert replay([5.0, 5.0, 5.0], 4.0, 2, 0) == [0.0, 0.0]


def test_even_shares_are_shuffled_and_cover_all() -> None:
    shares = even(100, "seed")
    assert sorted(shares) == pytest.approx([(i + 0.5) / 100 for i in range(100)])
    assert shares != sorted(shares)
    assert shares == even(100, "seed") != even(100, "other")
