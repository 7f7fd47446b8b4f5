"""One benchmark from profile to result. Runs under gevent, in the Locust process."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from loadtests.answer import Exchange, Row
from loadtests.engine import Engine, LoadTestError, parse_metrics
from loadtests.generator import Generator, Offer, WorkerLost
from loadtests.ladder import climb
from loadtests.profile import Profile
from loadtests.result import Result, Step, pack_rows
from loadtests.search import Search, sized
from loadtests.search import in_flight_at as at_rate
from loadtests.verdict import (
    Window,
    capacity,
    hit_share,
    in_flight_at,
    judge,
    limited_by,
    overall,
    prefix_hits,
    restarted,
    why_again,
)

Progress = Callable[[str, dict[str, Any]], None]


def run(
    profile: Profile,
    progress: Progress,
    on_end: Callable[[Exchange], None],
    on_row: Callable[[Row], None],
    offer: Offer | None = None,
) -> tuple[Result, bytes]:
    """Runs the ladder; the result, and the content of rows.jsonl.gz.

    `progress` gets a sentence and its numbers, `on_end` each request as it ends, `on_row` the
    measured ones once their window is over; `offer` sends a window's plan, if not this process.
    Raises LoadTestError if the engine can't be measured.
    """
    started = time.time()
    clock_ns = time.perf_counter_ns()
    engine = Engine(profile.base_url, profile.timeout_s)
    facts = engine.facts(profile.model)
    for name in profile.models or ():
        engine.facts(name)
    generator = Generator(profile, engine, on_end, offer)
    planner = generator.planner
    length = planner.longest
    if facts.max_model_len is not None and length > facts.max_model_len:
        raise LoadTestError(
            "PromptTooLong",
            f"prompt and answer have up to {length} tokens, the engine takes {facts.max_model_len}",
            "Shorten prompt_tokens or output_tokens, or raise --max-model-len.",
        )
    generator.calibrate()
    rows: list[Row] = []
    loads: list[Window] = []

    def reading() -> Any:
        text = engine.get("/metrics").decode("utf-8", "replace")
        return parse_metrics(text, profile.model, time.perf_counter_ns())

    def measure_for(rate: float, repeat: int, warmup_s: float, seconds: float) -> Window:
        generator.profile = planner.profile = sized(profile, warmup_s, seconds)
        return measure(rate, repeat)

    def measure(rate: float, repeat: int) -> Window:
        before = [window for window in loads if window.rate == rate]
        again = f" again: {why_again(before, profile)}" if before else ""
        progress(f"{rate:g} req/s: load starts{again}", {"rate": rate, "repeat": repeat})
        window = generator.window(rate, repeat)
        loads.append(window)
        rows.extend(window.rows)
        for row in window.measured:
            on_row(row)
        return window

    search = Search(profile, measure_for) if profile.mode == "search" else None
    before = reading()
    by_rate: dict[float, Step] = {}
    lost = ""
    try:
        for step in search.run() if search else climb(profile, measure):
            by_rate[step.rate_asked] = step
            progress(_sentence(step), _numbers(step))
    except WorkerLost as error:
        lost = str(error)
        if error.window.measured:  # by the others; shown for what it is worth
            rows.extend(error.window.rows)
            by_rate[error.window.rate] = judge([error.window], profile, [lost])
        if not by_rate:
            raise
    steps = search.steps() if search and not lost else [by_rate[r] for r in sorted(by_rate)]
    gone = ""
    try:
        after = reading()
    except LoadTestError as error:  # the requests that it left unanswered are counted
        after, gone = [before, *generator.samples][-1], str(error)

    spoiled = lost or ("" if any(step.verdict == "fail" for step in steps) else gone)
    if not spoiled and not profile.shares_prefixes:
        spoiled = prefix_hits(before, after, generator.tokens.template, len(rows))
    if restarted([before, *generator.samples, after]):
        spoiled = "the engine restarted during the run"
    verdict, reason = overall(steps, profile, spoiled)
    rates = search.capacity() if search else capacity(steps, profile.slo)
    result = Result(
        verdict=verdict,
        reason=reason,
        steps=tuple(steps),
        capacity=rates,
        in_flight_at_capacity=at_rate(rates.estimate, steps)
        if search
        else in_flight_at(rates, steps),
        in_flight_low=at_rate(rates.lower, steps),
        in_flight_high=at_rate(rates.upper, steps) if rates.upper else None,
        limited_by=limited_by(steps),
        load_seconds=round(sum(_load_s(window) for window in loads), 1),
        next_step=search.next_step if search else "",
        profile=profile,
        started_at=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 1),
        server={
            "version": facts.version,
            "model": facts.model,
            "root": facts.root,
            "max_model_len": facts.max_model_len,
            "server": facts.server,
            "prompt_tokens_per_word": round(generator.tokens.per_word, 3),
            "template_tokens": round(generator.tokens.template, 1),
            # Of the prompt tokens: what repeats by the plan, and what the engine's cache had.
            "prefix_share_asked": round(planner.repeated_tokens / max(1, planner.tokens), 4),
            "prefix_share_hit": hit_share(before, after),
        },
        network={
            "path": "direct",
            "address": f"{generator.address[0]}:{generator.address[1]}",
            "reused_connections": round(sum(r.reused for r in rows) / max(1, len(rows)), 3),
            # To turn the rows' monotonic ns into wall-clock time.
            "clock_monotonic_ns": clock_ns,
            "clock_unix_ns": int(started * 1e9),
        },
        versions={
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            **{name: importlib.metadata.version(name) for name in ("locust", "gevent")},
        },
    )
    packed = pack_rows([row.as_json() for row in rows] + [s.as_json() for s in generator.samples])
    return result, packed


def _load_s(window: Window) -> float:
    """Warm-up and measured window, s."""
    first = min((row.scheduled for row in window.rows), default=window.start)
    return (window.end - min(first, window.start)) / 1e9


def _sentence(step: Step) -> str:
    p95 = "infinite" if step.ttft_ms.p95 is None else f"{step.ttft_ms.p95:.0f} ms"
    told = "" if "TTFT p95" in step.reason else f"TTFT p95 {p95}, "
    return (
        f"{step.rate_asked:g} req/s: {step.verdict}: {step.reason}; "
        f"{told}{step.in_flight_mean:.1f} in flight"
    )


def _numbers(step: Step) -> dict[str, Any]:
    return {
        "rate": step.rate_asked,
        "verdict": step.verdict,
        "ttft_p95_ms": step.ttft_ms.p95,
        "attainment": step.attainment,
        "scheduled": step.scheduled,
        "failed": step.failed,
        "in_flight": step.in_flight_mean,
        "send_lag_p99_ms": step.send_lag_p99_ms,
        "generator_cpu": step.generator_cpu,
    }
