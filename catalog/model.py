"""A model that can be promoted: one YAML file in catalog/models/, its name is the partition key."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from catalog import engine_args, offered_load
from catalog.lengths import Lengths
from catalog.offered_load import PromptLengths
from catalog.spec import (
    DAY,
    STORED,
    Count,
    Cpu,
    HubRepo,
    LabelValue,
    Misfit,
    ObjectName,
    PositiveFloat,
    PositiveInt,
    Revision,
    Seconds,
    Size,
    Spec,
    amount,
    matching,
)
from catalog.trace import Recorded


class Gpus(Spec):
    """GPUs of one replica. `products`: allowed values of the node label nvidia.com/gpu.product."""

    count: Annotated[int, Field(ge=1, le=8)]
    # An extended resource: cpu or memory here would start a Pod without a GPU.
    resource: Annotated[str, matching(r"[a-z0-9.-]+/[\w.-]+", "nvidia.com/gpu")] = "nvidia.com/gpu"
    products: tuple[LabelValue, ...] = ()
    # Refuses a GPU that is too small before the engine runs out of memory on it.
    min_memory_mib: PositiveInt | None = None


class Resources(Spec):
    """CPU and memory of one replica: requests; memory is the limit too."""

    cpu: Cpu
    memory: Size
    shm: Size = "1Gi"  # /dev/shm; 64Mi, the default of a container, breaks tensor parallel

    @model_validator(mode="after")
    def _holds_shm(self, info: ValidationInfo) -> Self:
        given = info.context != STORED and "shm" in self.model_fields_set
        if given and amount(self.shm) > amount(self.memory):
            raise Misfit(f"{self.shm} is a part of memory ({self.memory}), and more", "shm")
        return self


class Weights(Spec):
    """Which files of the repository are fetched, and when those on the volume are read again.

    Each promotion compares sizes and mtimes with the manifest; every byte where the last time is
    `rehash_after_days` ago.
    """

    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allow_pickle: bool = False
    rehash_after_days: PositiveFloat = 30.0
    # Secret in the cluster's namespace with the key HF_TOKEN; only the Jobs see it.
    token_secret: ObjectName | None = None


class Adapter(Spec):
    """A LoRA adapter that is served beside its model, under a name of its own."""

    # As vLLM takes it in --lora-modules name=path.
    name: Annotated[
        str,
        StringConstraints(max_length=63),
        matching(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", "sql-v2"),
    ]
    repo: HubRepo
    revision: Revision


class KnownAnswer(Spec):
    """A prompt for the smoke test. The answer must contain `expect`, ignoring case."""

    prompt: Annotated[str, matching(r"(?s).*\S.*", "What is the capital of France?")]
    # An empty one is in every answer.
    expect: Annotated[str, matching(r"(?s).*\S.*", "Paris")]
    max_tokens: PositiveInt = 64


class Trace(Spec):
    """A recorded load, see trace.py. `path`: the name of a file beside the model's.

    `prefixes`: equal `hash_ids` are equal text, of `block_tokens` each, as they were recorded.
    """

    path: Annotated[str, matching(r"[\w.-]+\.jsonl", "chat.jsonl")]
    prefixes: bool = False
    block_tokens: Annotated[int, Field(ge=4)] = 512


class Traffic(Spec):
    """The load that the benchmark offers, in req/s for one replica.

    `mode` ladder runs `rates` and slo.required_rate, up to the first fail; search finds what one
    replica carries, within `rate_range` (lowest, highest) and for `budget_seconds` of load at most.
    A request without an answer after `timeout_seconds` failed. Equal `seed`s are equal arrivals
    and lengths; the words of the prompts are new each time.
    """

    arrival: Literal["poisson", "constant", "gamma", "trace"] = "poisson"
    gamma_shape: Annotated[float, Field(ge=0.01)] = 1.0
    prompt_tokens: PromptLengths
    output_tokens: Lengths
    trace: Trace | None = None
    rates: tuple[PositiveFloat, ...] = ()
    mode: Literal["ladder", "search"] = "ladder"
    rate_range: tuple[PositiveFloat, PositiveFloat] | None = None
    budget_seconds: PositiveFloat = 600.0
    step_seconds: PositiveFloat = 60.0
    warmup_seconds: PositiveFloat = 10.0
    timeout_seconds: PositiveFloat = 60.0
    seed: int = 1
    # Processes that send it, where it is more than one core can.
    workers: Annotated[int, Field(ge=1, le=offered_load.MOST_WORKERS)] = 1

    @model_validator(mode="after")
    def _offered(self, info: ValidationInfo) -> Self:
        if info.context != STORED:
            offered_load.check(self)
        return self

    def longest(self, recorded: Sequence[Recorded] = ()) -> int:
        """Tokens of the longest request that there may be, prompt and answer; those `recorded`
        are the trace's."""
        fixed_prompt, fixed_output = self.prompt_tokens.most, self.output_tokens.most
        return max(
            (row.prompt_tokens if self.prompt_tokens.trace else fixed_prompt)
            + (row.output_tokens if self.output_tokens.trace else fixed_output)
            for row in recorded or (Recorded(0.0, 1, 1),)
        )


