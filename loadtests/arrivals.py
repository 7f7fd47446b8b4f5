"""When requests are sent: drawn before the start, from a seed, so that no answer can delay one."""

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

Arrival = Literal["poisson", "constant", "gamma"]


def draw(
    arrival: Arrival, rate: float, count: int, seed: int | str, gamma_shape: float = 1.0
) -> list[float]:
    """`count` arrival times in seconds, ascending, over a window of count/rate seconds.

    The gaps of a Poisson process are exponential, those of gamma have mean 1/rate and the given
    shape (below 1: burstier than Poisson). They are scaled to fill the window: a Poisson process
    given its count is just uniform order statistics, so gaps keep their law, and the rate is the
    asked one and not off by 1/sqrt(count).
    """
    window = count / rate
    if arrival == "constant":
        return [(number + 0.5) / rate for number in range(count)]
    shape = 1.0 if arrival == "poisson" else gamma_shape
    rng = random.Random(seed)
    gaps = [rng.gammavariate(shape, 1.0) for _ in range(count + 1)]
    scale = window / sum(gaps)
    times, now = [], 0.0
    for gap in gaps[:count]:
        now += gap * scale
        times.append(now)
    return times


def replay(recorded: Sequence[float], rate: float, count: int, first: int) -> list[float]:
    """`count` arrival times in seconds, over a window of count/rate seconds, with the gaps of a
    record from its arrival number `first` on, all stretched alike.

    So bursts stay bursts, and the rate is the asked one. A record that is too short starts again,
    one mean gap after its end.
    """
    mean_gap = (recorded[-1] - recorded[0]) / (len(recorded) - 1)
    before = [mean_gap, *(b - a for a, b in pairwise(recorded))]
    gaps = [before[(first + number) % len(before)] for number in range(count + 1)]
    total = sum(gaps)
    scale = count / rate / total if total else 0.0
    return [at * scale for at in accumulate(gaps[:count])]


def even(count: int, seed: int | str) -> list[float]:
    """`count` shares between 0 and 1 at equal distances, shuffled.

    As quantiles of a law they make each window have the whole of it: two rates differ in their
    rate, not also in how many long prompts chance gave them.
    """
    shares = [(number + 0.5) / count for number in range(count)]
    random.Random(seed).shuffle(shares)
    return shares
