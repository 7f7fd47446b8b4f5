"""λ* and its interval from windows at several rates. Pure.

Far from λ*, attainment by rate with an isotonic fit (pool adjacent violators) says where to look.

Near it, counting misses is a poor estimate: they come in bursts, and whether a window has one more
or less is mostly chance of its arrivals. So the windows are read as visits to states, n requests
there: how long the engine was in each, how often a request left in it, how many arrivals found it
and missed. In the long run the engine goes up from n to n + 1 as often as it comes down, and
arrivals by Poisson come up at the asked rate in every state and see the states as they are in time
(PASTA, Wolff 1982). So

    p(n + 1) / p(n) = rate / (leaving n + 1 per second there),   misses = Σ p(n) · misses found in n

whatever the engine is, and whatever n counts: all in flight, or only those without a first token,
which is the queue where answers are long. The one with the smaller error is taken. (Other arrivals
see other states than time does: of them the p are counted.)

That takes off the luck of the arrivals and the start from empty. It asks two things of the engine:
with more there it doesn't let fewer go a second, nor miss less often (isotonic fits again, which is
where most of the noise goes), and both change little within NEAR of λ*, where all windows are
pooled; rates on both sides of λ* cancel what they do change.

The interval is a jackknife over blocks of consecutive requests.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest

from loadtests.answer import Row
from loadtests.intervals import design_effect, wilson
from loadtests.profile import Profile
from loadtests.verdict import Window, meets, nearness

NEAR = 1.2  # windows at rates within this ratio of λ* are pooled, the nearer the more
BLOCK_REQUESTS = 100  # at least: what belongs together in a queue should lie in one block
BLOCKS = 40  # at most, of the jackknife
BLOCKS_LEAST = 8  # with fewer the interval is that between the verdicts
TAIL = 0.03  # share of the time with most in flight, in which ends a second are taken for constant
PASSES = 5  # of the fit, each around the estimate before
# Two-sided 90 % of Student's t is 1.68 with 40 blocks, 1.89 with 8. Searches that stop when their
# interval is narrow stop too soon more often than too late; so many hold λ*: docs/accuracy.md.
T90 = 1.9
CLIFF = (0.99, 0.5)


@dataclass(frozen=True)
class Visits:
    """Of each state n = 0, 1, … requests: seconds in it, arrivals that found it, requests that left
    in it, and how many of the arrivals missed the SLO."""

    seconds: list[float]
    arrivals: list[float]
    ends: list[float]
    misses: list[float]


@dataclass(frozen=True)
class Seen:
    """What the fit needs of a window: its visits in blocks of time, to states of requests in flight
    and of those that wait for their first token; and of its measured requests how `near` each came
    to a miss, and `miss` (1 or 0)."""

    rate: float
    in_flight: tuple[Visits, ...]
    waiting: tuple[Visits, ...]
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
    where there is none. `fitted`: from windows near λ*; if not, the interval is only that between
    the rates that pass and fail for themselves (0, or the highest tried, where none does)."""

    estimate: float
    lower: float
    upper: float
    below: Point | None
    above: Point | None
    fitted: bool
    warnings: tuple[str, ...]


def seen(window: Window, profile: Profile) -> Seen:
    """A window, reduced."""
    rows = sorted(window.rows, key=lambda row: row.scheduled)
    measured = [row for row in rows if row.phase == "measure"]
    return Seen(
        window.rate,
        tuple(_visits(window, profile, lambda row: row.end)),
        tuple(_visits(window, profile, _first)),
        tuple(nearness(row, profile.slo) for row in measured),
        tuple(float(not meets(row, profile.slo)) for row in measured),
    )


def _first(row: Row) -> int | None:
    """When a request stopped waiting for its first token; for one that got none, its end."""
    firsts = [t for t in (row.first_reasoning, row.first_content) if t is not None]
    return min(firsts, default=row.end)


