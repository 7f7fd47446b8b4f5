"""Does a window of load meet the SLO, can it be trusted, and what capacity follows. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from catalog.model import Slo
from loadtests.answer import Row
from loadtests.engine import Sample
from loadtests.intervals import (
    design_effect,
    growth,
    quantile,
    quantile_interval,
    wilson,
)
from loadtests.profile import Profile
from loadtests.result import Capacity, ModelStep, Quantiles, ServerLoad, Step, Verdict

LAG_FLOOR_MS = 5.0
LAG_SHARE_OF_TTFT = 0.02
ACHIEVED_LEAST = 0.99
GENERATOR_CPU_MOST = 0.80
STOOD_STILL_MOST = 0.01
PREFIX_HITS_MOST = 0.01
WRONG_LENGTH_MOST = 0.01
# A window that grows: a significant slope, and a growth that matters beside the SLO.
SLOPE_SHARE_OF_TTFT = 0.25
SLOPE_SHARE_OF_IN_FLIGHT = 1.0
# From here to the limit, as shares of it, a request counts as near a miss. A queue near its knee
# that happens to miss nothing still shows there how its requests hang together.
NEAR = 0.25


@dataclass(frozen=True)
class Window:
    """Load at one rate, measured once. Rows of its warm-up are in `rows` too. Times in ns.

    `cpu`: share of one core that the generator used. `samples`: the engine's metrics meanwhile.
    `problem`: why it can't be trusted, where the workers that offered it already know.
    """

    rate: float
    start: int
    end: int
    rows: tuple[Row, ...]
    cpu: float
    samples: tuple[Sample, ...]
    problem: str = ""

    @property
    def measured(self) -> list[Row]:
        """The rows that count."""
        return [row for row in self.rows if row.phase == "measure"]

    @property
    def seconds(self) -> float:
        """Length of the measured window."""
        return (self.end - self.start) / 1e9


def quantiles(values: Sequence[float]) -> Quantiles:
    """p50, p95 and p99 of values in ms."""
    p50, p95, p99 = (quantile(values, q) for q in (0.5, 0.95, 0.99))
    return Quantiles(p50=_round(p50), p95=_round(p95), p99=_round(p99))


def meets(row: Row, slo: Slo) -> bool:
    """Whether one request met every limit of the SLO; a failed one never does."""
    return row.ttft_ms <= slo.ttft_p95_ms and _gap_ms(row) <= slo.itl_p95_ms


def _gap_ms(row: Row) -> float:
    """The request's own p95 of its gaps, which is what the SLO's inter-token limit judges."""
    return quantile(row.token_gaps_ms, 0.95) or 0.0


def untrusted(window: Window, profile: Profile) -> str:
    """Why no verdict may be drawn from a window; empty if one may."""
    if window.problem:
        return window.problem
    rows = window.measured
    lag = _send_lag_p99_ms(rows)
    lag_most = most_lag_ms(profile.slo)
    if lag > lag_most:
        return f"the generator lagged: send lag p99 {lag:.1f} ms, at most {lag_most:.1f} allowed"
    achieved = achieved_rate(window)
    if achieved < ACHIEVED_LEAST * window.rate:
        return f"the generator sent {achieved:.2f} req/s where {window.rate:g} were asked"
    if window.cpu > GENERATOR_CPU_MOST:
        return (
            f"the generator used {window.cpu:.0%} of its core, at most "
            f"{GENERATOR_CPU_MOST:.0%} allowed"
        )
    other = [row for row in rows if row.error == "wrong_model"]
    if other:
        return f"the wrong model answered {len(other)} requests: {other[0].detail}"
    if restarted(window.samples):
        return "the engine restarted during the window"
    # Without `usage` each chunk counts as a token.
    wrong = [row for row in rows if not row.error and row.tokens_out != row.tokens_asked]
    if len(wrong) > WRONG_LENGTH_MOST * len(rows):
        return (
            f"{len(wrong)} of {len(rows)} answers don't have the tokens asked for, one has "
            f"{wrong[0].tokens_out} {'tokens' if wrong[0].usage else 'chunks, without usage,'} "
            f"and not {wrong[0].tokens_asked}: does the engine heed ignore_eos?"
        )
    return ""


def most_lag_ms(slo: Slo) -> float:
    """How late the generator may send, at the 99th percentile, in ms."""
    return max(LAG_FLOOR_MS, LAG_SHARE_OF_TTFT * slo.ttft_p95_ms)


def stood_still(late_ns: int, of_ns: int) -> str:
    """Why a generator that could do nothing for `late_ns` can't be trusted; empty if it can.

    Sends alone don't tell: between them it may stand still while answers come.
    """
    if late_ns <= STOOD_STILL_MOST * of_ns:
        return ""
    return (
        f"the generator stood still for {late_ns / 1e9:.2f} s of {of_ns / 1e9:.1f} s: it was "
        "stopped, or its machine is busy"
    )


def late_sends_that_spoil(requests: int) -> int:
    """So many late ones of a window's `requests`, and its 99th percentile is late for sure."""
    return requests - math.floor(0.99 * (requests - 1))


