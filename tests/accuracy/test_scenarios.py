"""The schedule, and the queue's knee by analysis against a simulation."""

import random

import pytest

from tests.accuracy.scenarios import (
    SCENARIOS,
    TOKENS,
    Queue,
    Script,
    attainment,
    knee,
    script,
)


def body(answer: Script) -> bytes:
    return b"".join(part.data for part in answer.parts)


@pytest.mark.parametrize("name", SCENARIOS)
def test_good_answers_have_all_tokens_in_order(name: str) -> None:
    scenario = SCENARIOS[name]
    answer = script(scenario, 0, scenario.chat, True)
    assert not answer.fault
    assert sum(part.tokens for part in answer.parts) == TOKENS
    times = [part.at for part in answer.parts]
    assert times == sorted(times)
    data = body(answer)
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert data.count(b'"completion_tokens":32') == 2  # the last token's, and the last event


@pytest.mark.parametrize("name", ["error_event", "truncation", "429"])
def test_every_tenth_answer_fails(name: str) -> None:
    answers = [script(SCENARIOS[name], number, False, True) for number in range(40)]
    assert [number for number, answer in enumerate(answers) if answer.fault] == [9, 19, 29, 39]
    assert {answer.fault for answer in answers} == {"", name}
    assert sum(part.tokens for part in answers[9].parts) < TOKENS


def test_split_answers_are_whole_when_put_together() -> None:
    split, fixed = (
        body(script(SCENARIOS[name], 0, False, True)).decode() for name in ("split", "fixed")
    )
    assert split.count("data: ") == fixed.count("data: ")
    assert split.count("é€") == TOKENS
    for part in script(SCENARIOS["split"], 0, False, True).parts:
        if part.tokens:
            assert part.data == b"\n\n\r\n"


def test_a_heavy_tail_is_the_same_in_every_run() -> None:
    scenario = SCENARIOS["heavy_tail"]
    firsts = sorted(script(scenario, n, False, True).parts[1].at / 1e6 for n in range(500))
    assert 180 < firsts[250] < 220
    assert firsts[495] > 900
    assert script(scenario, 3, False, True) == script(scenario, 3, False, True)


def simulated(queue: Queue, rate: float, ttft_ms: float) -> float:
    """The share that meets `ttft_ms`, event by event."""
    rng = random.Random(5)
    now = free_at = 0.0
    leave: list[float] = []
    met = 0
    for _ in range(40000):
        now += rng.expovariate(rate)
        leave = [at for at in leave if at > now]
        if len(leave) < queue.room:
            free_at = max(free_at, now) + rng.expovariate(1e3 / queue.service_ms)
            leave.append(free_at)
            met += free_at - now <= ttft_ms / 1e3
    return met / 40000


@pytest.mark.parametrize("queue", [Queue(20.0, 40), Queue(20.0, 4)])
def test_attainment_by_analysis_is_that_of_a_simulation(queue: Queue) -> None:
    for rate in (20.0, 35.0, 45.0, 70.0):
        assert attainment(queue, rate, 200.0) == pytest.approx(
            simulated(queue, rate, 200.0), abs=0.02
        )


def test_the_knee() -> None:
    # Far from full, M/M/1: P(T > t) = exp(-(mu - rate) t), so rate = 50 - ln(20) / 0.2.
    assert knee(Queue(20.0, 200), 200.0) == pytest.approx(35.02, abs=0.01)
    # With room for one, who comes while it is busy is refused: rate / (rate + mu) of them.
    assert knee(Queue(20.0, 1), 1e6) == pytest.approx(50 * 0.05 / 0.95, rel=1e-6)
