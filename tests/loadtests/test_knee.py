"""λ* from visits to states."""

import random

import pytest

from loadtests.knee import find, isotonic, seen
from tests.loadtests.queues import Queue
from tests.loadtests.samples import make_profile, make_row, make_window

QUEUE = Queue(1, 0.05, 201, random_service=True)


def test_visits_are_counted_by_state() -> None:
    # In flight: 0 until 1 s, 1 until 2 s, 2 until 4 s, 1 until 5 s, 0 until 6 s.
    rows = [make_row(1000, 600, 800), make_row(2000, 900, 700)]  # end after 4 s and 5 s
    window = make_window(2 / 6, rows)
    (visits,) = seen(window, make_profile()).in_flight
    assert visits.seconds == pytest.approx([2.0, 2.0, 2.0])
    assert visits.arrivals == [1, 1, 0]
    assert visits.ends == [0, 1, 1]
    assert visits.misses == [1, 1, 0]


def test_the_warm_up_is_in_flight_but_not_visited() -> None:
    rows = [make_row(-500, 100, 300, phase="warmup"), make_row(1000, 100, 300)]
    (visits,) = seen(make_window(0.5, rows), make_profile()).in_flight
    assert visits.seconds == pytest.approx([0.5, 1.5])
    assert visits.arrivals == [1, 0]
    assert visits.ends == [0, 2]


def test_isotonic() -> None:
    assert isotonic([1.0, 3.0, 2.0, 5.0], [1, 1, 3, 1]) == [1.0, 2.25, 2.25, 5.0]
    assert isotonic([2.0, 1.0], [1, 0]) == [2.0, 2.0]


def test_rates_on_both_sides_give_lambda_and_an_interval() -> None:
    knee = QUEUE.knee()
    measure = QUEUE.measure(1)
    profile = QUEUE.profile(knee, knee / 4, knee * 4)
    windows = [
        seen(measure(rate * knee, repeat, 1.0, 4000 / knee), profile)
        for rate in (0.95, 1.05)
        for repeat in (0, 1)
    ]
    found = find(windows, profile)
    assert found.fitted
    assert found.lower < knee < found.upper
    assert found.estimate == pytest.approx(knee, rel=0.08)
    assert found.upper / found.lower < 1.2


@pytest.mark.parametrize(
    "arrivals",
    [
        {"arrival": "constant"},
        {"endpoint": "chat", "conversations": {"turns": 3, "think_s": 1.0}},
    ],
    ids=["constant", "turns of conversations"],
)
def test_other_arrivals_than_poisson_see_the_states_that_they_saw(
    arrivals: dict[str, object],
) -> None:
    """Of a queue at its own rate, the misses found are those that were counted."""
    rng = random.Random(1)
    rate = 0.93 / 0.05
    profile = make_profile(**arrivals, slo={"ttft_p95_ms": 151, "itl_p95_ms": 1e6})
    free, rows = 0.0, []
    for number in range(4000):
        at = (number + 0.5) / rate
        free = max(free, at) + rng.expovariate(1 / 0.05)
        rows.append(make_row(at * 1e3, (free - at) * 1e3, 0))
    window = seen(make_window(rate, rows), profile)
    missed = sum(window.miss) / window.requests
    profile = profile.model_copy(
        update={"slo": profile.slo.model_copy(update={"attainment": 1 - missed})}
    )
    assert find([window], profile).estimate == pytest.approx(rate, rel=0.02)