def achieved_rate(window: Window) -> float:
    """Requests/s that were really sent: a late last one stretches the window."""
    sent = [row.sent for row in window.measured if row.sent is not None]
    if not sent:
        return 0.0
    return len(sent) / ((max(window.end, *sent) - window.start) / 1e9)


def judge(windows: Sequence[Window], profile: Profile, discarded: Sequence[str]) -> Step:
    """One step of the ladder from its valid windows, pooled.

    Of several models each must not fail for itself, though its part may be too small for a pass.
    Where there is no valid window, pass the last invalid one: its step is invalid, for the last
    reason in `discarded`.
    """
    rows = [row for window in windows for row in window.measured]
    slo, rate = profile.slo, windows[0].rate
    met = sum(meets(row, slo) for row in rows)
    effect = effect_of(windows, slo)
    low, high = wilson(met / effect, len(rows) / effect)
    ttft_low, ttft_high = quantile_interval(
        [[r.ttft_ms for r in w.measured] for w in windows], 0.95
    )
    seconds = sum(window.seconds for window in windows)
    misses = Counter(row.error for row in rows if row.error)
    models = {
        name: _judge_model([row for row in rows if row.model == name], slo)
        for name in sorted({row.model for row in rows} if profile.models else ())
    }
    ttft = quantiles([row.ttft_ms for row in rows])
    reason = untrusted(windows[-1], profile)
    verdict: Verdict
    if reason:
        verdict = "invalid"
    else:
        verdict, reason = _decide(rows, slo, effect)
        unsteady = _unsteady(windows[-1], slo)
        if verdict != "fail" and unsteady:
            verdict, reason = "invalid", unsteady
        missed = [f"{name}: {m.reason}" for name, m in models.items() if m.verdict == "fail"]
        if verdict == "pass" and missed:
            verdict, reason = "fail", "; ".join(missed)
    chunk_gaps = [gap for row in rows for gap in row.chunk_gaps_ms]
    chunks = sum(row.chunks for row in rows)
    return Step(
        rate_asked=rate,
        rate_achieved=round(sum(achieved_rate(w) * w.seconds for w in windows) / seconds, 4),
        seconds=round(seconds, 3),
        scheduled=len(rows),
        failed=misses.total(),
        misses=dict(misses),
        ttft_ms=ttft,
        itl_ms=quantiles([gap for row in rows for gap in row.token_gaps_ms]),
        chunk_gap_ms=quantiles(chunk_gaps),
        e2e_ms=quantiles([row.e2e_ms for row in rows]),
        tokens_per_chunk=_round(
            sum(sum(row.chunk_tokens) for row in rows) / chunks if chunks else None
        ),
        tokens_in_mean=_mean([row.tokens_in for row in rows if row.tokens_in is not None]),
        tokens_out_mean=_mean([row.tokens_out for row in rows if not row.error and row.tokens_out]),
        attainment=round(met / len(rows), 4),
        attainment_low=round(low, 4),
        attainment_high=round(high, 4),
        in_flight_mean=round(sum(_in_flight(w) * w.seconds for w in windows) / seconds, 3),
        server=_server_load(windows),
        send_lag_p99_ms=round(_send_lag_p99_ms(rows), 3),
        generator_cpu=round(sum(w.cpu * w.seconds for w in windows) / seconds, 3),
        reused_connections=round(sum(row.reused for row in rows) / len(rows), 3),
        repeats=len(windows),
        discarded=tuple(discarded),
        verdict=verdict,
        reason=reason,
        models=models,
        ttft_p95_low_ms=_round(ttft_low),
        ttft_p95_high_ms=_round(ttft_high),
        design_effect=round(effect, 2),
        own_itl_p95_ms=_round(quantile([_gap_ms(row) for row in rows], 0.95)),
    )


