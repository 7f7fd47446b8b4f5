"""When requests are sent: drawn before the start, from a seed, so that no answer can delay one."""

import random
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
