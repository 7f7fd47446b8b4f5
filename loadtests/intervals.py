"""How far a figure from a sample can be trusted, where requests that follow each other in a queue
are alike. Pure."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from catalog.offered_load import Z

DRAWS = 200
BLOCKS = 20  # of a window, for its bootstrap and its trend
TREND_T = 3.5
T = TypeVar("T")


def wilson(successes: float, of: float) -> tuple[float, float]:
    """Lower and upper bound of a share, each at 95 % (Wilson 1927, score interval)."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = successes / of, Z * Z
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile, linearly interpolated; None if there are no values or it is infinite."""
    if not values:
        return None
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    if math.isinf(above):
        return None
    return below + (above - below) * (at - math.floor(at))


def design_effect(series: Sequence[float]) -> float:
    """By how much correlation widens the variance of a mean: 1 + 2 Σ ρ(k), so that n samples say
    as much as n / effect independent ones.

    Summed by pairs of lags until one is not positive (Geyer 1992, initial positive sequence).
    """
    n = len(series)
    mean = sum(series) / max(1, n)
    off = [value - mean for value in series]
    variance = sum(value * value for value in off)
    if n < 4 or variance < 1e-12 * n:
        return 1.0

    def correlation(lag: int) -> float:
        return sum(a * b for a, b in zip(off, off[lag:], strict=False)) / variance

    effect = 1.0
    for lag in range(1, n // 2 - 1, 2):
        pair = correlation(lag) + correlation(lag + 1)
        if pair <= 0:
            break
        effect += 2 * pair
    return max(1.0, effect)


def quantile_interval(
    windows: Sequence[Sequence[float]], q: float
) -> tuple[float | None, float | None]:
    """The 90 % interval of a quantile by a block bootstrap: blocks of consecutive values are drawn
    again, so that what hangs together stays together (Künsch 1989). None: infinite."""
    blocks = [block for window in windows for block in _blocks(window)]
    if len(blocks) < 2:
        return None, None
    rng = random.Random(1)  # the same answer for the same rows
    found = sorted(
        math.inf if value is None else value
        for value in (
            quantile([v for block in rng.choices(blocks, k=len(blocks)) for v in block], q)
            for _ in range(DRAWS)
        )
    )
    low, high = found[round(0.05 * DRAWS)], found[round(0.95 * DRAWS) - 1]
    return (None if math.isinf(low) else low), (None if math.isinf(high) else high)


def growth(points: Sequence[tuple[float, float]]) -> float:
    """By how much y grew from the first to the last x of (x, y), by a line through the means of
    blocks; 0 if its slope is not significant. Blocks, since single values correlate."""
    means = [
        (sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block))
        for block in _blocks(sorted(points))
    ]
    n = len(means)
    if n < 8:
        return 0.0
    mean_x, mean_y = sum(x for x, _ in means) / n, sum(y for _, y in means) / n
    sxx = sum((x - mean_x) ** 2 for x, _ in means)
    if sxx == 0:
        return 0.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in means) / sxx
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in means)
    error = math.sqrt(residual / (n - 2) / sxx)
    return slope * (max(points)[0] - min(points)[0]) if slope > TREND_T * error else 0.0


def _blocks(values: Sequence[T]) -> list[Sequence[T]]:
    count = min(BLOCKS, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [values[a:b] for a, b in pairwise(cuts)]