def why_again(windows: Sequence[Window], profile: Profile) -> str:
    """Why a rate that had these windows gets another one."""
    if reason := untrusted(windows[-1], profile):
        return f"the window before doesn't count: {reason}"
    step = judge([window for window in windows if not untrusted(window, profile)], profile, ())
    if step.verdict in ("inconclusive", "invalid"):
        return f"so far {step.reason}"
    return f"so far a {step.verdict}, and λ*, which is near, isn't known well enough"


def _judge_model(rows: Sequence[Row], slo: Slo) -> ModelStep:
    met = sum(meets(row, slo) for row in rows)
    effect = design_effect([nearness(row, slo) for row in rows])
    low, high = wilson(met / effect, len(rows) / effect)
    verdict, reason = _decide(rows, slo, effect)
    return ModelStep(
        scheduled=len(rows),
        failed=sum(row.error is not None for row in rows),
        ttft_ms=quantiles([row.ttft_ms for row in rows]),
        itl_ms=quantiles([gap for row in rows for gap in row.token_gaps_ms]),
        attainment=round(met / len(rows), 4),
        attainment_low=round(low, 4),
        attainment_high=round(high, 4),
        verdict=verdict,
        reason=reason,
    )


def effect_of(windows: Sequence[Window], slo: Slo) -> float:
    """How many requests of these windows say as much as one independent one (design effect)."""
    near = [[nearness(row, slo) for row in window.measured] for window in windows]
    return sum(design_effect(w) * len(w) for w in near) / max(1, sum(map(len, near)))


def nearness(row: Row, slo: Slo) -> float:
    """0 far from the SLO's limits, 1 at a miss."""
    share = max(row.ttft_ms / slo.ttft_p95_ms, _gap_ms(row) / slo.itl_p95_ms)
    return min(1.0, max(0.0, (share - NEAR) / (1 - NEAR)))


def _decide(rows: Sequence[Row], slo: Slo, effect: float) -> tuple[Verdict, str]:
    misses = Counter(row.error for row in rows if row.error)
    met, scheduled, failed = sum(meets(row, slo) for row in rows), len(rows), misses.total()
    low, high = wilson(met / effect, scheduled / effect)
    share = f"{met} of {scheduled} requests met the SLO ({met / scheduled:.1%})"
    if wilson(failed, scheduled)[0] > slo.error_rate:
        kinds = ", ".join(f"{kind} {count}" for kind, count in misses.most_common())
        return "fail", f"{failed} of {scheduled} requests failed: {kinds}"
    if high < slo.attainment:
        ttft = _against([row.ttft_ms for row in rows], slo.ttft_p95_ms)
        gaps = _against([_gap_ms(row) for row in rows], slo.itl_p95_ms)
        return "fail", f"{share}; TTFT p95 {ttft}; ITL p95 {gaps}"
    if low >= slo.attainment and failed <= slo.error_rate * scheduled:
        return "pass", share
    return "inconclusive", (
        f"{share}, so between {low:.1%} and {high:.1%}: too few requests to say whether it is "
        f"{slo.attainment:.0%}"
        + (f" (requests in a queue are alike: {effect:.0f} count as one)" if effect >= 2 else "")
    )


def _against(values: Sequence[float], limit: float) -> str:
    p95 = quantile(values, 0.95)
    return f"{'beyond all answers' if p95 is None else f'{p95:.0f} ms'}, SLO {limit:g} ms"