def _visits(window: Window, profile: Profile, left: Callable[[Row], int | None]) -> list[Visits]:
    """The warm-up's requests count as there, but what happens then is no visit."""
    steps = [(row.scheduled, 1, float(not meets(row, profile.slo))) for row in window.rows]
    steps += [(max(at, row.scheduled + 1), -1, 0.0) for row in window.rows if (at := left(row))]
    count = max(1, len(window.measured) // BLOCK_REQUESTS)
    length = window.end - window.start
    steps += [(window.start + length * (i + 1) // count, 0, 0.0) for i in range(count)]
    steps.sort()
    size = 1 + max(accumulate(step for _, step, _ in steps))
    blocks = [Visits(*([0.0] * size for _ in range(4))) for _ in range(count)]
    n, now, here = 0, window.start, iter(blocks)
    block = next(here)
    for at, step, miss in steps:
        if at >= window.start:
            block.seconds[n] += (at - now) / 1e9
            now = at
            if step > 0:
                block.arrivals[n] += 1
                block.misses[n] += miss
            elif step < 0:
                block.ends[n] += 1
            elif (following := next(here, None)) is not None:
                block = following
            else:
                break
        n += step
    return blocks


def find(windows: Sequence[Seen], profile: Profile) -> Knee:
    """λ* from all windows so far (one at least)."""
    target = 1 - profile.slo.attainment
    points = measured_points(windows)
    fit = isotonic([1 - point.attainment for point in points], [p.weight for p in points])
    holds = sum(share <= target for share in fit)
    estimate = _crossing(points, fit, target)
    bounds = [(p.rate, *wilson(p.attainment * p.weight, p.weight)) for p in points]
    knee = Knee(
        estimate,
        max((r for r, low, _ in bounds if low >= 1 - target and r <= estimate), default=0.0),
        min(
            (r for r, _, high in bounds if high < 1 - target and r >= estimate),
            default=points[-1].rate,
        ),
        points[holds - 1] if holds else None,
        points[holds] if holds < len(points) else None,
        False,
        _warnings(points),
    )
    # The later turns of a conversation come when the one before has been answered.
    poisson = profile.arrival == "poisson" and profile.conversations is None
    fits = [
        _fit(windows, of, target, poisson, estimate)
        for of in (lambda window: window.in_flight, lambda window: window.waiting)
    ]
    best = min((found for found in fits if found is not None), default=None)
    if best is None:
        return knee
    error, estimate = best
    return replace(
        knee,
        estimate=estimate,
        lower=estimate * math.exp(-T90 * error),
        upper=estimate * math.exp(T90 * error),
        below=max((p for p in points if p.rate <= estimate), key=lambda p: p.rate, default=None),
        above=min((p for p in points if p.rate > estimate), key=lambda p: p.rate, default=None),
        fitted=True,
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


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The values that never fall and lie nearest (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] > value:
            before, its_weight, its_count = pools.pop()
            total = its_weight + weight
            value = (before * its_weight + value * weight) / total if total else value
            weight, count = total, its_count + count
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]


def _crossing(points: Sequence[Point], misses: Sequence[float], target: float) -> float:
    """Where the misses cross the target, interpolated in log miss share over log rate; the
    outermost rate if they don't."""
    below = sum(share <= target for share in misses)
    if below in (0, len(misses)):
        return points[0 if below == 0 else -1].rate
    left, right = points[below - 1].rate, points[below].rate
    low, high = (math.log(max(1e-9, share)) for share in misses[below - 1 : below + 1])
    share = min(1.0, max(0.0, (math.log(target) - low) / (high - low)))
    return float(left * (right / left) ** share)


def _nearness(rate: float, estimate: float) -> float:
    """How much a window at a rate says about λ* (Epanechnikov's kernel)."""
    return max(0.0, 1 - (math.log(rate / estimate) / math.log(NEAR)) ** 2)


def _fit(
    windows: Sequence[Seen],
    of: Callable[[Seen], Sequence[Visits]],
    target: float,
    poisson: bool,
    estimate: float,
) -> tuple[float, float] | None:
    """Standard error of log λ*, and λ*, by visits to one kind of states; None if these don't
    tell."""
    ordered = sorted(windows, key=lambda window: window.rate)
    blocks: list[tuple[float, Visits]] = []
    for _ in range(PASSES):
        near = [(share, w) for w in ordered if (share := _nearness(w.rate, estimate)) > 0]
        blocks = [(share, block) for share, window in near for block in of(window)]
        if (better := _rate_of(_sum(blocks), target, poisson, estimate)) is None:
            return None
        estimate = better
    error = _error(blocks, target, poisson, estimate)
    return None if error is None else (error, estimate)


def _error(
    blocks: Sequence[tuple[float, Visits]], target: float, poisson: bool, estimate: float
) -> float | None:
    """Standard error of log λ* by a jackknife over blocks; None where these can't tell."""
    count = min(BLOCKS, len(blocks))
    if count < BLOCKS_LEAST:
        return None
    cuts = [round(i * len(blocks) / count) for i in range(count + 1)]
    groups = [(1.0, _sum(blocks[a:b])) for a, b in pairwise(cuts)]
    logs = []
    for i in range(count):
        rate = _rate_of(_sum(groups[:i] + groups[i + 1 :]), target, poisson, estimate)
        if rate is None:
            return None
        logs.append(math.log(rate))
    mean = sum(logs) / count
    return math.sqrt(sum((value - mean) ** 2 for value in logs) * (count - 1) / count)


def _sum(parts: Sequence[tuple[float, Visits]]) -> Visits:
    """Of visits, each by its weight."""

    def added(lists: Iterable[list[float]]) -> list[float]:
        weighed = ([w * x for x in values] for (w, _), values in zip(parts, lists, strict=True))
        return [sum(column) for column in zip_longest(*weighed, fillvalue=0.0)]

    return Visits(
        added(part.seconds for _, part in parts),
        added(part.arrivals for _, part in parts),
        added(part.ends for _, part in parts),
        added(part.misses for _, part in parts),
    )


def _rate_of(visits: Visits, target: float, poisson: bool, around: float) -> float | None:
    """The rate at which `target` of the requests miss, by these visits; None if it isn't near."""
    if not sum(visits.misses) > 0 or sum(time > 0 for time in visits.seconds) < 2:
        return None
    ratios, found = _states(visits, poisson)
    low, high = around / NEAR, around * NEAR
    if not _misses(ratios, found, low) < target < _misses(ratios, found, high):
        return None
    for _ in range(20):
        middle = math.sqrt(low * high)
        if _misses(ratios, found, middle) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _states(visits: Visits, poisson: bool) -> tuple[list[float], list[float]]:
    """By state n: p(n + 1) / p(n), but for the rate; and the share of misses among those who found
    n. Of the states with most in flight, few visits tell: they share one ratio."""
    there = [n for n, time in enumerate(visits.seconds) if time > 0]
    first, last = there[0], there[-1] - there[0]
    seconds, arrivals, ends, misses = (
        values[first : there[-1] + 1]
        for values in (visits.seconds, visits.arrivals, visits.ends, visits.misses)
    )
    tail, least = last, TAIL * sum(seconds)
    while tail > 1 and sum(seconds[tail:]) < least:
        tail -= 1

    if poisson:
        parts = [(ends[n], seconds[n]) for n in range(1, tail)]
        parts.append((sum(ends[tail:]), sum(seconds[tail:])))
        down = isotonic([e / s if s else 0.0 for e, s in parts], [s for _, s in parts])
        ratios = [1 / max(rate, 1e-9) for rate in down]
        ratios += ratios[-1:] * (last - len(ratios))
    else:
        mean = sum(arrivals) / sum(seconds)
        ratios = [b / max(a, 1e-9) / mean for a, b in pairwise(arrivals)]
    shares = [m / a if a else 1.0 for m, a in zip(misses, arrivals, strict=True)]
    return ratios, isotonic(shares, arrivals)


def _misses(ratios: Sequence[float], found: Sequence[float], rate: float) -> float:
    """Share of the requests that miss at a rate; beyond the last state seen all goes on alike."""
    beyond = rate * ratios[-1]
    if beyond >= 1:
        return 1.0
    weights = list(accumulate(ratios, lambda weight, ratio: weight * rate * ratio, initial=1.0))
    weights[-1] /= 1 - beyond
    return sum(w * f for w, f in zip(weights, found, strict=True)) / sum(weights)


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
