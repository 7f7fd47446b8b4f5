"""What load is offered, to whom, and the SLO that it is judged by: the program's one input."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProfileError(Exception):
    """The profile is wrong; the message has a line `where: field: what` for each mistake."""


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slo(_Closed):
    """What one replica must keep at `required_rate` requests/s.

    A request meets it when its TTFT and the 95th percentile of its own gaps between tokens are
    within the limits (ms). `attainment` of the scheduled requests must; at most `error_rate` of
    them may fail.
    """

    ttft_p95_ms: Positive
    itl_p95_ms: Positive
    error_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    required_rate: Positive
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.95


class Profile(_Closed):
    """One benchmark. Rates in requests/s, lengths in tokens."""

    base_url: Annotated[str, StringConstraints(pattern=r"^http://[^/\s@]+/?$")]
    model: Annotated[str, StringConstraints(min_length=1)]
    endpoint: Literal["chat", "completions"] = "completions"
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)]
    step_seconds: Positive = 60.0
    warmup_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    arrival: Literal["poisson", "constant", "gamma"] = "poisson"
    gamma_shape: Positive = 1.0
    seed: int = 1
    prompt_tokens: Annotated[int, Field(ge=4)]
    output_tokens: Annotated[int, Field(ge=1)]
    slo: Slo
    timeout_s: Positive = 60.0
    # Processes that share the load, where it is more than one core can send.
    workers: Annotated[int, Field(ge=1)] = 1
    # What the result depends on and this program can't see: model, commit, image digest, node,
    # gpu, and `simulated`, the list of what is not real.
    metadata: dict[str, JsonValue] = {}

    @field_validator("rates")
    @classmethod
    def _ascending(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if list(rates) != sorted(set(rates)):
            raise ValueError("the ladder must ascend, each rate once")
        return rates

    @model_validator(mode="after")
    def _patient(self) -> Self:
        if self.timeout_s * 1e3 <= self.slo.ttft_p95_ms:
            raise ValueError(
                f"timeout_s ({self.timeout_s:g} s) must be above slo.ttft_p95_ms "
                f"({self.slo.ttft_p95_ms:g} ms), or a slow answer can't be told from none"
            )
        return self

    @property
    def simulated(self) -> tuple[str, ...]:
        """What is not real in this measurement, as `metadata.simulated` lists it."""
        listed = self.metadata.get("simulated")
        return tuple(str(part) for part in listed) if isinstance(listed, list) else ()

    @property
    def ladder(self) -> tuple[float, ...]:
        """The rates to run, ascending: `rates`, and always the SLO's required rate."""
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
    return parse_profile(text, str(path))


def describe(error: ValidationError, where: str) -> str:
    """One line for each mistake: where, field, what is wrong."""
    lines = []
    for detail in error.errors(include_url=False):
        field = ".".join(map(str, detail["loc"])) or "profile"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            holder = Slo if detail["loc"][0] == "slo" else Profile
            message = f"is no field here; allowed: {', '.join(holder.model_fields)}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif not detail["type"].startswith(("value_error", "json_invalid")):
            message = f"{message}, got {detail['input']!r}"
        lines.append(f"{where}: {field}: {message}")
    return "\n".join(lines)
