"""Which rates are run, and how often: up the ladder to the first clear fail. Pure."""

from collections.abc import Callable, Iterator

from catalog.offered_load import requests_of_step
from loadtests.profile import Profile
from loadtests.result import Step
from loadtests.verdict import Window, judge, untrusted

# Windows at one rate: a machine that stalled once may be asked again, not for ever.
MOST_WINDOWS = 2
MOST_WINDOWS_REQUIRED = 5


def window_ns(rate: float, profile: Profile) -> int:
    """From the start of a window's warm-up to its end."""
    measured = int(requests_of_step(rate, profile.step_seconds, profile.slo) / rate * 1e9)
    return int(profile.warmup_seconds * 1e9) + measured


def longest_seconds(profile: Profile) -> float:
    """The most that a run can take, each window repeated as often as it may be."""
    if profile.mode == "search":
        # The budget has what a window waits for its last answers, but for the last window.
        return profile.budget_seconds + profile.timeout_s + 60
    return sum(
        _most_windows(rate, profile) * (window_ns(rate, profile) / 1e9 + profile.timeout_s + 1)
        for rate in profile.ladder
    )


def climb(profile: Profile, measure: Callable[[float, int], Window]) -> Iterator[Step]:
    """The steps of the ladder, as they end. `measure(rate, repeat)` offers one window of load.

    A window in which the generator lagged is thrown away and repeated. At the required rate, an
    inconclusive step gets more windows, pooled with the first. Ends, but not below the required
    rate, after the first clear fail, or where the generator can't offer the rate.
    """
    for rate in profile.ladder:
        step = _step(rate, profile, measure)
        yield step
        if step.verdict in ("fail", "invalid") and rate >= profile.slo.required_rate:
            return


def _step(rate: float, profile: Profile, measure: Callable[[float, int], Window]) -> Step:
    required = rate == profile.slo.required_rate
    valid: list[Window] = []
    discarded: list[str] = []
    step = None
    for repeat in range(_most_windows(rate, profile)):
        window = measure(rate, repeat)
        if reason := untrusted(window, profile):
            discarded.append(reason)
            if not valid:
                step = judge([window], profile, discarded)
            continue
        valid.append(window)
        step = judge(valid, profile, discarded)
        if not (required and step.verdict in ("inconclusive", "invalid")):
            break
    assert step is not None, "at least one window was measured"
    return step


def _most_windows(rate: float, profile: Profile) -> int:
    if profile.mode == "rate":
        return max(1, int(profile.budget_seconds / (window_ns(rate, profile) / 1e9)))
    return MOST_WINDOWS_REQUIRED if rate == profile.slo.required_rate else MOST_WINDOWS