def capacity(steps: Sequence[Step], slo: Slo) -> Capacity:
    """λ* from a ladder: above the highest rate that passed with all rates below it not failing,
    below the lowest that failed; between them where attainment, interpolated, crosses the SLO."""
    failed = [step for step in steps if step.verdict == "fail"]
    upper = min((step.rate_asked for step in failed), default=None)
    passed = [
        step
        for step in steps
        if step.verdict == "pass" and (upper is None or step.rate_asked < upper)
    ]
    if not passed:
        return Capacity(lower=0.0, estimate=0.0, upper=upper, at_least=False)
    best = max(passed, key=lambda step: step.rate_asked)
    if upper is None:
        rate = best.rate_asked
        return Capacity(lower=rate, estimate=rate, upper=None, at_least=True)
    worst = min(failed, key=lambda step: step.rate_asked)
    drop = best.attainment - worst.attainment
    share = (best.attainment - slo.attainment) / drop if drop > 0 else 0.0
    estimate = best.rate_asked + min(1.0, max(0.0, share)) * (upper - best.rate_asked)
    return Capacity(
        lower=best.rate_asked,
        estimate=round(estimate, 3),
        upper=upper,
        at_least=False,
        warnings=tuple(
            f"{step.rate_asked:g} req/s, which λ* may be above or below, was {step.verdict}: "
            "longer step_seconds would tell"
            for step in steps
            if best.rate_asked < step.rate_asked < upper
        ),
    )


def in_flight_at(rates: Capacity, steps: Sequence[Step]) -> float | None:
    """L*, mean requests in flight at λ*: Little's law L = λ·W with the time in the engine, W, of
    the highest step that passed. (W at λ* is a little longer: the threshold errs to the safe
    side.) None if nothing passed."""
    step = next((s for s in steps if rates.lower > 0 and s.rate_asked == rates.lower), None)
    if step is None:
        return None
    return round(step.in_flight_mean * rates.estimate / step.rate_asked, 3)


def limited_by(steps: Sequence[Step]) -> str:
    """The resource that ran out first, by the engine's metrics in the lowest step that failed:
    above it everything is short. `steps` by rate.
    """
    failed = [step for step in steps if step.verdict == "fail"]
    if not failed:
        return "nothing within the rates tried"
    load = failed[0].server
    if load is None or not load.samples:
        return "unknown: the engine gave no metrics"
    if load.preemptions > 0 or load.kv_cache_max >= 0.95:
        return f"KV cache: {load.kv_cache_max:.0%} used at most, {load.preemptions:.0f} preemptions"
    if load.waiting_mean >= 1:
        return (
            f"batch slots: {load.running_max:.0f} run at most (max_num_seqs or the token budget), "
            f"{load.waiting_mean:.1f} wait on average"
        )
    return (
        f"compute: {load.running_mean:.1f} run and {load.waiting_mean:.1f} wait on average, "
        "each step takes too long"
    )


def prefix_hits(first: Sample, last: Sample, template_tokens: float, requests: int) -> str:
    """Why the prefix cache falsifies the run; empty if it doesn't.

    An engine without these metrics may have answered all from its cache: that falsifies it too.
    The chat template's own `template_tokens` are shared by all prompts and may hit.
    """
    for metric in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"):
        if metric not in first.values.keys() & last.values.keys():
            return (
                f"the engine's /metrics has no {metric} of this model, so nothing shows that the "
                "prefix cache answered none of the prompts"
            )
    asked = last["prefix_cache_queries_total"] - first["prefix_cache_queries_total"]
    hits = last["prefix_cache_hits_total"] - first["prefix_cache_hits_total"]
    if hits - template_tokens * requests > PREFIX_HITS_MOST * max(asked, 1):
        return (
            f"the prefix cache answered {hits / max(asked, 1):.0%} of the prompt tokens: "
            "another client uses the same engine, or prompts repeat"
        )
    return ""


