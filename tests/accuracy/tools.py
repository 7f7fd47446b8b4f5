"""How each tool is told to offer a load, and what its own raw output says about each request."""

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab import vllm_cpu
from tests.accuracy import peers
from tests.accuracy.scenarios import MODEL, PROMPT_TOKENS, TOKENS
from tests.accuracy.score import SETTLE_S, Answer, prompt_of

OURS = "ours"


@dataclass(frozen=True)
class Load:
    """`count` requests at `rate` a second by Poisson, to a server with this base `url`.

    `tokenizer`: a folder; the peers make their prompts with it. Files are left in `folder`.
    """

    url: str
    chat: bool
    rate: float
    count: int
    seed: int
    tokenizer: Path
    folder: Path


@dataclass(frozen=True)
class Tool:
    """`command` is run in the load's folder with `environment`, then `read` tells its answers."""

    command: Callable[[Load], list[str]]
    read: Callable[[Load], Iterator[Answer]]
    environment: Mapping[str, str]


def _ours(load: Load) -> list[str]:
    profile = {
        "base_url": load.url,
        "model": MODEL,
        "endpoint": "chat" if load.chat else "completions",
        "rates": [load.rate],
        "warmup_seconds": SETTLE_S,
        "step_seconds": load.count / load.rate - SETTLE_S,
        "seed": load.seed,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": TOKENS,
        "timeout_s": 20,
        "slo": {"ttft_p95_ms": 250, "itl_p95_ms": 250, "required_rate": load.rate},
        "metadata": {"simulated": ["engine: reference server"]},
    }
    path = load.folder / "profile.json"
    path.write_text(json.dumps(profile))
    return [sys.executable, "-m", "loadtests", "--profile", str(path), "--out", str(load.folder)]


