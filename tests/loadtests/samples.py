"""Windows and results made by hand, for the tests of what is derived from them."""

import json
from typing import Any

from loadtests.answer import Row
from loadtests.engine import Sample
from loadtests.profile import Profile
from loadtests.result import Capacity, Result
from loadtests.verdict import Window, capacity, in_flight_at, judge, limited_by, overall

MS = 1_000_000


def make_profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "base_url": "http://10.0.0.1:8000",
        "model": "m",
        "rates": [4, 8, 16],
        "step_seconds": 10,
        "prompt_tokens": 64,
        "output_tokens": 4,
        "slo": {"ttft_p95_ms": 500, "itl_p95_ms": 100, "required_rate": 4},
    }
    slo = {**fields["slo"], **changes.pop("slo", {})}
    return Profile.model_validate({**fields, "slo": slo, **changes})


def make_row(
    at_ms: float,
    ttft_ms: float = 100,
    gap_ms: float = 20,
    *,
    error: str | None = None,
    lag_ms: float = 0.1,
    phase: Any = "measure",
    tokens: int = 4,
    model: str = "m",
) -> Row:
    at = int(at_ms * MS)
    times = [int((ttft_ms + gap_ms * i) * MS) for i in range(tokens)]
    return Row(
        rate=4.0,
        repeat=0,
        number=0,
        phase=phase,
        scheduled=at,
        sent=at + int(lag_ms * MS),
        connected=at + int(lag_ms * MS),
        first_byte=at + times[0],
        first_role=None,
        first_reasoning=None,
        first_content=at + times[0],
        last_token=at + times[-1],
        end=at + times[-1],
        status=200,
        error=error,
        detail="",
        tokens_in=64,
        tokens_out=tokens,
        chunks=tokens,
        reused=True,
        usage=True,
        chunk_ns=tuple(times),
        chunk_tokens=(1.0,) * tokens,
        tokens_asked=4,
        model=model,
    )


def make_window(
    rate: float, rows: list[Row], *, cpu: float = 0.1, samples: tuple[Sample, ...] = ()
) -> Window:
    measured = sum(row.phase == "measure" for row in rows)
    return Window(rate, 0, int(measured / rate * 1e9), tuple(rows), cpu, samples)


def steady(rate: float, count: int, ttft_ms: float = 100, **row: Any) -> Window:
    """`count` equal requests at `rate`."""
    return make_window(rate, [make_row(i * 1e3 / rate, ttft_ms, **row) for i in range(count)])


def make_result(windows: list[Window], **profile: Any) -> Result:
    """The result that these windows give."""
    asked = make_profile(**profile)
    steps = [judge([window], asked, ()) for window in windows]
    verdict, reason = overall(steps, asked, "")
    rates: Capacity = capacity(steps, asked.slo)
    return Result(
        verdict=verdict,
        reason=reason,
        steps=tuple(steps),
        capacity=rates,
        in_flight_at_capacity=in_flight_at(rates, steps),
        limited_by=limited_by(steps),
        profile=asked,
        started_at="2026-11-25T12:00:00+00:00",
        seconds=60.0,
        server={"version": "0.30.0", "root": "/models/m"},
        network={"path": "direct"},
        versions={"python": "3.11"},
    )


def as_json(result: Result) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(result.model_dump_json())
    return fields
