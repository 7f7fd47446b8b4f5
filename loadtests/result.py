"""What a benchmark leaves: one JSON result, and the raw row of every request."""

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from catalog.spec import STORED
from loadtests.profile import Profile, describe

FORMAT = 2
Verdict = Literal["pass", "fail", "invalid", "inconclusive"]
# Log lines of a container are cut at 16 KiB; 8 KiB leaves room for time stamps and tags.
PART_CHARACTERS = 8000


class ResultError(Exception):
    """A result can't be read: not JSON, another format, or fields that are wrong."""


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantiles(_Closed):
    """In ms. None: so many requests failed that this quantile has no value (it is infinite)."""

    p50: float | None
    p95: float | None
    p99: float | None


class ServerLoad(_Closed):
    """The server's own /metrics during a step, sampled each half second.

    Means and maxima over the samples; `preemptions` and `prefix_hit_share` over the step.
    """

    samples: int
    running_mean: float
    running_max: float
    waiting_mean: float
    waiting_max: float
    kv_cache_max: float
    preemptions: float
    prefix_hit_share: float | None


class ModelStep(_Closed):
    """One model's, or LoRA adapter's, part of a step with several; as the step's fields."""

    scheduled: int
    failed: int
    ttft_ms: Quantiles
    itl_ms: Quantiles
    attainment: float
    attainment_low: float
    attainment_high: float
    verdict: Verdict
    reason: str


class Step(_Closed):
    """One rate of the ladder. Failed requests count as infinitely slow, and miss the SLO.

    `attainment_low`, `attainment_high`: Wilson's bounds, each at 95 %, of scheduled requests ÷
    `design_effect`: so many of them, alike in a queue, count as one. `ttft_p95_low_ms` and
    `…_high_ms`: 90 % interval by a block bootstrap (None: infinite). `send_lag_p99_ms`: how
    late requests were sent. `generator_cpu`: share of one core. `repeats`: how many valid windows
    were pooled; `discarded`: why others were thrown away. `misses`: failures by kind. `models`: by
    name, where the profile has several. `own_itl_p95_ms`: the 95th percentile over the requests of
    each one's own 95th of its gaps, which is what the SLO limits; `itl_ms` is of all gaps. None in
    results of before.
    """

    rate_asked: float
    rate_achieved: float
    seconds: float
    scheduled: int
    failed: int
    misses: dict[str, int]
    ttft_ms: Quantiles
    itl_ms: Quantiles
    chunk_gap_ms: Quantiles
    e2e_ms: Quantiles
    tokens_per_chunk: float | None
    tokens_in_mean: float | None
    tokens_out_mean: float | None
    attainment: float
    attainment_low: float
    attainment_high: float
    in_flight_mean: float
    server: ServerLoad | None
    send_lag_p99_ms: float
    generator_cpu: float
    reused_connections: float
    repeats: int
    discarded: tuple[str, ...]
    verdict: Verdict
    reason: str
    models: dict[str, ModelStep] = {}
    ttft_p95_low_ms: float | None = None
    ttft_p95_high_ms: float | None = None
    design_effect: float = 1.0
    own_itl_p95_ms: float | None = None


class Capacity(_Closed):
    """λ*, requests/s for one replica: the highest rate at which the SLO holds.

    `estimate` lies between `lower` and `upper`: of a ladder a rate that passed and one that failed
    (None: nothing failed), of a search the 90 % interval. `at_least`: the highest rate tried
    passed, so λ* is at least `estimate`. `warnings`: what is odd about the curve.
    """

    lower: float
    estimate: float
    upper: float | None
    at_least: bool
    warnings: tuple[str, ...] = ()

    def bounds(self, mode: str) -> tuple[str, str]:
        """λ* in words, and what stands behind that, by the profile's `mode`: a ladder only knows
        between which of its rates λ* lies."""
        if self.at_least:
            return f"at least {self.estimate:g} req/s", "no rate failed"
        if self.upper is None:
            return "unknown", "no rate passed, and none failed"
        if self.estimate <= 0:
            return f"below {self.upper:g} req/s", "no rate passed"
        if mode == "search":
            interval = f"90 % interval {self.lower:.4g} to {self.upper:.4g}"
            return f"{self.estimate:.4g} req/s", interval
        between = f"between {self.lower:g} and {self.upper:g} req/s"
        return between, f"interpolated {self.estimate:.3g}"

    def text(self, mode: str) -> str:
        """bounds() in one."""
        known, behind = self.bounds(mode)
        return f"{known} ({behind})"


