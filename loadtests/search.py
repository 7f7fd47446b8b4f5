"""Which rates a search for λ* runs, and for how long. Pure: `measure` offers the load.

Double from the required rate to the first miss (or halve to the first hit), close in on the
crossing of the fit (knee.py), then load at rates on both sides of it until its interval is
narrow, or the budget ends. Far from λ* windows are short; only near it they get long.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from catalog.offered_load import MOST_REQUESTS_OF_A_WORKER, requests_of_search, short_warmup
from loadtests.knee import Knee, Seen, find, seen
from loadtests.profile import Profile
from loadtests.result import Capacity, Step
from loadtests.verdict import Window, judge, untrusted

NARROW = 0.025  # half of λ*'s interval, as a share of it
CLOSE = 1.15  # ratio of the two rates around λ*, between which a straight line is near enough
INNER = 0.3  # a new rate between two comes no nearer to either than this share of their ratio
NEAR_REQUESTS = 100  # of a window between two rates
EDGE = 1.05  # λ* is measured at rates this ratio below and above it
SAME = 1.02  # rates nearer than this ratio are one
EDGE_REQUESTS = 400  # of a window there, at least
SIDE_REQUESTS = 800  # on each side of λ*, before its interval is believed
ROUGH = 0.15  # half of an interval, as NARROW, that is good enough to look only there
INVALID_AT_MOST = 2  # windows in a row, then this rate can't be offered
REQUIRED_AT_MOST = 6  # more windows for the verdict at the required rate

# rate, repeat, seconds of warm-up, seconds measured → the window
Measure = Callable[[float, int, float, float], Window]


@dataclass
class Search:
    """The state of a search. Iterate `run`, then read the rest.

    `windows`: valid ones by rate; `next_step`: what a larger budget would have been used for,
    empty if λ* was found. `spent_s`: with load, or waiting for its last answers.
    """

    profile: Profile
    measure: Measure
    windows: dict[float, list[Window]] = field(default_factory=dict)
    invalid: dict[float, list[Window]] = field(default_factory=dict)
    next_step: str = ""
    spent_s: float = 0.0
    knee: Knee | None = None
    _seen: list[Seen] = field(default_factory=list)
    _lowest: float = 0.0
    _highest: float = 0.0

    def run(self) -> Iterator[Step]:
        """Runs it; yields the step of each window's rate, with all windows there so far."""
        assert self.profile.rate_range is not None, "the profile's validator sees to it"
        self._lowest, self._highest = self.profile.rate_range
        required = self.profile.slo.required_rate
        wanted: tuple[float, int] | None = required, 0
        while wanted is not None:
            rate, requests = wanted
            if not self._affords(rate, requests):
                self.next_step = (
                    f"{self._requests(rate, requests)} more requests at {rate:.4g} req/s"
                )
                break
            yield self._window(rate, requests)
            if len(self.invalid.get(rate, ())) >= INVALID_AT_MOST and rate not in self.windows:
                if rate == required:
                    return
                self._highest = max(r for r in [*self.windows, self._lowest] if r < rate)
            wanted = self._next()
        yield from self._settle(required)

    def steps(self) -> list[Step]:
        """All steps by rate. A rate that passed for itself, but lies within λ*'s interval, has
        not shown that it holds."""
        return [self._step(rate) for rate in sorted({*self.windows, *self.invalid})]

    def capacity(self) -> Capacity:
        """λ* with its interval."""
        knee = self.knee
        if knee is None:
            return Capacity(lower=0.0, estimate=0.0, upper=None, at_least=False)
        if knee.below is None and not knee.fitted:
            assert knee.above is not None
            return Capacity(
                lower=0.0,
                estimate=0.0,
                upper=_round(knee.above.rate),
                at_least=False,
                warnings=knee.warnings,
            )
        at_least = knee.above is None and not knee.fitted
        return Capacity(
            lower=_round(knee.lower),
            estimate=_round(knee.estimate),
            upper=None if at_least else _round(knee.upper),
            at_least=at_least,
            warnings=knee.warnings,
        )

    def _next(self) -> tuple[float, int] | None:
        """Rate and least requests of the next window; None when λ* is known well enough."""
        knee = self.knee
        if knee is None:
            return self.profile.slo.required_rate, 0
        half = (knee.upper - knee.lower) / 2 / knee.estimate
        if knee.fitted and half < ROUGH:
            return self._edge(knee.estimate, half)
        below, above = knee.below, knee.above
        if above is None:
            assert below is not None
            if below.rate >= self._highest:
                return None
            return min(2 * below.rate, self._highest), 0
        if below is None:
            if above.rate <= self._lowest:
                return None
            return max(above.rate / 2, self._lowest), 0
        ratio = above.rate / below.rate
        if ratio < CLOSE:
            return self._edge(knee.estimate, half)
        least, most = below.rate * ratio**INNER, below.rate * ratio ** (1 - INNER)
        return min(max(knee.estimate, least), most), NEAR_REQUESTS

    def _edge(self, estimate: float, half: float) -> tuple[float, int] | None:
        """The next window at one of the rates on both sides of λ*, as far as they may be tried."""
        sides = [0, 0]
        for window in self._seen:
            if 1 / EDGE**2 < window.rate / estimate < EDGE**2:
                sides[window.rate > estimate] += window.requests
        edges = (estimate / EDGE, estimate * EDGE)
        open_ = [i for i, rate in enumerate(edges) if self._lowest <= rate <= self._highest]
        if not open_ or (half <= NARROW and all(sides[i] >= SIDE_REQUESTS for i in open_)):
            return None
        edge = edges[min(open_, key=lambda i: sides[i])]
        tried = min(self.windows, key=lambda rate: abs(math.log(rate / edge)))
        rate = tried if 1 / SAME < tried / edge < SAME else edge
        # The error falls with the root of the requests.
        more = sum(sides) * ((half / NARROW) ** 2 - 1) / 2
        return rate, max(EDGE_REQUESTS, round(min(more, sum(sides) / 2)))

    def _settle(self, required: float) -> Iterator[Step]:
        """More windows at the required rate, and at the highest if it holds, until there is a
        verdict."""
        knee = self.knee
        asked = {required} | (
            {knee.below.rate} if knee and knee.below and not knee.above else set()
        )
        for rate in sorted(asked):
            for _ in range(REQUIRED_AT_MOST):
                if self._step(rate).verdict in ("pass", "fail"):
                    break
                requests = len(self._step_windows(rate)[-1].measured) * 2
                if not self._affords(rate, requests):
                    self.next_step = self.next_step or (
                        f"{self._requests(rate, requests)} more requests at {rate:.4g} req/s"
                    )
                    return
                yield self._window(rate, requests)

    def _step_windows(self, rate: float) -> list[Window]:
        return self.windows.get(rate) or self.invalid[rate][-1:]

    def _step(self, rate: float) -> Step:
        reasons = [untrusted(window, self.profile) for window in self.invalid.get(rate, ())]
        step = judge(self._step_windows(rate), self.profile, reasons)
        knee = self.knee
        if step.verdict == "pass" and knee is not None and knee.above and rate > knee.lower:
            near = f"within λ*'s interval, {knee.lower:.4g} to {knee.upper:.4g} req/s"
            return step.model_copy(
                update={"verdict": "inconclusive", "reason": f"{step.reason}, but it lies {near}"}
            )
        return step

    def _window(self, rate: float, requests: int) -> Step:
        warmup, seconds = self._lengths(rate, requests)
        repeat = len(self.windows.get(rate, ())) + len(self.invalid.get(rate, ()))
        window = self.measure(rate, repeat, warmup, seconds)
        ends = [row.end for row in window.rows if row.end is not None]
        self.spent_s += (max([window.end, *ends]) - window.start) / 1e9 + warmup
        if untrusted(window, self.profile):
            self.invalid.setdefault(rate, []).append(window)
        else:
            self.windows.setdefault(rate, []).append(window)
            self._seen.append(seen(window, self.profile))
            self.knee = find(self._seen, self.profile)
        return judge(
            self._step_windows(rate),
            self.profile,
            [untrusted(bad, self.profile) for bad in self.invalid.get(rate, ())],
        )

    def _requests(self, rate: float, requests: int) -> int:
        """Of one window, which must fit into memory with its warm-up."""
        most = MOST_REQUESTS_OF_A_WORKER * (self.profile.workers or 1)
        most -= math.ceil(self.profile.warmup_seconds * rate)
        return min(most, max(requests, requests_of_search(rate, self.profile.slo)))

    def _lengths(self, rate: float, requests: int) -> tuple[float, float]:
        """Seconds of warm-up and measured."""
        seconds = self._requests(rate, requests) / rate
        warmup = self.profile.warmup_seconds
        if self.profile.conversations is None and requests <= NEAR_REQUESTS:
            warmup = short_warmup(warmup, seconds)
        return warmup, seconds

    def _affords(self, rate: float, requests: int) -> bool:
        return self.spent_s + sum(self._lengths(rate, requests)) <= self.profile.budget_seconds


def sized(profile: Profile, warmup_s: float, seconds: float) -> Profile:
    """The profile for one window of a search."""
    return profile.model_copy(update={"warmup_seconds": warmup_s, "step_seconds": seconds})


def in_flight_at(rate: float, steps: list[Step]) -> float | None:
    """Mean requests in flight at a rate, between the steps around it; None without steps."""
    known = [(0.0, 0.0)] + [(s.rate_asked, s.in_flight_mean) for s in steps if s.repeats]
    if len(known) < 2 or rate <= 0:
        return None
    for (left, low), (right, high) in pairwise(known):
        if rate <= right:
            return _round(low + (high - low) * (rate - left) / (right - left))
    return known[-1][1]


def _round(value: float) -> float:
    return round(value, 4)