class Slo(Spec):
    """What one replica must keep while it takes `required_rate` requests/s.

    A request meets it when its TTFT and the 95th percentile of its own gaps between tokens are
    within the limits (ms). `attainment` of the scheduled requests must; at most `error_rate` of
    them may fail.
    """

    ttft_p95_ms: PositiveFloat
    itl_p95_ms: PositiveFloat
    error_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.95
    required_rate: PositiveFloat


class Scaling(Spec):
    """Bounds of the replicas, and how fast traffic grows (req/s per s) at worst."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Count
    growth: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise Misfit(
                f"{self.min_replicas} is above max_replicas ({self.max_replicas})", "min_replicas"
            )
        return self


class RolloutPolicy(Spec):
    """How a candidate comes up, in seconds.

    `auto` takes blue_green where a spare GPU is free, else recreate (with an outage, which is
    stated before it starts). The start-up budget is weight bytes / measured read throughput,
    within start_seconds_min..max.
    """

    strategy: Literal["auto", "blue_green", "recreate"] = "auto"
    start_seconds_min: Seconds = 300
    start_seconds_max: Seconds = 3600
    soak_seconds: Annotated[PositiveFloat, DAY] = 30.0
    drain_seconds: Seconds = 120

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start_seconds_min > self.start_seconds_max:
            raise Misfit(
                f"{self.start_seconds_min} is above start_seconds_max ({self.start_seconds_max})",
                "start_seconds_min",
            )
        return self


class ModelSpec(Spec):
    """One model. `name` is the file's name without .yaml."""

    name: Annotated[
        str,
        StringConstraints(max_length=40),
        # It ends in names of Services and Jobs, and may have dots.
        # A Service's begins with a letter (RFC 1035).
        matching(r"[a-z]([-a-z0-9.]*[a-z0-9])?", "llama-3.1-8b-instruct"),
    ]
    repo: HubRepo
    revision: Revision
    # As it stands in requests, after --served-model-name.
    served_name: Annotated[str, matching(r"[A-Za-z0-9][\w./:@-]*", "llama-3.1-8b")]
    image: str  # of vLLM, by digest
    gpus: Gpus
    resources: Resources
    # Of `vllm serve` and its variables, but those that the pipeline sets itself.
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    # The smoke test asks /v1/chat/completions too; false for a base model without a template.
    chat: bool = True
    weights: Weights = Weights()
    adapters: tuple[Adapter, ...] = ()
    smoke: Annotated[tuple[KnownAnswer, ...], Field(min_length=1)]
    traffic: Traffic
    slo: Slo
    scaling: Scaling
    rollout: RolloutPolicy = RolloutPolicy()
    # null: the first pool of the cluster that has the GPUs, CPU and memory. Spot pools, whose nodes
    # may go away, only where the model allows them.
    node_pool: str | None = None
    spot: bool = False

    @property
    def object_name(self) -> str:
        """The name as Kubernetes objects carry it: a Service's name may have no dots."""
        return self.name.replace(".", "-")

    @field_validator("image")
    @classmethod
    def _pinned(cls, image: str, info: ValidationInfo) -> str:
        if info.context != STORED and not re.fullmatch(
            r"[A-Za-z0-9][\w./:-]*@sha256:[0-9a-f]{64}", image
        ):
            raise ValueError(f"{image!r} has no digest; pin it: <image>@sha256:<64 hex digits>")
        return image

    @field_validator("args")
    @classmethod
    def _usable(cls, args: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.context != STORED:
            engine_args.check(args)
        return args

    @field_validator("env")
    @classmethod
    def _settable(cls, env: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if info.context != STORED:
            engine_args.check_env(env)
        return env

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        """A request names its model or an adapter, so each name may stand there once."""
        taken = {self.served_name: "served_name"}
        for place, adapter in enumerate(self.adapters):
            if adapter.name in taken:
                raise Misfit(
                    f"{adapter.name!r} is the name of {taken[adapter.name]} already",
                    "adapters",
                    place,
                    "name",
                )
            taken[adapter.name] = f"adapters.{place}"
        return self

    @model_validator(mode="after")
    def _measurable(self, info: ValidationInfo) -> Self:
        """What the benchmark would refuse, or never measure, once the candidate is up."""
        traffic, slo = self.traffic, self.slo
        if info.context != STORED:
            offered_load.check_windows(traffic, slo, "traffic")
        if traffic.timeout_seconds * 1e3 <= slo.ttft_p95_ms:
            raise Misfit(
                f"{traffic.timeout_seconds:g} s must be above slo.ttft_p95_ms "
                f"({slo.ttft_p95_ms:g} ms), or a slow answer can't be told from none",
                "traffic",
                "timeout_seconds",
            )
        if problem := self.too_long(traffic.longest()):
            raise Misfit(f"with output_tokens {problem}", "traffic", "prompt_tokens")
        for place, answer in enumerate(self.smoke):
            # A prompt has one token at least.
            if problem := self.too_long(answer.max_tokens + 1):
                raise Misfit(f"with a prompt {problem}", "smoke", place, "max_tokens")
        return self

    def too_long(self, tokens: int) -> str:
        """Why the engine won't take so many in prompt and answer; empty if it may."""
        limit = engine_args.max_model_len(self.args)
        if limit is None or tokens <= limit:
            return ""
        return f"these are {tokens} tokens, --max-model-len allows {limit}"
