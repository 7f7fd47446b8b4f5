"""A recorded load: one JSON object a line, of one of two forms.

Mooncake's, which AIPerf and others read too: `timestamp` (ms), `input_length`, `output_length`
and, optionally, `hash_ids`: equal ids are equal blocks of a prompt, from its start on. Or
`arrival_s` (s), `prompt_tokens`, `output_tokens`, which is what is left of a set of
conversations such as ShareGPT once it is counted. Other fields are passed over.
https://github.com/kvcache-ai/Mooncake (FAST25-release/traces)
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMS = (
    ("timestamp", "input_length", "output_length", 1e-3),
    ("arrival_s", "prompt_tokens", "output_tokens", 1.0),
)


class TraceError(ValueError):
    """The file can't be read, or a line of it is wrong; the message names it."""


@dataclass(frozen=True)
class Recorded:
    """One request. `blocks`: ids of the equal parts of prompts, from the start on."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path, arrival: str = "trace") -> tuple[tuple[Recorded, ...], str]:
    """The requests in the order of time, and the sha256 of the file. Raises TraceError.

    With another `arrival` than trace only the lengths count, and all times may be equal.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}"))
    if len(rows) < 2:
        raise TraceError(f"{path}: has {len(rows)} requests, a trace needs two at least")
    if arrival == "trace" and len({row.at_s for row in rows}) == 1:
        raise TraceError(
            f"{path}: all requests have one time, so there are no gaps to replay; take lengths "
            "from it, and say e.g. arrival: poisson"
        )
    return tuple(sorted(rows, key=lambda row: row.at_s)), hashlib.sha256(data).hexdigest()


def _row(line: bytes, where: str) -> Recorded:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise TraceError(f"{where}: is no JSON") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: is no JSON object")
    form = next((form for form in _FORMS if form[0] in fields), None)
    if form is None:
        names = " or ".join(", ".join(map(str, form[:3])) for form in _FORMS)
        raise TraceError(f"{where}: needs {names}; has {', '.join(fields)[:100]}")
    at, prompt, output, seconds = form
    blocks = fields.get("hash_ids") or []
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise TraceError(f"{where}: hash_ids: must be a list of whole numbers")
    return Recorded(
        at_s=_number(fields, at, where) * seconds,
        prompt_tokens=_tokens(fields, prompt, where),
        output_tokens=_tokens(fields, output, where),
        blocks=tuple(blocks),
    )


def _number(fields: dict[str, Any], name: str, where: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise TraceError(f"{where}: {name}: must be a number of 0 or more, got {value!r}")
    return float(value)


def _tokens(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 10**9:
        raise TraceError(f"{where}: {name}: must be a whole number of 1 or more, got {value!r}")
    return value
