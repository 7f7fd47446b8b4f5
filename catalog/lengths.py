"""How long prompts and answers are, in tokens: a number, a distribution, or as in a trace."""

import math
from statistics import NormalDist
from typing import Any, Self

from pydantic import ModelWrapValidatorHandler, model_serializer, model_validator

from catalog.spec import Misfit, PositiveFloat, PositiveInt, Spec

FORMS = "a number, uniform: {min, max}, lognormal: {median, p95, max}, or trace"
_P95 = NormalDist().inv_cdf(0.95)


class Uniform(Spec):
    """Each length from `min` to `max` is as likely."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise Misfit(f"{self.min} is above max ({self.max})", "min")
        return self

    def at(self, share: float) -> int:
        """The length that `share` of all are below."""
        return min(self.max, self.min + math.floor(share * (self.max - self.min + 1)))


class LogNormal(Spec):
    """Its logarithm is normal, as of most real lengths; those above `max` are cut to it."""

    median: PositiveFloat
    p95: PositiveFloat
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.median < self.p95 <= self.max:
            raise Misfit(
                f"{self.p95:g} must be above the median ({self.median:g}) and at most max "
                f"({self.max})",
                "p95",
            )
        return self

    def at(self, share: float) -> int:
        """The length that `share` of all are below."""
        sigma = math.log(self.p95 / self.median) / _P95
        length = self.median * math.exp(sigma * NormalDist().inv_cdf(share))
        return max(1, min(self.max, round(length)))


class Lengths(Spec):
    """One of its fields. A bare number is `fixed`; the bare word `trace`: as in the trace file."""

    fixed: PositiveInt | None = None
    uniform: Uniform | None = None
    lognormal: LogNormal | None = None
    trace: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, read: ModelWrapValidatorHandler["Lengths"]) -> "Lengths":
        if isinstance(value, cls):
            return value
        if value == "trace":
            return cls.model_construct(trace=True)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"must be 1 token or more, got {value}")
            return cls.model_construct(fixed=value)
        if not isinstance(value, dict) or len(value) != 1 or None in value.values():
            raise ValueError(f"must be {FORMS}; got {value!r}")
        return read(value)

    @model_serializer
    def _write(self) -> int | str | dict[str, Any]:
        if self.trace:
            return "trace"
        if self.fixed is not None:
            return self.fixed
        name = "uniform" if self.uniform else "lognormal"
        law = self.uniform or self.lognormal
        assert law is not None, "one of its fields is given"
        return {name: law.model_dump()}

    @property
    def most(self) -> int:
        """The longest there can be; of a trace's lengths only its file knows."""
        law = self.uniform or self.lognormal
        return law.max if law else self.fixed or 1

    def at(self, share: float) -> int:
        """The length that `share` (0 to 1, both excluded) of all are below; not of a trace's."""
        law = self.uniform or self.lognormal
        if law:
            return law.at(share)
        assert self.fixed is not None, "a trace's lengths come from its file"
        return self.fixed