class Result(_Closed):
    """One benchmark's outcome. `in_flight_at_capacity` is L*, None if no rate passed; `…_low` and
    `…_high` at λ*'s bounds. `load_seconds`: with load, warm-ups too. `next_step`: what a search
    would have done with a larger budget."""

    format: int = FORMAT
    verdict: Verdict
    reason: str
    steps: tuple[Step, ...]
    capacity: Capacity
    in_flight_at_capacity: float | None
    in_flight_low: float | None = None
    in_flight_high: float | None = None
    limited_by: str
    load_seconds: float = 0.0
    next_step: str = ""
    profile: Profile
    started_at: str
    seconds: float
    server: dict[str, JsonValue]
    network: dict[str, JsonValue]
    versions: dict[str, str]

    def step_at_required_rate(self) -> Step | None:
        """The step that the gate judges; None if the run ended before it."""
        wanted = self.profile.slo.required_rate
        return next((step for step in self.steps if step.rate_asked == wanted), None)


def parse_result(data: str | Mapping[str, Any], where: str = "result") -> Result:
    """A result from JSON text or a `result` event. Raises ResultError, with both versions if
    another format wrote it."""
    if isinstance(data, str):
        try:
            fields = json.loads(data)
        except json.JSONDecodeError as error:
            raise ResultError(f"{where}: is not JSON: {error}") from None
    else:
        fields = dict(data)
    if not isinstance(fields, dict):
        raise ResultError(f"{where}: is not a JSON object")
    fields.pop("event", None)
    if fields.get("format") != FORMAT:
        raise ResultError(
            f"{where}: has format {fields.get('format')!r}, this program reads format {FORMAT}; "
            "run the benchmark again, or read it with the version that wrote it"
        )
    try:
        return Result.model_validate(fields, context=STORED)
    except ValidationError as error:
        raise ResultError(describe(error, where, Result)) from None


def load_result(path: Path) -> Result:
    """The result in a file. Raises ResultError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: can't be read: {error}") from None
    return parse_result(text, str(path))


def pack_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as gzipped JSON lines, the content of rows.jsonl.gz."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def unpack_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows in the content of a rows.jsonl.gz."""
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def rows_events(packed: bytes) -> Iterator[dict[str, Any]]:
    """rows.jsonl.gz as `rows` events, each short enough for one line of a container's log."""
    text = base64.b64encode(packed).decode()
    parts = [text[at : at + PART_CHARACTERS] for at in range(0, len(text), PART_CHARACTERS)]
    for part, data in enumerate(parts):
        yield {"event": "rows", "part": part, "of": len(parts), "data": data}


def rows_from_events(events: Iterable[Mapping[str, Any]]) -> bytes:
    """The content of rows.jsonl.gz from a run's events (others are passed over).

    Raises ResultError if a part is missing.
    """
    rows = {event["part"]: event for event in events if event.get("event") == "rows"}
    wanted = next(iter(rows.values()))["of"] if rows else 0
    missing = [part for part in range(wanted) if part not in rows]
    if missing or not rows:
        raise ResultError(f"raw rows: {len(missing)} of {wanted} parts are missing from the log")
    return base64.b64decode("".join(rows[part]["data"] for part in range(wanted)))
