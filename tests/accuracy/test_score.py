"""The scorer's arithmetic."""

import json
import random
from typing import Any

import pytest

from tests.accuracy.score import (
    Answer,
    Truth,
    gap_errors,
    poisson_p,
    prompt_of,
    quantiles,
    rate,
    read_truth,
    score,
    settled,
)

MS = 1_000_000


def truth(name: str, at_ms: float = 0, fault: str = "", tokens_a_chunk: int = 1) -> Truth:
    """First chunk after 200 ms, two more after 20 ms each."""
    at = int(at_ms * MS)
    times = (at + 200 * MS, at + 220 * MS, at + 240 * MS)
    return Truth(name, f"prompt of {name}", at, tuple((t, tokens_a_chunk) for t in times), fault)


def test_errors_are_those_of_the_durations() -> None:
    answers = [
        Answer("a", False, 200.5, [19.0, 21.0]),
        Answer("prompt of b", False, 199.0, [20.0, 20.25]),
    ]
    scored = score([truth("a", 1000), truth("b", 2000)], answers)
    assert scored.ttft_errors == pytest.approx([0.5, 1.0])
    assert scored.itl_errors == pytest.approx([1.0, 1.0, 0.0, 0.25])
    assert (scored.missing, scored.misjudged) == (0, 0)
    assert scored.achieved_rate == pytest.approx(1.0)


def test_what_a_tool_does_not_mention_is_missing() -> None:
    scored = score([truth("a"), truth("b", 10)], [Answer("a", False, 200.0, [20.0, 20.0])])
    assert scored.missing == 1
    assert len(scored.ttft_errors) == 1


@pytest.mark.parametrize(
    ("fault", "failed", "misjudged"),
    [("", False, 0), ("", True, 1), ("truncation", True, 0), ("truncation", False, 1)],
)
def test_an_answer_counts_as_what_it_is(fault: str, failed: bool, misjudged: int) -> None:
    scored = score([truth("a", fault=fault)], [Answer("a", failed, 200.0, [20.0, 20.0])])
    assert scored.misjudged == misjudged
    assert bool(scored.ttft_errors) is not (failed or bool(fault))


def test_a_good_answer_without_a_ttft_is_misjudged() -> None:
    assert score([truth("a")], [Answer("a", False, None, [])]).misjudged == 1


def test_gaps_between_tokens_share_that_of_their_chunk() -> None:
    assert truth("a", tokens_a_chunk=4).gaps_ms == [5.0] * 8


def test_gaps_of_chunks_are_no_gaps_of_tokens() -> None:
    true = truth("a", tokens_a_chunk=4).gaps_ms
    assert gap_errors(true, [5.0] * 8) == [0.0] * 8
    assert gap_errors(true, [20.0, 20.0]) == [15.0, 15.0]
    assert gap_errors(true, [5.5]) == [0.5]


def test_the_log_as_the_server_writes_it() -> None:
    entry: dict[str, Any] = {"id": "x", "body": json.dumps({"prompt": "hello"}), "arrived": 5}
    entry |= {"tokens": [[7, 1]], "fault": "429", "whole": True, "late_ns": 0}
    assert read_truth({"requests": [entry]}) == [Truth("x", "hello", 5, ((7, 1),), "429")]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hi there"},
        {"messages": [{"role": "user", "content": "hi there"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi there"}]}]},
    ],
)
def test_prompts_by_any_endpoint(body: dict[str, Any]) -> None:
    assert prompt_of(json.dumps(body)) == "hi there"


def test_the_first_two_seconds_settle() -> None:
    late = [truth("c", 5000), truth("a", 1000), truth("b", 2999)]
    assert [t.id for t in settled(late)] == ["c"]


def test_rate_is_between_the_first_arrival_and_the_last() -> None:
    assert rate([0, 500 * MS, 1000 * MS]) == 2.0
    assert rate([3]) == 0.0


def test_quantiles_are_interpolated() -> None:
    assert quantiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 2.9, "p99": 2.98}
    assert quantiles([]) == {"p50": None, "p95": None, "p99": None}


def poisson(seed: int, count: int = 2000) -> list[int]:
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(100.0)
        times.append(int(now * 1e9))
    return times


def test_poisson_arrivals_pass_about_as_often_as_they_should() -> None:
    passed = sum(poisson_p(poisson(seed), 100.0) >= 0.05 for seed in range(100))
    assert 88 <= passed <= 100


def test_other_arrivals_do_not() -> None:
    constant = [i * 10 * MS for i in range(2000)]
    assert poisson_p(constant, 100.0) < 1e-6
    assert poisson_p(poisson(1), 115.0) < 0.001
    # In batches of two, as by a timer that is too coarse.
    assert poisson_p([t for t in poisson(1) for _ in range(2)], 200.0) < 1e-6
