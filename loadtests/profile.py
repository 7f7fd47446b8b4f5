"""What load is offered, to whom, and the SLO that it is judged by: the program's one input."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from catalog import offered_load
from catalog.lengths import Lengths
from catalog.mistakes import dotted, mistakes
from catalog.model import Slo
from catalog.offered_load import PromptLengths
from catalog.spec import STORED
from catalog.trace import TraceError, read_trace

# true is no 1, and "1" is none.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
# Of two of these weights, the smaller one's model still gets a request in a window.
Weight = Annotated[float, Field(gt=0, le=offered_load.MOST_REQUESTS_OF_A_WORKER)]


def address(url: str) -> str:
    """An engine's; what http.client and the resolver would stumble over is refused: ValueError."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname and parts.hostname.encode("idna"))
        good = named and parts.port != 0 and re.fullmatch(r"http://[^/?#\s@]+/?", url)
    except ValueError:  # no port, or no host's name
        good = None
    if not good:
        raise ValueError(
            f"{url!r} is no address of an engine; write http://HOST:PORT, with a port of 1 to "
            "65535, e.g. http://127.0.0.1:8000"
        )
    return url


class ProfileError(Exception):
    """The profile is wrong; the message has a line `where: field: what` for each mistake."""


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trace(_Closed):
    """A recorded load, see trace.py. `path` counts from the profile's folder; `sha256`, of the
    file, is filled in when it is read.

    `prefixes`: equal `hash_ids` are equal text, of `block_tokens` each (512 in Mooncake's files),
    so that the prefix cache is hit as it was. Else each prompt is unique.
    """

    path: Annotated[str, StringConstraints(min_length=1)]
    sha256: str | None = None
    prefixes: bool = False
    block_tokens: Annotated[int, Field(ge=4)] = 512


class SharedPrefix(_Closed):
    """Before its own `prompt_tokens`, each prompt has one of `count` beginnings of `tokens`."""

    tokens: Annotated[int, Field(ge=4)]
    # More than a window has requests would be used by none.
    count: Annotated[int, Field(ge=1, le=offered_load.MOST_REQUESTS_OF_A_WORKER)] = 1


class Conversations(_Closed):
    """Requests are the turns of conversations, `turns` each, with the history in the prompt.

    The load stays open: arrivals are drawn as ever, and a conversation's next turn is the first
    arrival `think_s` or more after the one before, whether or not that has been answered. So the
    history holds stand-ins of the asked length for the answers, and the prefix cache may hit all
    of it but the last of them. `prompt_tokens` are those of the new turn alone.
    """

    turns: Annotated[int, Field(ge=2, le=1000)]  # each prompt has all before it
    think_s: Positive


