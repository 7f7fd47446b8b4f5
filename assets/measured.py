"""What a benchmark found: in a line, in the words of a refusal, and as Dagster's metadata."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from k8s.manifests import Release
from loadtests.result import Result, unpack_rows


def verdict(result: Result) -> str:
    """One line: the verdict and what decided it."""
    trusted = result.verdict in ("pass", "fail")
    simulated = result.profile.simulated
    marked = f" (simulated: {', '.join(simulated)})" if simulated else ""
    return f"{result.verdict}: {numbers(result) if trusted else result.reason}{marked}"


def numbers(result: Result) -> str:
    """TTFT, ITL and attainment at the required rate, each beside its limit, and λ*."""
    step, slo = result.step_at_required_rate(), result.profile.slo
    if step is None:
        return result.reason
    itl_ms = step.itl_ms.p95 if step.own_itl_p95_ms is None else step.own_itl_p95_ms
    return (
        f"TTFT p95 {milliseconds(step.ttft_ms.p95)} (SLO {slo.ttft_p95_ms:g} ms), ITL p95 "
        f"{milliseconds(itl_ms)} (SLO {slo.itl_p95_ms:g} ms), attainment {step.attainment:.1%} "
        f"(SLO {slo.attainment * 100:g}%) at {slo.required_rate:g} req/s; {capacity(result)}"
    )


def capacity(result: Result) -> str:
    """λ* as text."""
    return f"λ* {result.capacity.text(result.profile.mode)}"


def milliseconds(value: float | None) -> str:
    """As text; None is what a quantile among failed requests is."""
    return "infinite (failed requests)" if value is None else f"{value:.0f} ms"


def shown(result: Result, folder: Path) -> dict[str, Any]:
    """The result as metadata: numbers, tables, the picture."""
    import pandas as pd

    png = base64.b64encode((folder / "ttft.png").read_bytes()).decode()
    rows = pd.DataFrame(
        unpack_rows((folder / "rows.jsonl.gz").read_bytes()), columns=["rate", "phase", "error"]
    )
    measured = rows[rows["phase"] == "measure"]
    outcomes = pd.crosstab(measured["rate"], measured["error"].fillna("answered")).reset_index()
    steps = [
        {
            "req/s asked": step.rate_asked,
            "req/s achieved": round(step.rate_achieved, 2),
            "requests": step.scheduled,
            "failed": step.failed,
            "TTFT p50": milliseconds(step.ttft_ms.p50),
            "TTFT p95": milliseconds(step.ttft_ms.p95),
            "TTFT p99": milliseconds(step.ttft_ms.p99),
            "ITL p95": milliseconds(step.itl_ms.p95),
            "attainment": f"{step.attainment:.1%}",
            "in flight": round(step.in_flight_mean, 2),
            "verdict": step.verdict,
        }
        for step in result.steps
    ]
    simulated = ", ".join(result.profile.simulated)
    records = {
        "steps": [dg.TableRecord(row) for row in steps],
        "requests by outcome": [
            dg.TableRecord({"req/s asked": float(row.pop("rate")), **_integers(row)})
            for row in outcomes.to_dict("records")
        ],
    }
    return {
        "verdict": result.verdict,
        "reason": result.reason,
        "TTFT against arrival rate": dg.MetadataValue.md(
            f"![TTFT against arrival rate](data:image/png;base64,{png})"
        ),
        "report": dg.MetadataValue.path(folder / "report.html"),
        # Dagster takes no table without a row.
        **{name: dg.MetadataValue.table(rows) for name, rows in records.items() if rows},
        "capacity": capacity(result),
        "L* (requests in flight)": result.in_flight_at_capacity or "unknown: no rate passed",
        "limited by": result.limited_by,
        "GPUs": "shared with others" if result.profile.metadata.get("shared_gpus") else "its own",
        "simulated": simulated or "nothing",
    }


def _integers(row: Mapping[str, Any]) -> dict[str, int]:
    """NumPy's integers as Dagster's tables take them."""
    return {str(name): int(count) for name, count in row.items()}


def refusal(release: Release, result: Result, folder: Path, source: str) -> str:
    """Why this result promotes nobody, and where to look. `source` of SLO and load, in words."""
    what = {
        "fail": f"misses its SLO: {numbers(result)}",
        "invalid": f"could not be measured: {result.reason}",
        "inconclusive": f"was not shown to keep its SLO: {result.reason}",
    }[result.verdict]
    return (
        f"{release.model.name} at {release.commit[:12]} {what}. See {folder / 'report.html'}; "
        f"SLO and load are those of {source}."
    )
