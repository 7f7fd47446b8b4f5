"""What load is offered, to whom, and the SLO that it is judged by: the program's one input."""

import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from catalog.lengths import Lengths
from catalog.model import Slo
from catalog.trace import TraceError, read_trace

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    count: Annotated[int, Field(ge=1)] = 1


class Conversations(_Closed):
    """Requests are the turns of conversations, `turns` each, with the history in the prompt.

    The load stays open: arrivals are drawn as ever, and a conversation's next turn is the first
    arrival `think_s` or more after the one before, whether or not that has been answered. So the
    history holds stand-ins of the asked length for the answers, and the prefix cache may hit all
    of it but the last of them. `prompt_tokens` are those of the new turn alone.
    """

    turns: Annotated[int, Field(ge=2)]
    think_s: Positive


class Profile(_Closed):
    """One benchmark. Rates in requests/s, lengths in tokens.

    `models`: names to ask, LoRA adapters too, each with its weight; by default only `model`,
    whose metrics are read in any case.
    """

    base_url: Annotated[str, StringConstraints(pattern=r"^http://[^/\s@]+/?$")]
    model: Annotated[str, StringConstraints(min_length=1)]
    endpoint: Literal["chat", "completions"] = "completions"
    # ladder: all of `rates` up to the first fail; search: λ* within `rate_range`, for at most
    # `budget_seconds` of load; rate: a verdict at slo.required_rate only, likewise.
    mode: Literal["ladder", "search", "rate"] = "ladder"
    rate_range: tuple[Positive, Positive] | None = None
    budget_seconds: Positive = 600.0
    rates: Annotated[tuple[Positive, ...], Field(validate_default=True)] = ()
    step_seconds: Positive = 60.0
    warmup_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    arrival: Literal["poisson", "constant", "gamma", "trace"] = "poisson"
    gamma_shape: Positive = 1.0
    seed: int = 1
    prompt_tokens: Lengths
    output_tokens: Lengths
    trace: Trace | None = None
    shared_prefix: SharedPrefix | None = None
    conversations: Conversations | None = None
    models: Annotated[dict[str, Positive], Field(min_length=1)] | None = None
    slo: Slo
    timeout_s: Positive = 60.0
    # Processes that share the load, where it is more than one core can send.
    workers: Annotated[int, Field(ge=1)] | None = None
    # What the result depends on and this program can't see: model, commit, image digest, node,
    # gpu, and `simulated`, the list of what is not real.
    metadata: dict[str, JsonValue] = {}

    @field_validator("rates")
    @classmethod
    def _ascending(cls, rates: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if not rates and info.data.get("mode") == "ladder":
            raise ValueError("is missing: the ladder of arrival rates, or say another mode")
        if list(rates) != sorted(set(rates)):
            raise ValueError("the ladder must ascend, each rate once")
        return rates

    @model_validator(mode="after")
    def _search_has_a_range(self) -> Self:
        if self.mode == "search":
            if self.rate_range is None:
                raise ValueError("rate_range is missing: where to search, [lowest, highest] req/s")
            lowest, highest = self.rate_range
            if not lowest <= self.slo.required_rate <= highest:
                raise ValueError(
                    f"rate_range ({lowest:g} to {highest:g}) must hold slo.required_rate "
                    f"({self.slo.required_rate:g}), where the search starts"
                )
        return self

    @model_validator(mode="after")
    def _patient(self) -> Self:
        if self.timeout_s * 1e3 <= self.slo.ttft_p95_ms:
            raise ValueError(
                f"timeout_s ({self.timeout_s:g} s) must be above slo.ttft_p95_ms "
                f"({self.slo.ttft_p95_ms:g} ms), or a slow answer can't be told from none"
            )
        return self

    @field_validator("prompt_tokens")
    @classmethod
    def _unique(cls, lengths: Lengths) -> Lengths:
        if lengths.fixed is not None and lengths.fixed < 4:
            raise ValueError(f"{lengths.fixed} tokens can't be unique, ask for 4 or more")
        return lengths

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        uses = [name for name in ("prompt_tokens", "output_tokens") if getattr(self, name).trace]
        uses += ["arrival"] if self.arrival == "trace" else []
        if uses and self.trace is None:
            raise ValueError(f"trace is missing, but {uses[0]} is to come from it")
        if self.trace is not None and not uses:
            raise ValueError(
                "trace is used by nothing: say trace for arrival, prompt_tokens or output_tokens"
            )
        if self.trace is not None and self.trace.prefixes:
            if "prompt_tokens" not in uses:
                raise ValueError("trace.prefixes need prompt_tokens: trace")
            if self.shared_prefix is not None:
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
    return with_trace(parse_profile(text, str(path)), path.parent, str(path))


def with_trace(profile: Profile, folder: Path, where: str) -> Profile:
    """The profile with its trace, if any, looked up from `folder` on and checked.

    Raises ProfileError that names the trace's line and field.
    """
    if profile.trace is None:
        return profile
    path = (folder / profile.trace.path).resolve()
    try:
        _, sha256 = read_trace(path)
    except TraceError as error:
        raise ProfileError(f"{where}: trace.path: {error}") from None
    if profile.trace.sha256 not in (None, sha256):
        raise ProfileError(f"{where}: trace.sha256: {path} has {sha256}")
    found = profile.trace.model_copy(update={"path": str(path), "sha256": sha256})
    return profile.model_copy(update={"trace": found})


def describe(error: ValidationError, where: str) -> str:
    """One line for each mistake: where, field, what is wrong."""
    lines = []
    for detail in error.errors(include_url=False):
        field = ".".join(map(str, detail["loc"])) or "profile"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            allowed = ", ".join(_fields(detail["loc"][:-1]))
            message = f"is no field here; allowed: {allowed}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif not detail["type"].startswith(("value_error", "json_invalid")):
            message = f"{message}, got {detail['input']!r}"
        lines.append(f"{where}: {field}: {message}")
    return "\n".join(lines)


def _fields(place: tuple[int | str, ...]) -> list[str]:
    """The fields that the part of a profile at `place` has."""
    holder: type[BaseModel] = Profile
    for key in place:
        annotation: Any = holder.model_fields[str(key)].annotation
        holder = next(
            a
            for a in (annotation, *typing.get_args(annotation))
            if isinstance(a, type) and issubclass(a, BaseModel)
        )
    return list(holder.model_fields)