def _read_ours(load: Load) -> Iterator[Answer]:
    with gzip.open(load.folder / "rows.jsonl.gz", "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["row"] == "request"]
    last = max(row["repeat"] for row in rows)  # those before it were thrown away
    for row in rows:
        if row["repeat"] < last or row["phase"] == "warmup":
            continue
        key = f"{row['rate']:g}-{row['repeat']}-{row['number']}"
        firsts = [t for t in (row["first_reasoning"], row["first_content"]) if t is not None]
        # From the scheduled time, as the verdict takes it: a late send is an error too.
        ttft = (min(firsts) - row["scheduled"]) / 1e6 if firsts else None
        gaps: list[float] = []
        for (before, now), tokens in zip(
            pairwise(row["chunk_ns"]), row["chunk_tokens"][1:], strict=True
        ):
            count = max(1, round(tokens))
            gaps += [(now - before) / 1e6 / count] * count
        yield Answer(key, row["error"] is not None, ttft, gaps)


def _vllm(load: Load) -> list[str]:
    command = [str(vllm_cpu.folder() / "bin" / "python"), "-m", "vllm.entrypoints.cli.main"]
    command += ["bench", "serve", "--base-url", load.url, "--model", MODEL]
    command += ["--tokenizer", str(load.tokenizer), "--dataset-name", "random"]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(TOKENS)]
    command += ["--num-prompts", str(load.count), "--request-rate", str(load.rate)]
    command += ["--seed", str(load.seed), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--request-id-prefix", "v-", "--save-result", "--save-detailed"]
    command += ["--result-dir", str(load.folder), "--result-filename", "result.json"]
    if load.chat:
        return [*command, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    return [*command, "--backend", "openai", "--endpoint", "/v1/completions"]


def _read_vllm(load: Load) -> Iterator[Answer]:
    result = json.loads((load.folder / "result.json").read_text())
    lists = zip(result["errors"], result["ttfts"], result["itls"], strict=True)
    for number, (error, ttft, gaps) in enumerate(lists):
        yield Answer(f"v-{number}", bool(error), ttft * 1e3, [gap * 1e3 for gap in gaps])


def _guidellm(load: Load) -> list[str]:
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    command = [str(peers.folder("guidellm") / "bin" / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={load.url},model={MODEL}"]
    command[-1] += f",request_format={path}"
    command += ["--profile", f"kind=poisson,rate={load.rate:g}"]
    command += ["--constraint", f"kind=max_requests,count={load.count}"]
    command += ["--tokenizer", f"kind=hf_auto,model={load.tokenizer}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS}"]
    command[-1] += f",output_tokens={TOKENS}"
    return [*command, "--output", f"kind=json,path={load.folder / 'result.json'}"]


def _read_guidellm(load: Load) -> Iterator[Answer]:
    result = json.loads((load.folder / "result.json").read_text())
    requests = result["benchmarks"][0]["requests"]
    for kind, failed in (("successful", False), ("errored", True), ("incomplete", True)):
        for request in requests[kind] or ():
            body = json.loads(request["request_args"])["body"]
            gap = request["inter_token_latency_ms"]
            yield Answer(
                prompt_of(json.dumps(body)),
                failed,
                request["time_to_first_token_ms"],
                [] if gap is None else [gap],
            )


def _aiperf(load: Load) -> list[str]:
    return [*aiperf(load), "--request-count", str(load.count)]


def aiperf(load: Load) -> list[str]:
    """AIPerf's command for an open load, but for how long."""
    command = [str(peers.folder("aiperf") / "bin" / "aiperf"), "profile", "--model", MODEL]
    command += ["--url", load.url, "--streaming", "--endpoint-type"]
    command += ["chat" if load.chat else "completions", "--tokenizer", str(load.tokenizer)]
    command += ["--request-rate", f"{load.rate:g}", "--request-rate-mode", "poisson"]
    command += ["--random-seed", str(load.seed)]
    command += ["--isl", str(PROMPT_TOKENS), "--osl", str(TOKENS)]
    command += ["--extra-inputs", "ignore_eos:true", "--export-level", "records"]
    return [*command, "--artifact-dir", str(load.folder), "--ui", "none"]


def _read_aiperf(load: Load) -> Iterator[Answer]:
    for line in (load.folder / "profile_export.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {name: metric["value"] for name, metric in record["metrics"].items()}
        gaps = values.get("inter_chunk_latency") or []
        if values.get("output_sequence_length") != len(gaps) + 1:
            gaps = [values["inter_token_latency"]] if "inter_token_latency" in values else []
        yield Answer(
            record["metadata"]["x_request_id"],
            record.get("error") is not None,
            values.get("time_to_first_token"),
            gaps,
        )


def _inference_perf(load: Load) -> list[str]:
    lengths = {"type": "fixed", "std_dev": 0, "total_count": load.count}
    config = {
        "api": {"type": "chat" if load.chat else "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": _fixed(PROMPT_TOKENS, lengths),
            "output_distribution": _fixed(TOKENS, lengths),
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": load.rate, "duration": round(load.count / load.rate)}],
            "num_workers": 1,
        },
        "server": {"type": "vllm", "model_name": MODEL, "base_url": load.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(load.tokenizer)},
        "report": {"request_lifecycle": {"summary": False, "per_request": True}},
        "storage": {"local_storage": {"path": str(load.folder)}},
    }
    path = load.folder / "config.json"  # JSON is YAML
    path.write_text(json.dumps(config))
    return [str(peers.folder("inference_perf") / "bin" / "inference-perf"), "-c", str(path)]


def _fixed(tokens: int, lengths: Mapping[str, Any]) -> dict[str, Any]:
    return {**lengths, "min": tokens, "max": tokens, "mean": tokens}


def _read_inference_perf(load: Load) -> Iterator[Answer]:
    text = (load.folder / "per_request_lifecycle_metrics.json").read_text()
    for request in json.loads(text):
        metrics = request["info"].get("response_metrics") or {}
        times = metrics.get("output_token_times") or []
        yield Answer(
            prompt_of(request["request"]),
            request["error"] is not None,
            (times[0] - request["start_time"]) * 1e3 if times else None,
            [(after - before) * 1e3 for before, after in pairwise(times)],
        )


_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
TOOLS: Mapping[str, Tool] = {
    OURS: Tool(_ours, _read_ours, {}),
    "vllm": Tool(_vllm, _read_vllm, {**_OFFLINE, "VLLM_NO_USAGE_STATS": "1"}),
    "inference_perf": Tool(_inference_perf, _read_inference_perf, _OFFLINE),
    # With HF_HUB_OFFLINE it takes a tokenizer's folder for a repository's name.
    "aiperf": Tool(_aiperf, _read_aiperf, {"DO_NOT_TRACK": "1"}),
    "guidellm": Tool(_guidellm, _read_guidellm, _OFFLINE),
}


def available() -> dict[str, str]:
    """The tools that can be run, with their versions."""
    return {OURS: "this checkout", **{t: v for t, v in peers.installed().items() if t in TOOLS}}


def environment(tool: str) -> dict[str, str]:
    """Of the tool's process."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if tool == "vllm":
        inherited["PYTHONPATH"] = str(vllm_cpu.folder() / "overlay")
    return {**inherited, **TOOLS[tool].environment}


def said(load: Load) -> Sequence[str]:
    """Verdict and reason of this project's run."""
    result = json.loads((load.folder / "result.json").read_text())
    return result["verdict"], result["reason"]
