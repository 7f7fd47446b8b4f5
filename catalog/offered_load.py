"""What an offered load must keep, in the catalog as in a profile: settings that do nothing,
contradict each other, or ask for what can't be carried out, are refused. Each raises Misfit at the
field."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import AfterValidator

from catalog.lengths import Lengths
from catalog.spec import Misfit

if TYPE_CHECKING:
    from catalog.model import Slo

MOST_WORKERS = 64
# Of a core at its best, req/s, in tests/accuracy; the highest rate is that of all workers.
MOST_RATE_OF_A_WORKER = 2_000
MOST_RATE = MOST_WORKERS * MOST_RATE_OF_A_WORKER
# In one window. With plan and rows a request of 16 tokens takes 9 kB, and a Job has 2 GiB for each
# worker.
MOST_REQUESTS_OF_A_WORKER = 200_000
MOST_SECONDS = 86_400
MOST_GAMMA_SHAPE = 1_000  # arrivals as even as constant ones
Z = 1.645  # each bound alone is wrong in 5 % of cases
# Overload shows once the queue is as long as the SLO allows.
LIMITS_OF_A_WINDOW = 3.0


class Load(Protocol):
    """What the catalog's traffic and a profile have in common. `trace` has a field `prefixes`."""

    @property
    def arrival(self) -> str: ...
    @property
    def gamma_shape(self) -> float: ...
    @property
    def mode(self) -> str: ...
    @property
    def rates(self) -> Sequence[float]: ...
    @property
    def rate_range(self) -> tuple[float, float] | None: ...
    @property
    def budget_seconds(self) -> float: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def warmup_seconds(self) -> float: ...
    @property
    def prompt_tokens(self) -> Lengths: ...
    @property
    def output_tokens(self) -> Lengths: ...
    @property
    def trace(self) -> Any: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def model_fields_set(self) -> set[str]: ...


def _unique(lengths: Lengths) -> Lengths:
    if lengths.fixed is not None and lengths.fixed < 4:
        raise ValueError(f"{lengths.fixed} tokens can't be unique, ask for 4 or more")
    return lengths


PromptLengths = Annotated[Lengths, AfterValidator(_unique)]


def check(load: Load) -> None:
    """What can be said of a load without its SLO."""
    _check_arrival(load)
    _check_rates(load)
    _check_seconds(load)
    _check_trace(load)


def check_windows(load: Load, slo: "Slo", *at: str) -> None:
    """Whether every window that the load asks for can be sent, and shows what the SLO claims.

    `at`: where the load's fields stand, seen from where `slo` does.
    """
    most = MOST_REQUESTS_OF_A_WORKER * (load.workers or 1)
    _check_rate(slo.required_rate, "slo", "required_rate")
    fewest = fewest_requests(slo.attainment)
    if fewest > most:
        # Rounded down, so that what is said is taken.
        shown = math.floor(most / (most + Z * Z) * 1e6) / 1e6
        raise Misfit(
            f"{slo.attainment!r} takes {fewest} requests to show, and {most} are the most that a "
            f"window can have; give {shown} or less",
            "slo",
            "attainment",
        )
    if load.mode == "search" and load.rate_range is not None:
        lowest, highest = load.rate_range
        if not lowest <= slo.required_rate <= highest:
            raise Misfit(
                f"{slo.required_rate:g} is not within {'.'.join((*at, 'rate_range'))} "
                f"({lowest:g} to {highest:g}), where the search starts",
                "slo",
                "required_rate",
            )
    for rate, place in _windows(load, slo, at):
        if fewest / rate > MOST_SECONDS:
            least = math.ceil(fewest / MOST_SECONDS * 1e6) / 1e6  # rounded up, likewise
            raise Misfit(
                f"at {rate:g} req/s the {fewest} requests that a verdict needs take more than a "
                f"day; give {least:g} req/s or more",
                *place,
            )
        requests = _requests(rate, load, slo)
        warmup = load.warmup_seconds * rate
        if requests + warmup > most:
            raise Misfit(
                f"at {rate:g} req/s a window has {requests + warmup:.0f} requests, {warmup:.0f} of "
                f"them in warmup_seconds; {most} fit into memory, {MOST_REQUESTS_OF_A_WORKER} for "
                "each worker; lower the rate or the seconds",
                *place,
            )
    if load.mode != "ladder":
        seconds = _requests(slo.required_rate, load, slo) / slo.required_rate
        short = load.mode == "search" and getattr(load, "conversations", None) is None
        warmup = short_warmup(load.warmup_seconds, seconds) if short else load.warmup_seconds
        if load.budget_seconds < seconds + warmup:
            least = math.ceil(seconds + warmup)
            raise Misfit(
                f"{load.budget_seconds:g} s has no room for one window: at slo.required_rate "
                f"({slo.required_rate:g}) it takes {seconds:.1f} s, and {warmup:.1f} s of warm-up; "
                f"give {least} or more",
                *at,
                "budget_seconds",
            )


