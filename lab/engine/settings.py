"""vLLM's flags, and simulator.json: how fast the simulator is, what it answers, how it fails."""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Flags of `vllm serve` that the simulator takes and has no use for: with a value, without one.
IGNORED_VALUES = (
    "--block-size --chat-template --data-parallel-size --distributed-executor-backend --dtype "
    "--generation-config --gpu-memory-utilization --kv-cache-dtype --kv-cache-memory-bytes "
    "--load-format --max-loras --max-num-batched-tokens "
    "--pipeline-parallel-size --quantization --reasoning-parser --revision --seed --tokenizer "
    "--tokenizer-mode --tool-call-parser --uvicorn-log-level"
)
IGNORED_SWITCHES = (
    "--async-scheduling --disable-custom-all-reduce --disable-log-stats --enable-auto-tool-choice "
    "--enable-chunked-prefill --enable-log-requests --enable-prefix-caching "
    "--enforce-eager --no-enable-chunked-prefill --no-enable-log-requests --trust-remote-code"
)

Answers = Literal["known", "nonsense", "null", "reasoning", "random_unless_temperature_0"]
RequestFault = Literal[
    "error_event", "only_done", "no_done", "close_early", "no_usage", "status_503", "stall"
]


class SettingsError(Exception):
    """simulator.json or SIMULATOR is wrong; the message names the field."""


@dataclass(frozen=True)
class ServiceCurve:
    """How long the simulated GPU takes. The defaults serve about 11.8 req/s of 64 prompt and 16
    output tokens at most, and hold a TTFT p95 of 500 ms to about 10.

    One step gives each running sequence one token and takes `decode_ms_per_step` +
    `decode_ms_per_sequence` a sequence + `prefill_ms_per_token` for each prompt token that is
    new in it. `ttft_base_ms` passes before a request is queued. `max_num_seqs` run at once.
    """

    ttft_base_ms: float = 10.0
    prefill_ms_per_token: float = 0.2
    decode_ms_per_step: float = 24.0
    decode_ms_per_sequence: float = 1.5
    max_num_seqs: int = 8
    kv_cache_blocks: int = 4096  # of 16 tokens
    load_bytes_per_s: float = 500e6


@dataclass(frozen=True)
class Failure:
    """The engine as a whole fails: logs `log` `after_s` seconds after its start or after it
    listens (`when`), then exits with `code`, or hangs: never listens, or answers /health only.
    """

    kind: Literal["exit", "hang"]
    log: str
    when: Literal["start", "serving"] = "start"
    after_s: float = 1.0
    code: int = 1


@dataclass(frozen=True)
class RequestFailure:
    """A `share` of the requests ends wrongly. `seconds`: how long a stall lasts."""

    kind: RequestFault
    share: float
    seconds: float = 2.0


@dataclass(frozen=True)
class Simulation:
    """simulator.json in the model's folder, overridden by the environment variable SIMULATOR."""

    service_curve: ServiceCurve = field(default_factory=ServiceCurve)
    answers: Answers = "known"
    fail: Failure | None = None
    requests: tuple[RequestFailure, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Flags:
    """What the simulator heeds of its command line."""

    model: Path
    served_names: tuple[str, ...]
    host: str
    port: int
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_queued_reqs: int | None
    tensor_parallel_size: int
    shutdown_timeout_s: float
    api_key: str | None
    prefix_caching: bool
    enable_lora: bool
    lora_modules: Mapping[str, Path]  # by the name that requests give
    max_lora_rank: int
    token_log: Path | None


def parse_flags(arguments: list[str] | None) -> Flags:
    """The command line of `vllm serve`. An unknown flag ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="vllm serve", usage="vllm serve <model folder> [flags] (simulator)", allow_abbrev=False
    )
    add = parser.add_argument
    add("model_tag")
    add("--served-model-name", nargs="+", default=[])
    add("--host", default="0.0.0.0")
    add("--port", type=int, default=8000)
    add("--max-model-len", type=int)
    add("--max-num-seqs", type=int)
    add("--max-num-queued-reqs", type=int)
    add("--tensor-parallel-size", "-tp", type=int, default=1)
    add("--shutdown-timeout", type=float, default=0.0)
    add("--api-key")
    add("--no-enable-prefix-caching", action="store_true")
    add("--enable-lora", action="store_true")
    add("--lora-modules", nargs="+", default=[], type=_lora_module)
    add("--max-lora-rank", type=int, default=16)
    # The simulator's own: a line of JSON for each token that it wrote.
    add("--token-log", type=Path, default=os.environ.get("SIMULATOR_TOKEN_LOG"))
    for flag in IGNORED_VALUES.split():
        add(flag)
    for flag in IGNORED_SWITCHES.split():
        add(flag, action="store_true")
    given = parser.parse_args(arguments)
    return Flags(
        model=Path(given.model_tag),
        served_names=tuple(given.served_model_name) or (given.model_tag,),
        host=given.host,
        port=given.port,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        max_num_queued_reqs=given.max_num_queued_reqs,
        tensor_parallel_size=given.tensor_parallel_size,
        shutdown_timeout_s=given.shutdown_timeout,
        api_key=given.api_key,
        prefix_caching=not given.no_enable_prefix_caching,
        enable_lora=given.enable_lora,
        lora_modules=dict(given.lora_modules),
        max_lora_rank=given.max_lora_rank,
        token_log=Path(given.token_log) if given.token_log else None,
    )


def _lora_module(text: str) -> tuple[str, Path]:
    """name=path. vLLM takes JSON too."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=path")
    return name, Path(path)


def load_simulation(folder: Path) -> Simulation:
    """How `folder`'s model is simulated. Raises SettingsError."""
    fields: dict[str, Any] = {}
    path = folder / "simulator.json"
    sources = [(str(path), path.read_text() if path.exists() else "{}")]
    sources.append(("SIMULATOR", os.environ.get("SIMULATOR") or "{}"))
    for where, text in sources:
        try:
            fields |= json.loads(text)
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{where}: is no JSON object: {error}") from None
    if "service_curve" in fields:
        fields["service_curve"] = _make(ServiceCurve, fields["service_curve"], "service_curve")
    if fields.get("fail"):
        fields["fail"] = _make(Failure, fields["fail"], "fail")
    if "requests" in fields:
        fields["requests"] = tuple(
            _make(RequestFailure, entry, "requests") for entry in fields["requests"]
        )
    simulation: Simulation = _make(Simulation, fields, "simulator.json")
    return simulation


def _make(kind: type[Any], fields: dict[str, Any], where: str) -> Any:
    known = {entry.name for entry in dataclasses.fields(kind)}
    if unknown := set(fields) - known:
        raise SettingsError(f"{where}: no field {sorted(unknown)}, there are {sorted(known)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from None
