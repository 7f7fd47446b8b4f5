"""The load by flags of Locust's command line: which there are, and the profile that they make."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from catalog.mistakes import dotted, mistakes
from loadtests.profile import Profile, ProfileError, address, load_profile, with_trace

EXAMPLE = "http://127.0.0.1:8000"
LENGTHS = "a number, uniform:MIN:MAX, lognormal:MEDIAN:P95:MAX, or trace"
_LAWS = {"uniform": ("min", "max"), "lognormal": ("median", "p95", "max")}


class Flag(NamedTuple):
    """`field`: of a profile, dotted, that it stands for."""

    name: str
    field: str
    default: str | float | bool
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Its name among the parsed options."""
        return self.name.removeprefix("--").replace("-", "_")


FLAGS = (
    Flag("--model", "model", "", "served name; by default the only one that is served"),
    Flag("--endpoint", "endpoint", "completions", "API to load", ("chat", "completions")),
    Flag("--rates", "rates", "1,2,4,8,16", "ladder of arrival rates, req/s"),
    Flag(
        "--mode",
        "mode",
        "ladder",
        "ladder: all rates; search: find λ*; rate: a verdict at --required-rate only",
        ("ladder", "search", "rate"),
    ),
    Flag("--rate-range", "rate_range", "", "where to search, lowest,highest req/s, e.g. 1,64"),
    Flag("--budget-seconds", "budget_seconds", 600.0, "of load, for search and rate"),
    Flag("--step-seconds", "step_seconds", 30.0, "least load at each rate"),
    Flag("--warmup-seconds", "warmup_seconds", 5.0, "load before each step, not counted"),
    Flag(
        "--arrival",
        "arrival",
        "poisson",
        "process of the arrivals",
        ("poisson", "constant", "gamma", "trace"),
    ),
    Flag("--gamma-shape", "gamma_shape", 1.0, "of --arrival gamma; below 1: burstier than Poisson"),
    Flag("--seed", "seed", 1, "of arrivals, lengths, models and turns"),
    Flag("--prompt-tokens", "prompt_tokens", "64", f"length of a prompt: {LENGTHS}"),
    Flag("--output-tokens", "output_tokens", "16", f"length of an answer: {LENGTHS}"),
    Flag("--trace", "trace.path", "", "JSON lines with a recorded load, see docs/traffic.md"),
    Flag("--trace-prefixes", "trace.prefixes", False, "equal hash_ids are equal text"),
    Flag("--shared-prefix-tokens", "shared_prefix.tokens", 0, "common start of the prompts"),
    Flag("--shared-prefixes", "shared_prefix.count", 1, "how many such starts there are"),
    Flag("--turns", "conversations.turns", 1, "of each conversation, with endpoint chat"),
    Flag("--think-s", "conversations.think_s", 5.0, "least pause between two turns"),
    Flag("--models", "models", "", "names with weights, LoRA adapters too: base=3,adapter=1"),
    Flag("--ttft-p95-ms", "slo.ttft_p95_ms", 500.0, "SLO"),
    Flag("--itl-p95-ms", "slo.itl_p95_ms", 200.0, "SLO"),
    Flag("--error-rate", "slo.error_rate", 0.0, "SLO: share that may fail"),
    Flag("--required-rate", "slo.required_rate", 1.0, "rate, req/s, at which the SLO must hold"),
    Flag("--timeout-s", "timeout_s", 60.0, "after this a request has failed"),
)
# A flag that does nothing unless the other one is used.
_NEEDS = {
    "--trace-prefixes": "--trace",
    "--shared-prefixes": "--shared-prefix-tokens",
    "--think-s": "--turns",
}
_NAMES = {
    "base_url": "--host",
    "workers": "--processes",
    "trace": "--trace",
    "conversations": "--turns",
} | {flag.field: flag.name for flag in FLAGS}


def add_options(parser: Any) -> None:
    """Adds them to Locust's parser; they also show on its web page.

    Its flags must be written out then: who abbreviates one gets past what is checked here.
    """
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--load-profile", default="", help="JSON file with the whole profile, instead of flags")
    add("--out", default="", help="folder for result.json and rows.jsonl.gz")
    for flag in FLAGS:
        if isinstance(flag.default, bool):
            add(flag.name, action="store_true", help=flag.help)
        else:
            kind, choices = type(flag.default), flag.choices
            add(flag.name, type=kind, default=flag.default, choices=choices, help=flag.help)
    # For programs: one JSON event a line on stdout.
    add("--json-events", action="store_true", include_in_web_ui=False, help="print JSON events")


