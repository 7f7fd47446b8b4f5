"""The base of every spec, and the field types that specs share."""

import re
from decimal import Decimal
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
)


class Spec(BaseModel):
    """Frozen, strict (no "1" for 1), finite, and closed: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


# The context in which a spec is validated that is no user's file but what was promoted once: rules
# that became stricter since don't make it unreadable.
STORED = {"stored": True}


class Misfit(ValueError):
    """A value that others don't fit. `place` leads to it from where the validator stands."""

    def __init__(self, message: str, *place: str | int) -> None:
        super().__init__(message)
        self.place = place


def matching(pattern: str, example: str) -> AfterValidator:
    """For text that must match as a whole, unless it was stored; the example is shown where it
    doesn't.
    """

    def check(value: str, info: ValidationInfo) -> str:
        if info.context != STORED and not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} must match {pattern}, e.g. {example}")
        return value

    return AfterValidator(check)


def at_most(limit: float, reason: str) -> AfterValidator:
    """For a number that must not be above `limit`, unless it was stored."""

    def check(value: float, info: ValidationInfo) -> float:
        if info.context != STORED and value > limit:
            raise ValueError(f"must be at most {limit}: {reason}; got {value}")
        return value

    return AfterValidator(check)


# RFC 1123 label, at most 40 characters: slot and hash suffixes must still fit into 63.
ObjectName = Annotated[
    str,
    StringConstraints(max_length=40),
    matching(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", "llm-serving"),
]
HubRepo = Annotated[
    str,
    matching(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", "HuggingFaceTB/SmolLM2-135M-Instruct"),
]


def _is_revision(value: str, info: ValidationInfo) -> str:
    # What git allows in a name, as far as it shows at a glance, and braces: nobody rendered those.
    if info.context != STORED and not re.fullmatch(r"(?!-)(?!.*\.\.)[^\s~^:?*\[\\{}$]+", value):
        raise ValueError(f"{value!r} is no branch, tag or commit, e.g. main")
    return value


Revision = Annotated[str, StringConstraints(min_length=1), AfterValidator(_is_revision)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# How often a thing is there in Kubernetes, which counts in int32.
Count = Annotated[PositiveInt, at_most(2**31 - 1, "Kubernetes takes no more")]
DAY = at_most(86_400, "a day; these are seconds")
Seconds = Annotated[PositiveInt, DAY]
# Of a label or a taint: [prefix/]name, and what a label may be worth.
LabelKey = Annotated[
    str,
    matching(
        r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?",
        "cloud.google.com/gke-accelerator",
    ),
]
LabelValue = Annotated[str, matching(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", "NVIDIA-L4")]


def _is_quantity(value: str) -> str:
    if not re.fullmatch(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", value):
        raise ValueError(
            f"{value!r} is no Kubernetes quantity above 0, write e.g. '500m', '4' or '24Gi'"
        )
    return value


def _is_cpu(value: str, info: ValidationInfo) -> str:
    if info.context != STORED and not Decimal("0.001") <= amount(value) <= 1024:
        raise ValueError(f"{value!r} is not within 1m and 1024 cores, write e.g. '500m' or '4'")
    return value


def _is_size(value: str, info: ValidationInfo) -> str:
    if info.context != STORED and not 2**20 <= amount(value) <= 2**50:
        raise ValueError(
            f"{value!r} is {float(amount(value)):g} bytes, not within 1Mi to 1024Ti; write "
            "e.g. '24Gi'"
        )
    return value


Quantity = Annotated[str, AfterValidator(_is_quantity)]
Cpu = Annotated[Quantity, AfterValidator(_is_cpu)]
Size = Annotated[Quantity, AfterValidator(_is_size)]

_UNITS: dict[str, Decimal] = {"": Decimal(1), "m": Decimal("0.001")}
_UNITS |= {unit: Decimal(10 ** (3 * power)) for power, unit in enumerate("kMGT", 1)}
_UNITS |= {f"{unit}i": Decimal(2 ** (10 * power)) for power, unit in enumerate("KMGT", 1)}


def amount(quantity: Quantity) -> Decimal:
    """A quantity as a number: cores or bytes. Exact: 100m is 0.1."""
    number = quantity.rstrip("mkKMGTi")
    return Decimal(number) * _UNITS[quantity[len(number) :]]
