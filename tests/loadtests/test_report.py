"""The report is one file that says everything, and can't be broken by a name."""

import re
from itertools import combinations

from loadtests.chart import HEIGHT, WIDTH, charts
from loadtests.report import html
from tests.loadtests.samples import make_result, make_row, make_window, steady

RECORD = {"weights": {"commit": "abc123"}, "gates": ["smoke", "benchmark"], "note": None}


def test_stands_alone() -> None:
    page = html(make_result([steady(4, 60), steady(16, 60, 900)]), RECORD)
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "@import" not in page


def test_shows_verdict_steps_and_record() -> None:
    page = html(make_result([steady(4, 60), steady(16, 60, 900)]), RECORD)
    assert '<span class="badge pass">pass</span>' in page
    assert '<span class="badge fail">fail</span>' in page
    assert "weights.commit" in page
    assert "abc123" in page
    assert "smoke, benchmark" in page
    assert "/models/m" in page


def test_says_what_is_simulated() -> None:
    simulated = make_result([steady(4, 60)], metadata={"simulated": ["gpu", "engine"]})
    assert "Simulated here: gpu, engine" in html(simulated, {})
    assert "Simulated here" not in html(make_result([steady(4, 60)]), {})


def test_failed_requests_show_as_infinite() -> None:
    rows = [make_row(i * 250, error="timeout" if i % 2 else None) for i in range(60)]
    page = html(make_result([make_window(4, rows)]), {})
    assert "∞" in page
    assert page.count("timeout 30") == page.count("30 of 60 requests failed: timeout 30"), "once"


def test_names_are_escaped() -> None:
    result = make_result([steady(4, 60)], metadata={"model": "<script>alert(1)</script>"})
    page = html(result, {"x": "<img src=x onerror=alert(1)>"})
    assert "<script>" not in page
    assert "<img src=x" not in page


def test_charts_over_time_come_from_the_rows() -> None:
    result = make_result([steady(4, 60), steady(8, 60, 900)])
    rows = [row.as_json() for row in steady(4, 60).rows]
    rows += [{"row": "server", "time_ns": i, "values": {}} for i in range(3)]
    page = html(result, {}, rows)
    for part in ("TTFT by arrival rate", "In the engine over time", "TTFT over time at 4 req/s"):
        assert part in page
    assert "TTFT p95: 900 ms at 8 req/s" in page
    assert "http://" not in page.replace(result.profile.base_url, "")
    assert "TTFT over time" not in html(result, {})


def test_words_of_charts_are_whole_and_apart() -> None:
    """By the boxes that they take: 12 px high, of letters that are 7 px wide."""
    rows = [row.as_json() for row in steady(4, 60, 1234).rows]
    rows += [
        {"row": "server", "time_ns": i * 10**9, "values": {"vllm:num_requests_running": 1e3 * i}}
        for i in range(38)
    ]
    drawn = charts(make_result([steady(4, 60, 1234), steady(16, 60, 123456)]), rows)
    assert len(drawn) == 3
    for chart in drawn:
        boxes = [box(*found) for found in TEXT.findall(chart)]
        assert len(boxes) >= 6
        for left, top, right, bottom in boxes:
            assert left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT
        for one, other in combinations(boxes, 2):
            beside = one[2] <= other[0] or other[2] <= one[0]
            assert beside or one[3] <= other[1] or other[3] <= one[1], (one, other)


TEXT = re.compile(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)</text>')


def box(x: str, y: str, anchor: str, text: str) -> tuple[float, float, float, float]:
    width = 7.0 * len(text)
    left = float(x) - {"middle": width / 2, "end": width}[anchor]
    return left, float(y) - 11, left + width, float(y) + 1
