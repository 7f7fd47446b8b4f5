"""What is said of searches for λ*."""

from typing import Any

import pytest

from tests.accuracy.__main__ import _missed
from tests.accuracy.search import TRUE, loaded


def row(tool: str = "ours", **changes: Any) -> dict[str, Any]:
    fields = {"tool": tool, "scenario": "knee", "rate": TRUE, "repeat": 0, "found": TRUE}
    return {**fields, "highest_pass": TRUE, "load_seconds": 50.0, "achieved_rate": 300.0} | changes


def test_what_passes_between_two_loads_is_no_load() -> None:
    assert loaded([0, 400_000_000, 9_000_000_000, 9_300_000_000]) == pytest.approx(0.7)
    assert loaded([]) == 0


def test_the_knee_is_that_of_the_analysis() -> None:
    assert pytest.approx(350.21, abs=0.01) == TRUE  # 500 - ln(20) / 0.02


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(), row("aiperf", found=9.0, load_seconds=101.0)], []),
        ([row(found=1.06 * TRUE)], ["λ* is 350.2 req/s, repeat 0 found 371.2"]),
        ([row(highest_pass=1.03 * TRUE)], ["λ* is 350.2 req/s, repeat 0 passed 360.7"]),
        (
            [row(), row("aiperf", load_seconds=99.0)],
            ["a search for λ* takes 50 s of load, over 1/2 of aiperf's 99"],
        ),
        ([row(error="it died")], ["knee at 350.213 req/s: a run of ours left no result"]),
    ],
)
def test_what_a_search_misses_is_said(rows: list[dict[str, Any]], expected: list[str]) -> None:
    assert list(_missed(rows)) == expected