def profile_of(options: Any, host: str | None, words: Collection[str]) -> Profile:
    """From the file, or from the flags; `words`: of the command line. Without --model the model
    is empty, and the engine's to say. Raises ProfileError that names file and field, or flag."""
    given = {flag.name for flag in FLAGS if _is_given(flag, options, words)}
    if options.load_profile:
        profile = load_profile(Path(options.load_profile))
        if given:
            listed = ", ".join(flag.name for flag in FLAGS if flag.name in given)
            raise ProfileError(
                f"{listed}: nothing comes of it beside --load-profile, whose file has the whole "
                "load; write it there, or take one of the two out"
            )
        return profile.model_copy(update={"base_url": _address(host)}) if host else profile
    if not host:
        raise ProfileError(f"--host: the engine's address is missing, e.g. {EXAMPLE}")
    for flag in FLAGS:
        other = next((other for other in FLAGS if other.name == _NEEDS.get(flag.name)), None)
        if other and flag.name in given and getattr(options, other.key) == other.default:
            raise ProfileError(
                f"{flag.name}: does nothing without {other.name}; give that too, or take it out"
            )
    modes = {"--budget-seconds": ("search", "rate"), "--step-seconds": ("ladder", "rate")}
    for name, those in modes.items():
        if name in given and options.mode not in those:
            raise ProfileError(
                f"{name}: does nothing with --mode {options.mode}, but with {' or '.join(those)}"
            )
    if options.turns < 1:
        raise ProfileError(
            f"--turns: must be 1, for no conversations, or more, got {options.turns}"
        )
    expected = options.expect_workers if options.master else 1
    fields = {"base_url": host, "workers": options.processes or expected, **_fields(options, given)}
    try:
        profile = Profile.model_validate({**fields, "model": options.model or "unknown"})
    except ValidationError as error:
        raise ProfileError("; ".join(_mistakes(error))) from None
    profile = with_trace(profile, Path.cwd(), "--trace")
    # How many there are is known when they are there.
    return profile.model_copy(update={"model": options.model, "workers": None})


def _is_given(flag: Flag, options: Any, words: Collection[str]) -> bool:
    """Also by the environment, a file of Locust's, or its page; those don't say so of a default."""
    named = any(word.partition("=")[0] == flag.name for word in words)
    return named or getattr(options, flag.key) != flag.default


def _address(host: str) -> str:
    try:
        return address(host)
    except ValueError as error:
        raise ProfileError(f"--host: {error}") from None


def _fields(options: Any, given: Collection[str]) -> dict[str, Any]:
    """Those of a profile that flags stand for. Raises ProfileError."""
    fields: dict[str, Any] = {}
    for flag in FLAGS:
        part, _, field = flag.field.rpartition(".")
        value = getattr(options, flag.key)
        (fields.setdefault(part, {}) if part else fields)[field] = value
    weights = [one.partition("=") for one in options.models.split(",") if one]
    fields |= {
        "rates": _numbers("--rates", options.rates),
        "rate_range": _numbers("--rate-range", options.rate_range) or None,
        "prompt_tokens": _lengths("--prompt-tokens", options.prompt_tokens),
        "output_tokens": _lengths("--output-tokens", options.output_tokens),
        "models": {name: weight or 1 for name, _, weight in weights} or None,
    }
    used = {
        "trace": options.trace,
        "shared_prefix": options.shared_prefix_tokens,
        "conversations": options.turns > 1,
        # Else a gamma process would be a Poisson process.
        "gamma_shape": "--gamma-shape" in given,
    }
    return {name: value for name, value in fields.items() if used.get(name, True)}


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(one) for one in text.split(",") if one.strip()]
    except ValueError:
        numbers = []
    pair = flag == "--rate-range"
    if text and (not numbers or (pair and len(numbers) != 2)):
        form = "two numbers, lowest,highest, e.g. 1,64" if pair else "numbers, e.g. 1,2,4"
        raise ProfileError(f"{flag}: must be {form}; got {text!r}")
    return numbers


def _lengths(flag: str, given: str) -> Any:
    """64, uniform:8:64, lognormal:200:900:4000 or trace, as the profile has it."""
    law, *numbers = given.split(":")
    names = _LAWS.get(law, ())
    if names and len(names) == len(numbers) and all(number.isdecimal() for number in numbers):
        return {law: {name: int(number) for name, number in zip(names, numbers, strict=True)}}
    if not given.isdecimal() and given != "trace":
        raise ProfileError(f"{flag}: must be {LENGTHS}; got {given!r}")
    return int(given) if given.isdecimal() else given


def _mistakes(error: ValidationError) -> list[str]:
    """In the words of who gave flags."""
    found = []
    for place, message in mistakes(error, Profile):
        field, rest = dotted(place), ""
        while field and field not in _NAMES:
            field, _, last = field.rpartition(".")
            rest = rest if last.isdecimal() else f"{last}.{rest}".rstrip(".")
        where = ": ".join(part for part in (_NAMES.get(field, "flags"), rest) if part)
        found.append(f"{where}: {_as_flags(message)}")
    return found


def _as_flags(message: str) -> str:
    """`rate_range` is --rate-range there, and `mode: search` is --mode search. A plain word that
    is a field's name too (trace, rates) may be just a word, unless it is marked."""
    for field in sorted(_NAMES, key=len, reverse=True):
        name, plain = re.escape(field), field.isalpha()
        message = re.sub(rf"(?<![\w.-]){name}: (?=[a-z]+\b)", f"{_NAMES[field]} ", message)
        message = message.replace(f"`{field}`", _NAMES[field])
        if not plain:
            message = re.sub(rf"(?<![\w.-]){name}(?![\w.])", _NAMES[field], message)
    return message