class Profile(_Closed):
    """One benchmark. Rates in requests/s, lengths in tokens.

    `models`: names to ask, LoRA adapters too, each with its weight; by default only `model`,
    whose metrics are read in any case.
    """

    base_url: Annotated[str, AfterValidator(address)]
    # As it is served: after vLLM's --served-model-name.
    model: Annotated[str, StringConstraints(min_length=1)]
    # The API that is asked; chat adds the model's template to each prompt, within `prompt_tokens`.
    endpoint: Literal["chat", "completions"] = "completions"
    # ladder: all of `rates` up to the first fail; search: λ* within `rate_range`, for at most
    # `budget_seconds` of load; rate: a verdict at slo.required_rate only, likewise.
    mode: Literal["ladder", "search", "rate"] = "ladder"
    rate_range: tuple[Positive, Positive] | None = None
    budget_seconds: Positive = 600.0
    rates: tuple[Positive, ...] = ()
    # Load at each rate of a ladder, at least, and before each window, not counted.
    step_seconds: Positive = 60.0
    warmup_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 10.0
    arrival: Literal["poisson", "constant", "gamma", "trace"] = "poisson"
    gamma_shape: Annotated[float, Field(ge=0.01, strict=True)] = 1.0
    # Of arrivals, lengths, models and turns; the words differ from run to run.
    seed: int = 1
    prompt_tokens: PromptLengths
    output_tokens: Lengths
    trace: Trace | None = None
    shared_prefix: SharedPrefix | None = None
    conversations: Conversations | None = None
    models: Annotated[dict[str, Weight], Field(min_length=1)] | None = None
    slo: Slo
    # After so long a request has failed.
    timeout_s: Positive = 60.0
    # Processes that share the load, where it is more than one core can send.
    workers: Annotated[int, Field(ge=1, le=offered_load.MOST_WORKERS)] | None = None
    # What the result depends on and this program can't see: model, commit, image digest, node,
    # gpu, and `simulated`, the list of what is not real.
    metadata: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _offered(self, info: ValidationInfo) -> Self:
        if info.context == STORED:
            return self
        offered_load.check(self)
        offered_load.check_windows(self, self.slo)
        return self

    @model_validator(mode="after")
    def _patient(self) -> Self:
        if self.timeout_s * 1e3 <= self.slo.ttft_p95_ms:
            raise ValueError(
                f"timeout_s ({self.timeout_s:g} s) must be above slo.ttft_p95_ms "
                f"({self.slo.ttft_p95_ms:g} ms), or a slow answer can't be told from none"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shared_prefix is not None and self.trace is not None and self.trace.prefixes:
            raise ValueError("trace.prefixes and shared_prefix exclude each other")
        if self.conversations is not None:
            if self.endpoint != "chat":
                raise ValueError("conversations need endpoint: chat")
            if self.trace is not None:
                raise ValueError("conversations and trace exclude each other")
            if self.conversations.think_s > self.warmup_seconds:
                raise ValueError(
                    f"warmup_seconds ({self.warmup_seconds:g} s) must be at least "
                    f"conversations.think_s ({self.conversations.think_s:g} s): what is measured "
                    "has a history that was sent"
                )
        return self

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts begin alike because that was asked for."""
        return bool(self.shared_prefix or self.conversations) or (
            self.trace is not None and self.trace.prefixes
        )

    @property
    def simulated(self) -> tuple[str, ...]:
        """What is not real in this measurement, as `metadata.simulated` lists it."""
        listed = self.metadata.get("simulated")
        return tuple(str(part) for part in listed) if isinstance(listed, list) else ()

    @property
    def ladder(self) -> tuple[float, ...]:
        """The rates to run, ascending: `rates`, and always the SLO's required rate."""
        if self.mode == "rate":
            return (self.slo.required_rate,)
        return tuple(sorted({*self.rates, self.slo.required_rate}))


def parse_profile(text: str, where: str = "profile") -> Profile:
    """The profile in a JSON `text`. Raises ProfileError that names each wrong field."""
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(describe(error, where)) from None


def load_profile(path: Path) -> Profile:
    """The profile in a JSON file. Raises ProfileError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: can't be read: {error}") from None
    return with_trace(parse_profile(text, str(path)), path.parent, f"{path}: trace.path")


def with_trace(profile: Profile, folder: Path, where: str) -> Profile:
    """The profile with its trace, if any, looked up from `folder` on and checked.

    Raises ProfileError that begins with `where` and names the trace's line and field.
    """
    if profile.trace is None:
        return profile
    path = (folder / profile.trace.path).resolve()
    try:
        _, sha256 = read_trace(path, profile.arrival)
    except TraceError as error:
        raise ProfileError(f"{where}: {error}") from None
    if profile.trace.sha256 not in (None, sha256):
        raise ProfileError(f"{where}: {path} has {sha256}, and not trace.sha256")
    found = profile.trace.model_copy(update={"path": str(path), "sha256": sha256})
    return profile.model_copy(update={"trace": found})


def describe(error: ValidationError, where: str, spec: type[BaseModel] = Profile) -> str:
    """One line for each mistake: where, field, what is wrong."""
    return "\n".join(
        f"{where}: {dotted(place) or 'profile'}: {message}"
        for place, message in mistakes(error, spec)
    )
