"""Lengths of prompts and answers: how they are written, and what law they follow."""

from statistics import median

import pytest
from pydantic import BaseModel, ValidationError

from catalog.lengths import Lengths

LOGNORMAL = {"lognormal": {"median": 200, "p95": 900, "max": 4000}}


class Holder(BaseModel):
    tokens: Lengths


def read(value: object) -> Lengths:
    return Holder.model_validate({"tokens": value}).tokens


@pytest.mark.parametrize("value", [64, "trace", {"uniform": {"min": 10, "max": 99}}, LOGNORMAL])
def test_written_as_read(value: object) -> None:
    lengths = read(value)
    assert lengths.model_dump() == value
    assert Holder.model_validate_json(Holder(tokens=lengths).model_dump_json()).tokens == lengths


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be 1 token or more"),
        (True, "must be a number, uniform"),
        ("many", "got 'many'"),
        (None, "must be a number"),
        ({}, "must be a number"),
        ({"uniform": None}, "must be a number"),
        ({**LOGNORMAL, "fixed": 3}, "must be a number"),
        ({"normal": {"mean": 3}}, "Extra inputs are not permitted"),
        ({"uniform": {"min": 9, "max": 3}}, "9 is above max"),
        ({"lognormal": {"median": 9, "p95": 9, "max": 99}}, "9 must be above the median"),
        ({"lognormal": {"median": 9, "p95": 90, "max": 50}}, "at most max"),
    ],
)
def test_a_mistake_is_named(value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(value)


def drawn(value: object, count: int = 1000) -> list[int]:
    return [read(value).at((i + 0.5) / count) for i in range(count)]


def test_uniform_reaches_both_ends_equally() -> None:
    values = drawn({"uniform": {"min": 1, "max": 4}})
    assert [values.count(length) for length in (1, 2, 3, 4)] == [250] * 4


def test_lognormal_has_its_median_and_p95_and_is_cut() -> None:
    values = drawn(LOGNORMAL)
    assert median(values) == pytest.approx(200, rel=0.01)
    assert values[950] == pytest.approx(900, rel=0.01)
    assert values[-1] == 4000 == read(LOGNORMAL).most


def test_fixed_is_always_the_same() -> None:
    assert set(drawn(7)) == {7}
