"""What is said and shown of a benchmark."""

from pathlib import Path

import dagster as dg
import pytest

from assets.measured import capacity, refusal, shown, verdict
from assets.ttft_benchmark import write_report
from loadtests.result import Verdict, pack_rows
from tests.assets.test_ttft_benchmark import release, result, step


def test_the_verdict_has_the_numbers_that_decided() -> None:
    line = verdict(result())
    for part in ("pass", "TTFT p95 240 ms (SLO 500 ms)", "4 req/s", "λ* between 8 and 12 req/s"):
        assert part in line
    slow = step(4.0, "fail", 240.0).model_copy(update={"own_itl_p95_ms": 420.0})
    line = verdict(result("fail").model_copy(update={"steps": (slow,)}))
    assert "ITL p95 420 ms (SLO 200 ms), attainment 40.0% (SLO 95%)" in line
    assert capacity(result(upper=None)) == "λ* at least 10 req/s (no rate failed)"


@pytest.mark.parametrize("kind", ["fail", "invalid", "inconclusive"])
def test_a_refusal_says_why_and_where_to_look(kind: Verdict, tmp_path: Path) -> None:
    text = refusal(release(), result(kind, ttft=900.0), tmp_path, "catalog/models/x.yaml")
    decided = "900 ms" if kind == "fail" else f"the SLO at 4 req/s: {kind}"
    for part in ("smollm2-135m", "cccccccccccc", decided, "report.html", "catalog/models/x"):
        assert part in text


def test_metadata_and_report_show_picture_and_tables(tmp_path: Path) -> None:
    rows = [
        {"rate": 6.0, "phase": phase, "error": error}
        for phase, error in [("warmup", None), ("measure", None), ("measure", "timeout")]
    ]
    (tmp_path / "rows.jsonl.gz").write_bytes(pack_rows(rows))
    write_report(tmp_path, result(), {"promotion": "run-1"})
    metadata = shown(result(), tmp_path)
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert "run-1" in (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in metadata["TTFT against arrival rate"].value
    [row] = metadata["requests by outcome"].records
    assert row.data == {"req/s asked": 6.0, "answered": 1, "timeout": 1}
    [_, failed] = metadata["steps"].records
    assert failed.data["TTFT p95"] == "infinite (failed requests)"
    # Dagster takes it all.
    dg.AssetCheckResult(passed=True, metadata=metadata)


def test_a_result_without_steps_can_be_shown(tmp_path: Path) -> None:
    """As of a run that ended before its first window."""
    update = {"steps": (), "verdict": "invalid", "in_flight_at_capacity": None}
    made = result().model_copy(update=update)
    (tmp_path / "rows.jsonl.gz").write_bytes(pack_rows([]))
    (tmp_path / "ttft.png").write_bytes(b"")
    metadata = shown(made, tmp_path)
    assert not {"steps", "requests by outcome"} & set(metadata)
    assert metadata["L* (requests in flight)"] == "unknown: no rate passed"
