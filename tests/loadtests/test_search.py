"""λ* of queues whose knee is known by analysis, in virtual time."""

import pytest

from loadtests.knee import find, seen
from loadtests.search import Search
from loadtests.verdict import Window
from tests.loadtests.queues import Queue
from tests.loadtests.samples import make_profile, make_row, make_window, steady

QUEUE = Queue(servers=8, service_s=0.08, limit_ms=101)


def searched(queue: Queue, seed: int, required: float, **changes: object) -> Search:
    knee = queue.knee()
    budget = (20000 + 20000 * (queue.answer_s > 0)) / knee  # it waits for each last answer
    fields: dict[str, object] = {"budget_seconds": budget, **changes}
    search = Search(queue.profile(required, 0.05 * knee, 8 * knee, **fields), queue.measure(seed))
    list(search.run())
    return search


@pytest.mark.parametrize(
    "queue",
    [
        QUEUE,
        Queue(1, 0.05, 201),
        Queue(8, 0.08, 101, random_service=True),
        # So many answers are under way that the requests in flight say nothing of the queue.
        Queue(1, 0.05, 301, random_service=True, answer_s=10.0),
    ],
    ids=["M/D/8", "M/D/1", "M/M/8", "M/M/1 with long answers"],
)
def test_the_knee_is_found(queue: Queue) -> None:
    knee = queue.knee()
    for seed in range(2):
        search = searched(queue, seed, knee / 4)
        found = search.capacity()
        assert found.estimate == pytest.approx(knee, rel=0.05), f"seed {seed}"
        assert found.upper is not None
        assert found.lower < found.estimate < found.upper
        assert found.upper - found.lower < 0.1 * knee
        passed = [step.rate_asked for step in search.steps() if step.verdict == "pass"]
        assert knee / 4 in passed
        assert max(passed) <= knee, f"seed {seed}"


def test_from_above() -> None:
    search = searched(QUEUE, 3, 1.5 * QUEUE.knee())
    assert search.capacity().estimate == pytest.approx(QUEUE.knee(), rel=0.05)
    steps = {step.rate_asked: step.verdict for step in search.steps()}
    assert steps[1.5 * QUEUE.knee()] == "fail"


def test_the_interval_holds_the_knee_also_where_service_times_scatter() -> None:
    queue = Queue(1, 0.05, 201, random_service=True)
    budget = 4000 / queue.knee()
    found = [searched(queue, s, queue.knee() / 2, budget_seconds=budget) for s in range(8)]
    held = [f.capacity().lower <= queue.knee() <= (f.capacity().upper or 0) for f in found]
    assert sum(held) >= 6  # of 8 at 90 %
    assert all(search.next_step for search in found)  # so little load is too little


def test_the_highest_rate_that_holds_is_at_least() -> None:
    search = Search(QUEUE.profile(20, 10, 40), QUEUE.measure(1))
    list(search.run())
    found = search.capacity()
    assert (found.estimate, found.upper, found.at_least) == (40, None, True)
    assert {step.verdict for step in search.steps()} == {"pass"}


def test_the_lowest_rate_that_misses() -> None:
    search = Search(QUEUE.profile(200, 150, 400), QUEUE.measure(1))
    list(search.run())
    found = search.capacity()
    assert (found.lower, found.estimate, found.upper) == (0, 0, 150)
    assert {step.verdict for step in search.steps()} == {"fail"}


def test_a_budget_that_ends_says_what_would_have_been_next() -> None:
    search = searched(QUEUE, 1, QUEUE.knee() / 4, budget_seconds=10)
    assert "more requests at" in search.next_step
    assert search.spent_s < 11  # with the last answers


def test_a_window_never_has_more_requests_than_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loadtests.search.MOST_REQUESTS_OF_A_WORKER", 2000)
    sizes = []

    def undecided(rate: float, repeat: int, warmup_s: float, seconds: float) -> Window:
        sizes.append(round(rate * (warmup_s + seconds)))
        rows = [make_row(at * 1e3 / rate, 900 if at % 20 == 7 else 100) for at in range(sizes[-1])]
        return make_window(rate, rows)

    profile = make_profile(mode="search", rates=[], rate_range=[10, 10], slo={"required_rate": 10})
    list(Search(profile.model_copy(update={"budget_seconds": 5000.0}), undecided).run())
    assert max(sizes) == 2000


def test_rates_that_cannot_be_offered_end_the_search_below_them() -> None:
    def lags(rate: float, repeat: int, warmup_s: float, seconds: float) -> Window:
        return steady(rate, round(rate * seconds), lag_ms=0.1 if rate <= 16 else 90)

    profile = make_profile(mode="search", rates=[], rate_range=[4, 64], warmup_seconds=0)
    search = Search(profile, lags)
    list(search.run())
    assert [(s.rate_asked, s.verdict) for s in search.steps()] == [
        (4, "pass"),
        (8, "pass"),
        (16, "pass"),
        (32, "invalid"),
    ]
    assert search.capacity().at_least


def test_a_curve_that_rises_is_flagged() -> None:
    def odd(rate: float, repeat: int, warmup_s: float, seconds: float) -> Window:
        return steady(rate, round(rate * seconds), ttft_ms=900 if 5 < rate < 12 else 100)

    profile = make_profile(mode="search", rates=[], rate_range=[4, 64], warmup_seconds=0)
    found = find([seen(odd(rate, 0, 0, 60 / rate), profile) for rate in (4, 8, 16)], profile)
    assert "not monotone: 8 req/s" in found.warnings[0]
