"""Recorded loads are read, and a wrong line is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from catalog.trace import Recorded, TraceError, read_trace

MOONCAKE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
COUNTED = {"arrival_s": 1.5, "prompt_tokens": 30, "output_tokens": 7}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_both_forms_in_the_order_of_time(tmp_path: Path) -> None:
    rows, sha256 = read_trace(write(tmp_path, MOONCAKE, "", {**COUNTED, "user": "x"}))
    assert rows == (Recorded(1.5, 30, 7), Recorded(27.482, 6955, 52, (46, 47)))
    assert len(sha256) == 64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ({"time": 3}, "needs timestamp, input_length, output_length or arrival_s, .*; has time"),
        ({**MOONCAKE, "timestamp": -1}, "timestamp: must be a number of 0 or more, got -1"),
        ({**MOONCAKE, "timestamp": True}, "timestamp: must be a number"),
        ('{"timestamp": NaN}', "timestamp: must be a number"),
        ({**MOONCAKE, "input_length": 0}, "input_length: must be a whole number of 1 or more"),
        ({**MOONCAKE, "output_length": 1.5}, "output_length: must be a whole number"),
        ({**MOONCAKE, "hash_ids": "46"}, "hash_ids: must be a list of whole numbers"),
        ({"arrival_s": 1, "prompt_tokens": 3}, "output_tokens: must be a whole number .* got None"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(TraceError, match=rf"trace\.jsonl:2: {message}"):
        read_trace(write(tmp_path, MOONCAKE, row))


def test_one_request_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has 1 requests, a trace needs two"):
        read_trace(write(tmp_path, MOONCAKE))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.jsonl: can't be read: No such file"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_equal_times_are_no_arrivals_but_lengths(tmp_path: Path) -> None:
    path = write(tmp_path, MOONCAKE, MOONCAKE)
    with pytest.raises(TraceError, match=r"trace\.jsonl: all requests have one time, .* poisson"):
        read_trace(path)
    assert len(read_trace(path, "poisson")[0]) == 2
