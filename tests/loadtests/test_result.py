"""A result survives its way through a Job's log; another format is refused."""

import json
from pathlib import Path

import pytest

from loadtests.result import (
    FORMAT,
    Capacity,
    ResultError,
    load_result,
    pack_rows,
    parse_result,
    rows_events,
    rows_from_events,
    unpack_rows,
)
from tests.loadtests.samples import as_json, make_result, make_row, steady

RESULT = make_result([steady(4, 60), steady(16, 60, ttft_ms=900)])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(RESULT.model_dump_json())
    assert load_result(path) == RESULT
    assert parse_result({"event": "result", **as_json(RESULT)}) == RESULT


def test_gate_finds_its_step() -> None:
    step = RESULT.step_at_required_rate()
    assert step is not None
    assert step.rate_asked == 4


@pytest.mark.parametrize(
    ("lower", "estimate", "upper", "mode", "text"),
    [
        (6, 6.582, 16, "ladder", "between 6 and 16 req/s (interpolated 6.58)"),
        (9.8, 10.123, 10.41, "search", "10.12 req/s (90 % interval 9.8 to 10.41)"),
        (8, 8, None, "ladder", "at least 8 req/s (no rate failed)"),
        (0, 0, 6, "ladder", "below 6 req/s (no rate passed)"),
        (0, 0, None, "search", "unknown (no rate passed, and none failed)"),
    ],
)
def test_capacity_in_words(
    lower: float, estimate: float, upper: float | None, mode: str, text: str
) -> None:
    at_least = upper is None and estimate > 0
    found = Capacity(lower=lower, estimate=estimate, upper=upper, at_least=at_least)
    assert found.text(mode) == text


def test_other_format_is_refused_with_both() -> None:
    with pytest.raises(ResultError, match=rf"format 7, this program reads format {FORMAT}"):
        parse_result({**as_json(RESULT), "format": 7})


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_no_result_is_refused(text: str) -> None:
    with pytest.raises(ResultError):
        parse_result(text)


def test_wrong_field_is_named() -> None:
    with pytest.raises(ResultError, match=r"capacity\.lower"):
        parse_result({**as_json(RESULT), "capacity": {"lower": "x", "at_least": True}})
    steps = [{**as_json(RESULT)["steps"][0], "speed": 1}]
    with pytest.raises(ResultError, match=r"steps\.0\.speed: is no field here; allowed: rate_"):
        parse_result({**as_json(RESULT), "steps": steps})


def test_a_result_stays_readable_when_profiles_are_checked_more_strictly() -> None:
    stored = as_json(RESULT)
    stored["profile"] |= {"gamma_shape": 2, "rate_range": [1, 64]}
    assert parse_result(stored).profile.gamma_shape == 2


def test_rows_travel_in_lines_of_a_log() -> None:
    rows = [make_row(i * 3.7, ttft_ms=100 + i * 1.37).as_json() for i in range(2000)]
    packed = pack_rows(rows)
    events = list(rows_events(packed))
    lines = [json.dumps(event) for event in events]
    assert len(lines) > 1
    assert max(len(line) for line in lines) <= 8192
    # In any order, with other events between them.
    mixed = [{"event": "progress"}, *map(json.loads, reversed(lines)), {"event": "result"}]
    assert unpack_rows(rows_from_events(mixed)) == json.loads(json.dumps(rows))


def test_lost_part_is_noticed() -> None:
    rows = [make_row(i * 3.7, ttft_ms=100 + i * 1.37).as_json() for i in range(2000)]
    events = list(rows_events(pack_rows(rows)))
    with pytest.raises(ResultError, match=rf"1 of {len(events)} parts"):
        rows_from_events(events[1:])
    with pytest.raises(ResultError):
        rows_from_events([])