def fewest_requests(attainment: float) -> int:
    """So few requests, all good, already show that `attainment` holds: n / (n + z²) ≥ it."""
    return math.ceil(Z * Z * attainment / (1 - attainment))


def requests_of_step(rate: float, step_seconds: float, slo: "Slo") -> int:
    """Of a ladder's window: step_seconds of load, or longer if a verdict needs more requests."""
    return max(round(rate * step_seconds), fewest_requests(slo.attainment))


def requests_of_search(rate: float, slo: "Slo") -> int:
    """Of a search's window, at least: for a verdict, and until overload shows."""
    least = rate * LIMITS_OF_A_WINDOW * slo.ttft_p95_ms / 1e3
    return max(fewest_requests(slo.attainment), round(least))


def short_warmup(warmup_seconds: float, seconds: float) -> float:
    """Of a search's first windows, which last `seconds`. A short window is no claim, so a short
    warm-up does; what the queue's start from empty hides is part of the luck that knee.py takes
    off."""
    return min(warmup_seconds, seconds / 2)


def _requests(rate: float, load: Load, slo: "Slo") -> int:
    if load.mode == "search":
        return requests_of_search(rate, slo)
    return requests_of_step(rate, load.step_seconds, slo)


def _windows(load: Load, slo: "Slo", at: tuple[str, ...]) -> list[tuple[float, tuple[str, ...]]]:
    """The rates that are run, or may be, and the field of each."""
    required = (slo.required_rate, ("slo", "required_rate"))
    if load.mode == "search":
        return [required, *((rate, (*at, "rate_range")) for rate in load.rate_range or ())]
    listed = load.rates if load.mode == "ladder" else ()
    return [required, *((rate, (*at, "rates")) for rate in listed)]


def _check_rate(rate: float, *place: str | int) -> None:
    if rate > MOST_RATE:
        raise Misfit(
            f"{rate:g} req/s can't be sent; {MOST_WORKERS} workers send {MOST_RATE} at most, "
            f"{MOST_RATE_OF_A_WORKER} each",
            *place,
        )


def _check_arrival(load: Load) -> None:
    """A gamma process needs its shape. Of others 1 is true, and what a stored spec has."""
    arrival, shape = load.arrival, load.gamma_shape
    if arrival == "gamma" and "gamma_shape" not in load.model_fields_set:
        raise Misfit("is missing: below 1 is burstier than poisson, which is 1", "gamma_shape")
    if arrival != "gamma" and shape != 1:
        raise Misfit(
            f"{shape:g} does nothing with arrival: {arrival}; say arrival: gamma, or take it out",
            "gamma_shape",
        )
    if shape > MOST_GAMMA_SHAPE:
        raise Misfit(
            f"{shape:g} is above {MOST_GAMMA_SHAPE}, which is even already; say arrival: constant",
            "gamma_shape",
        )


def _check_rates(load: Load) -> None:
    """A ladder has ascending rates, a search has the lowest and the highest one."""
    mode, rates, rate_range = load.mode, load.rates, load.rate_range
    if mode == "ladder" and not rates:
        raise Misfit("is missing: the ladder, or say mode: search with a rate_range", "rates")
    if list(rates) != sorted(set(rates)):
        raise Misfit("the ladder must ascend, each rate once", "rates")
    if mode == "search" and rate_range is None:
        raise Misfit("is missing: where to search, [lowest, highest]", "rate_range")
    if mode == "ladder" and rate_range is not None:
        raise Misfit(
            "does nothing with mode: ladder; say mode: search, or take it out", "rate_range"
        )
    if rate_range is not None and rate_range[0] > rate_range[1]:
        lowest, highest = rate_range
        raise Misfit(f"{lowest:g} is above {highest:g}: write [lowest, highest]", "rate_range")
    for number, rate in enumerate(rates):
        _check_rate(rate, "rates", number)
    for number, rate in enumerate(rate_range or ()):
        _check_rate(rate, "rate_range", number)


def _check_seconds(load: Load) -> None:
    """The catalog and a profile name the time that a request has differently."""
    names = ("step_seconds", "warmup_seconds", "budget_seconds", "timeout_seconds", "timeout_s")
    for name in names:
        if (seconds := getattr(load, name, 0)) > MOST_SECONDS:
            raise Misfit(f"{seconds:g} s is more than a day; give {MOST_SECONDS} or less", name)


def _check_trace(load: Load) -> None:
    """A trace is there if something comes from it."""
    prompt = load.prompt_tokens
    uses = {"arrival": load.arrival == "trace", "prompt_tokens": prompt.trace}
    uses["output_tokens"] = load.output_tokens.trace
    used = [name for name, traced in uses.items() if traced]
    if used and load.trace is None:
        raise Misfit("is to come from a trace, so `trace` must name its file", used[0])
    if load.trace is not None and not used:
        raise Misfit("nothing comes from it: say trace for arrival or for lengths", "trace")
    if load.trace is not None and load.trace.prefixes and not prompt.trace:
        raise Misfit("need prompt_tokens: trace", "trace", "prefixes")
