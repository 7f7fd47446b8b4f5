"""The picture is drawn for every kind of result."""

import pytest

from loadtests.picture import title, ttft_against_rate
from loadtests.verdict import Window
from tests.loadtests.samples import make_result, make_row, make_window, steady

ERRORS = [make_row(i * 60, error="http_503") for i in range(60)]
CASES = {
    "knee": [steady(4, 60), steady(8, 60, 200), steady(16, 60, 900)],
    "at least": [steady(4, 60), steady(8, 60)],
    "no pass": [steady(4, 60, 2500)],
    "all failed": [make_window(4, ERRORS)],
    "invalid": [steady(4, 60, lag_ms=80)],
}


@pytest.mark.parametrize("case", CASES)
def test_is_a_png(case: str) -> None:
    windows: list[Window] = CASES[case]
    png = ttft_against_rate(make_result(windows))
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_title_names_model_commit_verdict_and_what_is_simulated() -> None:
    metadata = {"model": "smollm2-135m", "commit": "0123456789abcdef", "simulated": ["gpu"]}
    text = title(make_result(CASES["knee"], metadata=metadata))
    assert "smollm2-135m @ 0123456789ab" in text
    assert "PASS" in text
    assert "simulated: gpu" in text
    assert "simulated" not in title(make_result(CASES["knee"]))
