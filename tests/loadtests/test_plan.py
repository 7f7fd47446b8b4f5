"""Everything is drawn before the start, from the seed."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from loadtests.plan import Planned, Planner, planned
from loadtests.profile import Profile
from tests.loadtests.samples import make_profile

LAWS: dict[str, Any] = {
    "prompt_tokens": {"lognormal": {"median": 200, "p95": 900, "max": 4000}},
    "output_tokens": {"uniform": {"min": 1, "max": 64}},
    "models": {"base": 3, "adapter": 1},
}
TALK: dict[str, Any] = {
    "endpoint": "chat",
    "conversations": {"turns": 4, "think_s": 5},
    "warmup_seconds": 5,
}


def window(rate: float = 20.0, repeat: int = 0, **changes: Any) -> list[Planned]:
    return Planner(make_profile(step_seconds=20, **changes)).window(rate, repeat)


def without_keys(plan: list[Planned]) -> list[Any]:
    return [
        (
            one.at_ns,
            one.phase,
            one.model,
            [[text.tokens for text in message] for message in one.messages],
            one.output_tokens,
            one.turn,
        )
        for one in plan
    ]


@pytest.mark.parametrize("changes", [{}, LAWS, TALK, {"shared_prefix": {"tokens": 99, "count": 3}}])
def test_a_seed_repeats_all_but_the_words(changes: dict[str, Any]) -> None:
    first, second = window(**changes), window(**changes)
    assert without_keys(first) == without_keys(second)
    assert without_keys(first) != without_keys(window(**changes, seed=2))
    assert without_keys(first) != without_keys(window(**changes, repeat=1))
    assert [one.messages for one in first] != [one.messages for one in second]


def test_lengths_and_models_follow_their_laws_in_each_window() -> None:
    for rate in (10.0, 40.0):
        measured = [one for one in window(rate, **LAWS) if one.phase == "measure"]
        assert median(one.prompt_tokens for one in measured) == pytest.approx(200, rel=0.02)
        assert sorted({one.output_tokens for one in measured}) == list(range(1, 65))
        counts = Counter(one.model for one in measured)
        assert counts["base"] == 3 * counts["adapter"]


def test_prompts_are_unique_unless_they_share_a_beginning() -> None:
    keys = [text.key for one in window() for message in one.messages for text in message]
    assert len(set(keys)) == len(keys)
    planner = Planner(make_profile(step_seconds=20, shared_prefix={"tokens": 100, "count": 3}))
    plan = planner.window(20.0, 0)
    prompts = [one.messages[0] for one in plan]
    assert {prompt[0].tokens for prompt in prompts} == {100}
    assert len({prompt[0].key for prompt in prompts}) == 3
    assert len({prompt[1].key for prompt in prompts}) == len(prompts)
    # All but the first of each beginning repeat it; 64 tokens are each one's own.
    repeated = 100 * (len(plan) - 3) / (164 * len(plan))
    assert planner.repeated_tokens / planner.tokens == pytest.approx(repeated)


def test_unique_prompts_repeat_nothing() -> None:
    planner = Planner(make_profile(step_seconds=20, **LAWS))
    planner.window(20.0, 0)
    assert planner.repeated_tokens == 0
    assert planner.tokens > 0


def test_turns_of_conversations_are_the_same_open_arrivals() -> None:
    plan = window(**TALK)
    assert [one.at_ns for one in plan] == [one.at_ns for one in window(warmup_seconds=5)]
    # From the start on each turn is as likely: the load does not grow while it is measured.
    for phase in ("warmup", "measure"):
        turns = [one.turn for one in plan if one.phase == phase]
        assert mean(turns) == pytest.approx(2.5, abs=0.4)
        assert set(turns) == {1, 2, 3, 4}


def test_a_turn_follows_a_pause_and_has_all_before_it_in_its_prompt() -> None:
    plan = window(**TALK)
    of_conversation = defaultdict(list)
    for one in plan:
        of_conversation[one.messages[0][0].key].append(one)
    for turns in of_conversation.values():
        first = turns[0]
        assert first.turn == 1 or first.at_ns < 5e9
        assert len(first.messages) == 2 * first.turn - 1
        for before, after in pairwise(turns):
            assert after.turn == before.turn + 1
            assert after.at_ns - before.at_ns >= 5e9
            assert after.model == before.model
            assert after.messages[: len(before.messages)] == before.messages
            [answer] = after.messages[-2]
            assert answer.tokens == before.output_tokens
    assert max(len(turns) for turns in of_conversation.values()) == 4


def with_trace(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Profile:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"arrival": "trace", "prompt_tokens": "trace", "output_tokens": "trace"}
    trace = {"path": str(path), **changes.pop("trace", {})}
    return make_profile(**{**fields, "warmup_seconds": 0, "trace": trace, **changes})


ROWS = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 1000, "input_length": 600, "output_length": 6, "hash_ids": [7, 8]},
    {"timestamp": 4000, "input_length": 1200, "output_length": 7, "hash_ids": [7, 3]},
]


def test_a_trace_gives_times_and_lengths_row_by_row(tmp_path: Path) -> None:
    plan = Planner(with_trace(tmp_path, ROWS)).window(2.0, 0)
    assert len(plan) == 52
    assert [one.prompt_tokens for one in plan[:4]] == [1100, 600, 1200, 1100]
    assert [one.output_tokens for one in plan[:4]] == [5, 6, 7, 5]
    # Mean gap 2 s before the first and each that follows the last; at 2 req/s a quarter of it.
    gaps = [(b.at_ns - a.at_ns) / 1e9 for a, b in pairwise(plan[:4])]
    assert gaps == pytest.approx([0.25, 0.75, 0.5], rel=0.03)
    # The second window goes on where the first ended.
    assert Planner(with_trace(tmp_path, ROWS)).window(2.0, 1)[0].prompt_tokens == 600


def test_lengths_of_a_trace_with_arrivals_of_ones_own(tmp_path: Path) -> None:
    plan = Planner(with_trace(tmp_path, ROWS, arrival="constant", output_tokens=3)).window(2.0, 0)
    assert {b.at_ns - a.at_ns for a, b in pairwise(plan)} == {500_000_000}
    assert plan[2].prompt_tokens == 1200
    assert {one.output_tokens for one in plan} == {3}


def test_equal_blocks_of_a_trace_are_equal_text_on_request(tmp_path: Path) -> None:
    planner = Planner(with_trace(tmp_path, ROWS, trace={"prefixes": True}))
    first, second, third = (one.messages[0] for one in planner.window(2.0, 0)[:3])
    assert [text.tokens for text in first] == [512, 512, 76]
    assert [text.tokens for text in second] == [512, 88]
    # Two ids for 1200 tokens: what no id stands for is its own.
    assert [text.tokens for text in third] == [512, 512, 176]
    assert first[0] == second[0] == third[0]
    assert first[1].key == second[1].key != third[1].key
    assert planner.repeated_tokens > 0
    unique = Planner(with_trace(tmp_path, ROWS)).window(2.0, 0)
    assert len({one.messages[0][0].key for one in unique}) == 52


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 68),
        (LAWS, 4064),
        ({"shared_prefix": {"tokens": 100}}, 168),
        ({**TALK, "output_tokens": 16}, 4 * (64 + 16)),
    ],
)
def test_longest_request(changes: dict[str, Any], tokens: int) -> None:
    profile = make_profile(**changes)
    assert Planner(profile).longest == tokens
    plan = Planner(profile).window(20.0, 0)
    assert max(one.prompt_tokens + one.output_tokens for one in plan) <= tokens


def test_longest_request_of_a_trace(tmp_path: Path) -> None:
    assert Planner(with_trace(tmp_path, ROWS)).longest == 1207
    assert Planner(with_trace(tmp_path, ROWS, output_tokens=50)).longest == 1250


def test_a_plan_reaches_a_worker_unchanged() -> None:
    plan = window(**TALK)
    assert [planned(json.loads(json.dumps(one.as_json()))) for one in plan] == plan
