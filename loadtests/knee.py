"""λ* and its interval from windows at several rates. Pure.

Attainment falls with the rate: an isotonic fit (pool adjacent violators) says so, and λ* is where
it crosses the SLO, interpolated in log miss share over log rate. The interval comes from draws of
each attainment's posterior (Jeffreys), with requests that are alike counted for less.

The sharp part is a control variate (Lavenberg & Welch 1981). Whether a short window misses much or
little is mostly chance of its arrivals, and those are known. So the same arrivals are sent through
a model queue in virtual time: one server, work in proportion to the tokens asked (Lindley 1952).
Its speed is fitted to the times measured. What the model did in these windows, less what it does
in the long run, is luck, and is taken off to the degree that model and engine agree. A model that
is wrong agrees little, and then little is taken off.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from loadtests.arrivals import draw
from loadtests.intervals import design_effect, wilson
from loadtests.profile import Profile
from loadtests.verdict import Window, meets, nearness

DRAWS = 200
LONG_RUN = 60_000  # arrivals
MODEL_NEAR = (0.7, 1.4)  # windows at such multiples of λ* teach the model
MODEL_SPEEDS = tuple(0.98 * 2.5 ** (i / 19) for i in range(20))  # tried, as multiples of λ*
MODEL_MISSES = 10  # fewer teach nothing
MODEL_AGREES = 0.3
CLIFF = (0.99, 0.5)


@dataclass(frozen=True)
class Seen:
    """What the fit needs of a window: `times` (s) and `sizes` (1 on average) of all requests, and
    of the measured ones, the last, how `near` each came to a miss, and `miss` (1 or 0)."""

    rate: float
    times: tuple[float, ...]
    sizes: tuple[float, ...]
    near: tuple[float, ...]
    miss: tuple[float, ...]

    @property
    def requests(self) -> int:
        """Measured."""
        return len(self.miss)


@dataclass(frozen=True)
class Point:
    """Attainment at a rate; `weight`: independent requests that would say as much."""

    rate: float
    attainment: float
    weight: float
    requests: int


@dataclass(frozen=True)
class Knee:
    """λ* and its 90 % interval. `below` and `above`: the rates tried on both sides of it, None
    where there is none. `agreement`: correlation of model and engine, 0: no model was used."""

    estimate: float
    lower: float
    upper: float
    below: Point | None
    above: Point | None
    agreement: float
    warnings: tuple[str, ...]


def seen(window: Window, profile: Profile) -> Seen:
    """A window, reduced."""
    rows = sorted(window.rows, key=lambda row: (row.phase == "measure", row.scheduled))
    measured = [row for row in rows if row.phase == "measure"]
    mean = sum(row.tokens_asked for row in rows) / len(rows)
    return Seen(
        window.rate,
        tuple(row.scheduled / 1e9 for row in rows),
        tuple(row.tokens_asked / mean for row in rows),
        tuple(nearness(row, profile.slo) for row in measured),
        tuple(float(not meets(row, profile.slo)) for row in measured),
    )


def find(windows: Sequence[Seen], profile: Profile) -> Knee:
    """λ* from all windows so far (one at least)."""
    target = profile.slo.attainment
    points = measured_points(windows)
    rough = _crossing(points, isotonic(points), target)
    agreement = 0.0
    if profile.arrival != "trace":
        points, agreement = _without_luck(windows, points, rough, profile)
    fit = isotonic(points)
    estimate = _crossing(points, fit, target)
    rng = random.Random(1)  # the same answer for the same windows
    drawn = sorted(
        _crossing(points, isotonic(_posterior(points, rng)), target) for _ in range(DRAWS)
    )
    holds = [point for point, share in zip(points, fit, strict=True) if share >= target]
    misses = points[len(holds) :]
    return Knee(
        estimate,
        min(estimate, drawn[round(0.05 * DRAWS)]),
        max(estimate, drawn[round(0.95 * DRAWS) - 1]),
        holds[-1] if holds else None,
        misses[0] if misses else None,
        agreement,
        _warnings(measured_points(windows)),
    )


def measured_points(windows: Sequence[Seen]) -> list[Point]:
    """Attainment by rate, ascending, as measured; with half a miss and half a hit more (Jeffreys),
    since none in fifty isn't none."""
    points = []
    for rate in sorted({window.rate for window in windows}):
        here = [window for window in windows if window.rate == rate]
        requests = sum(window.requests for window in here)
        effect = sum(design_effect(w.near) * w.requests for w in here) / requests
        weight = requests / effect
        missed = sum(sum(window.miss) for window in here) / effect
        points.append(Point(rate, 1 - (missed + 0.5) / (weight + 1), weight, requests))
    return points


def isotonic(points: Sequence[Point]) -> list[float]:
    """The attainments that never rise and lie nearest (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for point in points:
        share, weight, count = point.attainment, point.weight, 1
        while pools and pools[-1][0] < share:
            before, its_weight, its_count = pools.pop()
            share = (before * its_weight + share * weight) / (its_weight + weight)
            weight, count = its_weight + weight, its_count + count
        pools.append((share, weight, count))
    return [share for share, _, count in pools for _ in range(count)]


def _crossing(points: Sequence[Point], fit: Sequence[float], target: float) -> float:
    """Where the fit crosses the target; the outermost rate if it doesn't."""
    above = sum(share >= target for share in fit)
    if above in (0, len(fit)):
        return points[0 if above == 0 else -1].rate
    left, right = points[above - 1].rate, points[above].rate
    low, high, wanted = (
        math.log(max(1e-9, 1 - share)) for share in (fit[above - 1], fit[above], target)
    )
    share = min(1.0, max(0.0, (wanted - low) / (high - low)))
    return float(left * (right / left) ** share)