def hit_share(first: Sample, last: Sample) -> float | None:
    """Share of the prompt tokens that the engine's prefix cache had; None if it doesn't say."""
    asked = last["prefix_cache_queries_total"] - first["prefix_cache_queries_total"]
    hits = last["prefix_cache_hits_total"] - first["prefix_cache_hits_total"]
    return round(hits / asked, 4) if asked > 0 else None


def restarted(samples: Sequence[Sample]) -> bool:
    """Whether the engine's counters went back, so that another process answered."""
    counts = [sample["generation_tokens_total"] for sample in samples if sample.values]
    return any(b < a for a, b in pairwise(counts))


def overall(steps: Sequence[Step], profile: Profile, spoiled: str) -> tuple[Verdict, str]:
    """The gate: the SLO must hold at the required rate, in a run that can be trusted.

    `spoiled`: what falsifies the whole run, if anything.
    """
    required = profile.slo.required_rate
    step = next((s for s in steps if s.rate_asked == required), None)
    if spoiled:
        return "invalid", spoiled
    if not steps:
        return "invalid", f"budget_seconds is too little for a window at {required:g} req/s"
    if step is None:
        last = steps[-1]
        return "invalid", f"the run ended before {required:g} req/s: {last.reason}"
    below = [s for s in steps if s.rate_asked < required and s.verdict == "fail"]
    if step.verdict == "pass" and below:
        return "inconclusive", (
            f"{required:g} req/s passed but {below[0].rate_asked:g} req/s failed: {below[0].reason}"
        )
    return step.verdict, f"at {required:g} req/s {step.reason}"


def _send_lag_p99_ms(rows: Sequence[Row]) -> float:
    lags = [(row.sent - row.scheduled) / 1e6 for row in rows if row.sent is not None]
    return quantile(lags, 0.99) or 0.0


def _in_flight(window: Window) -> float:
    """Mean over the window of the requests between sending and end, by integrating over time."""
    total = 0
    for row in window.rows:
        if row.sent is not None and row.end is not None:
            total += max(0, min(row.end, window.end) - max(row.sent, window.start))
    return total / (window.end - window.start)


def _unsteady(window: Window, slo: Slo) -> str:
    """Why the window was no steady state; empty if it may have been."""
    rows = [row for row in window.measured if math.isfinite(row.ttft_ms)]
    longer = growth([(row.scheduled / 1e9, row.ttft_ms) for row in rows])
    if longer > SLOPE_SHARE_OF_TTFT * slo.ttft_p95_ms:
        return f"not steady: TTFT grew by {longer:.0f} ms over the window; warm up or load longer"
    samples = [s for s in window.samples if window.start <= s.time_ns <= window.end and s.values]
    counts = [s["num_requests_running"] + s["num_requests_waiting"] for s in samples]
    more = growth([(s.time_ns / 1e9, count) for s, count in zip(samples, counts, strict=True)])
    if counts and more > max(4.0, SLOPE_SHARE_OF_IN_FLIGHT * sum(counts) / len(counts)):
        return f"not steady: requests in flight grew by {more:.0f}; warm up or load longer"
    return ""


def _server_load(windows: Sequence[Window]) -> ServerLoad | None:
    series = [
        [s for s in window.samples if window.start <= s.time_ns <= window.end and s.values]
        for window in windows
    ]
    samples = [sample for window in series for sample in window]
    if not samples:
        return None

    def increase(metric: str) -> float:
        return sum(s[-1][metric] - s[0][metric] for s in series if s)

    running = [sample["num_requests_running"] for sample in samples]
    waiting = [sample["num_requests_waiting"] for sample in samples]
    asked = increase("prefix_cache_queries_total")
    return ServerLoad(
        samples=len(samples),
        running_mean=round(sum(running) / len(running), 3),
        running_max=max(running),
        waiting_mean=round(sum(waiting) / len(waiting), 3),
        waiting_max=max(waiting),
        kv_cache_max=round(max(sample["kv_cache_usage_perc"] for sample in samples), 4),
        preemptions=increase("num_preemptions_total"),
        prefix_hit_share=round(increase("prefix_cache_hits_total") / asked, 4) if asked else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return _round(sum(values) / len(values)) if values else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
