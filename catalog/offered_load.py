"""What an offered load must keep, in the catalog as in a profile: settings that do nothing, or
contradict each other, are refused. Each raises Misfit at the field."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from catalog.lengths import Lengths
from catalog.spec import Misfit


def _unique(lengths: Lengths) -> Lengths:
    if lengths.fixed is not None and lengths.fixed < 4:
        raise ValueError(f"{lengths.fixed} tokens can't be unique, ask for 4 or more")
    return lengths


PromptLengths = Annotated[Lengths, AfterValidator(_unique)]


def check_arrival(arrival: str, gamma_shape: float, shape_given: bool) -> None:
    """A gamma process needs its shape. Of others 1 is true, and what a stored spec has."""
    if arrival == "gamma" and not shape_given:
        raise Misfit("is missing: below 1 is burstier than poisson, which is 1", "gamma_shape")
    if arrival != "gamma" and gamma_shape != 1:
        raise Misfit(
            f"{gamma_shape:g} does nothing with arrival: {arrival}; say arrival: gamma, or take "
            "it out",
            "gamma_shape",
        )


def check_rates(mode: str, rates: Sequence[float], rate_range: tuple[float, float] | None) -> None:
    """A ladder has ascending rates, a search has the lowest and the highest one."""
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


def check_trace(arrival: str, prompt: Lengths, output: Lengths, prefixes: bool | None) -> None:
    """A trace is there if something comes from it. `prefixes`: None if there is no trace."""
    uses = {"arrival": arrival == "trace", "prompt_tokens": prompt.trace}
    uses["output_tokens"] = output.trace
    used = [name for name, traced in uses.items() if traced]
    if used and prefixes is None:
        raise Misfit("is to come from a trace, so `trace` must name its file", used[0])
    if prefixes is not None and not used:
        raise Misfit("nothing comes from it: say trace for arrival or for lengths", "trace")
    if prefixes and not prompt.trace:
        raise Misfit("need prompt_tokens: trace", "trace", "prefixes")