def _posterior(points: Sequence[Point], rng: random.Random) -> list[Point]:
    return [
        Point(
            point.rate,
            rng.betavariate(
                max(1e-3, point.attainment * point.weight),
                max(1e-3, (1 - point.attainment) * point.weight),
            ),
            point.weight,
            point.requests,
        )
        for point in points
    ]


def _warnings(points: Sequence[Point]) -> tuple[str, ...]:
    found = []
    for left, right in pairwise(points):
        (_, best), (worst, _) = (wilson(p.attainment * p.weight, p.weight) for p in (left, right))
        if best < worst:
            found.append(
                f"not monotone: {left.rate:.4g} req/s does worse ({left.attainment:.0%}) than "
                f"{right.rate:.4g} ({right.attainment:.0%}): something else changed meanwhile"
            )
        falls = left.attainment >= CLIFF[0] and right.attainment <= CLIFF[1]
        if falls and right.rate < 1.2 * left.rate:
            found.append(
                f"a cliff: attainment falls from {left.attainment:.0%} to {right.attainment:.0%} "
                f"between {left.rate:.4g} and {right.rate:.4g} req/s; keep a distance from λ*"
            )
    return tuple(found)


def _without_luck(
    windows: Sequence[Seen], points: list[Point], rough: float, profile: Profile
) -> tuple[list[Point], float]:
    """The points near λ*, corrected by the model queue; and its correlation with the engine."""
    near = [w for w in windows if MODEL_NEAR[0] < w.rate / rough < MODEL_NEAR[1]]
    missed = [m for window in near for m in window.miss]
    if not MODEL_MISSES <= sum(missed) < len(missed):
        return points, 0.0
    agreement, work_s, limit_s = _fit_model(near, rough)
    if agreement < MODEL_AGREES:
        return points, 0.0
    model = [[float(wait > limit_s) for wait in _waits(w, work_s)] for w in near]
    theirs = [m for window in model for m in window]
    share = _covariance(missed, theirs) / max(1e-12, _covariance(theirs, theirs))
    share = min(1.0, max(0.0, share))
    corrected = []
    for point in points:
        here = [i for i, window in enumerate(near) if window.rate == point.rate]
        if not here:
            corrected.append(point)
            continue
        rest = [[m - share * t for m, t in zip(near[i].miss, model[i], strict=True)] for i in here]
        expected = _long_run_misses(
            profile.arrival, profile.gamma_shape, point.rate, work_s, limit_s, near[here[0]].sizes
        )
        miss = sum(map(sum, rest)) / point.requests + share * expected
        miss = min(1 - 1e-4, max(1e-4, miss))
        variance = (
            sum(_covariance(e, e) * design_effect(e) * len(e) for e in rest) / point.requests**2
        )
        # The model is fitted to these windows too: never trust it fully.
        least = miss * (1 - miss) / point.requests * 0.5
        weight = miss * (1 - miss) / max(variance, least)
        corrected.append(Point(point.rate, 1 - miss, weight, point.requests))
    return corrected, agreement


def _fit_model(windows: Sequence[Seen], rough: float) -> tuple[float, float, float]:
    """Correlation, seconds of work a request, and the wait (s) that stands for the limit: so that
    the model misses as often as the engine did."""
    near = [value for window in windows for value in window.near]
    hits = len(near) - round(sum(sum(window.miss) for window in windows))
    best = (0.0, 0.0, 0.0)
    for speed in MODEL_SPEEDS:
        work_s = 1 / (rough * speed)
        waits = [wait for window in windows for wait in _waits(window, work_s)]
        limit_s = sorted(waits)[hits - 1]
        if limit_s <= 0:
            continue
        theirs = [min(1.0, max(0.0, (wait / limit_s - 0.25) / 0.75)) for wait in waits]
        spread = _covariance(near, near) * _covariance(theirs, theirs)
        agreement = _covariance(near, theirs) / math.sqrt(spread) if spread > 0 else 0.0
        if agreement > best[0]:
            best = (agreement, work_s, limit_s)
    return best


def _waits(window: Seen, work_s: float) -> list[float]:
    """How long each measured request of a window would wait in the model queue, s."""
    waits = _lindley(window.times, window.sizes, work_s)
    return waits[len(waits) - window.requests :]


def _lindley(times: Sequence[float], sizes: Sequence[float], work_s: float) -> list[float]:
    wait, before = 0.0, times[0]
    waits = []
    for time, size in zip(times, sizes, strict=True):
        wait = max(0.0, wait - (time - before))
        before = time
        waits.append(wait)
        wait += size * work_s
    return waits


def _long_run_misses(
    arrival: str,
    gamma_shape: float,
    rate: float,
    work_s: float,
    limit_s: float,
    sizes: tuple[float, ...],
) -> float:
    """The model's share of misses in the long run."""
    times = _long_arrivals(arrival, gamma_shape)
    if max(sizes) - min(sizes) < 1e-9:
        drawn: Sequence[float] = (1.0,) * len(times)
    else:
        drawn = random.Random(2).choices(sizes, k=len(times))
    waits = _lindley(times, drawn, work_s * rate)  # in units of 1/rate
    return sum(wait > limit_s * rate for wait in waits) / len(waits)


@lru_cache(maxsize=4)
def _long_arrivals(arrival: str, gamma_shape: float) -> tuple[float, ...]:
    """Arrivals at rate 1, always the same ones."""
    return tuple(draw(arrival, 1.0, LONG_RUN, "long run", gamma_shape))  # type: ignore[arg-type]


def _covariance(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / len(a)
