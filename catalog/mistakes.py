"""What pydantic finds wrong, in the words of who wrote the file."""

import re
import typing
from collections.abc import Iterator
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from catalog.spec import Misfit

Place: TypeAlias = tuple[str | int, ...]

_WORDS = {
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
    "model_type": "must be a mapping of fields to values",
    "string_type": "must be text",
    "string_unicode": "must be characters that exist",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
}


def mistakes(error: ValidationError, spec: type[BaseModel]) -> Iterator[tuple[Place, str]]:
    """Where in a `spec` each mistake is, and what."""
    details = error.errors(include_url=False)
    for detail in details:
        place, kind, given = detail["loc"], detail["type"], detail["input"]
        place = place[:-1] if place[-1:] == ("[key]",) else place
        # Items that are wrong themselves aren't counted, so the list seems too short as well.
        if kind == "too_short" and any(_within(other["loc"], place) for other in details):
            continue
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Misfit):
            place = (*place, *cause.place)
        message = detail["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            message = f"is no field here; allowed: {', '.join(_fields(spec, place[:-1]))}"
        elif kind == "missing":
            message = "is missing"
        elif not kind.startswith(("value_error", "json_invalid")):
            message = re.sub(r"^(Input|String|Tuple|Dictionary) should", "must", message)
            message = _WORDS.get(kind, message.replace(" after validation", ""))
            message += f", got {shown(given)}"
            if kind == "string_type" and isinstance(given, bool | int | float):
                message += "; put it in quotes"
        yield place, message


def dotted(place: Place) -> str:
    """slo.required_rate, args.1: in one line, whatever a file has for names."""
    return ".".join(key if str(key).isprintable() else repr(key) for key in map(str, place))


def shown(given: Any) -> str:
    """A value as its file has it, more or less; a long one is cut."""
    if given is None:
        return "nothing"
    text = repr(list(given) if isinstance(given, tuple) else given)
    if isinstance(given, bool):
        text = text.lower()
    return text if len(text) <= 200 else f"{text[:200]}…"


def _within(place: Place, outer: Place) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _fields(spec: type[BaseModel], place: Place) -> list[str]:
    """The fields that the part of a `spec` at `place` has, but for a name that isn't written."""
    current = spec
    for key in place:
        if key not in current.model_fields:  # a place in a list
            continue
        annotation = current.model_fields[str(key)].annotation
        current = next(
            part for part in (annotation, *typing.get_args(annotation)) if _is_spec(part)
        )
    return [name for name in current.model_fields if name != "name" or current is not spec]


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
