"""The smoke test of a candidate: GPU truth, health, name, known answers, moving counters.

/health is 200 on a hung engine, and a healthy engine can talk nonsense: only answers prove.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Any

from catalog.model import KnownAnswer, ModelSpec
from k8s import logs, pod_http, prometheus
from k8s.client import Client
from k8s.errors import HttpStatus, PodUnreachable
from k8s.gpus import Gpu, parse_nvidia_smi
from k8s.manifests import Release
from k8s.manifests.release import GPU_CHECK, PORT
from k8s.rollout import Rollout
from k8s.wait import Progress

QUICK_S = 10.0
ANSWER_S = 120.0
COUNTERS_S = 10.0  # vLLM updates its counters a little after the answer
USED_BEFORE_START = 0.05  # share of a GPU's memory; drivers and displays hold a little
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"


@dataclass(frozen=True)
class Answer:
    """What the engine gave to a known prompt. `text` None: no text at all."""

    prompt: str
    expect: str
    text: str | None
    prompt_tokens: int
    tokens: int
    ok: bool


@dataclass(frozen=True)
class SmokeReport:
    """All that was looked at. `failures`: a sentence each; none means passed."""

    gpus: tuple[Gpu, ...]
    driver: str
    health: int
    model_id: str
    model_root: str
    answers: tuple[Answer, ...]
    tokens_advanced: int
    failures: tuple[str, ...]
    # What each LoRA adapter gave to the first known prompt; what is right, nobody knows.
    adapters: dict[str, Answer] = field(default_factory=dict)
    asked_again: int = 0  # completions whose first connection was cut: they may count twice

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def summary(self) -> str:
        """One line for the gate."""
        if not self.passed:
            return "; ".join(self.failures)
        products = ", ".join(sorted({gpu.product for gpu in self.gpus}))
        twice = f", with {self.asked_again} asked again after a cut" if self.asked_again else ""
        adapters = f"adapters that answer: {', '.join(self.adapters)}; " if self.adapters else ""
        return (
            f"{len(self.gpus)} × {products}, driver {self.driver}; "
            f"{len(self.answers)} of {len(self.answers)} known answers right; {adapters}"
            f"token counters advanced by {self.tokens_advanced}{twice}"
        )


def smoke_test(
    client: Client, release: Release, rollout: Rollout, *, progress: Progress = lambda _: None
) -> SmokeReport:
    """Ask the candidate's Pod. A failing candidate gives a report with failures, no error.

    Everything is looked at even after a failure, so that one report says all.
    """
    failures: list[str] = []
    progress(f"Pod {rollout.pod}: asking its GPU check")
    gpus = _gpus(client, release, rollout.pod, failures)
    progress(f"Pod {rollout.pod}: asking /health and /v1/models")
    engine = _Engine(client, rollout.pod, release.model)
    health = _health(engine, failures)
    model_id, root = _names(engine, release, failures)
    before = _tokens(engine, failures)
    answers = []
    for known in release.model.smoke:
        progress(f"Pod {rollout.pod}: asking {known.prompt!r}")
        answers.append(_ask(engine, known, failures))
    adapters = {}
    for adapter in release.adapters:
        progress(f"Pod {rollout.pod}: asking adapter {adapter.name}")
        anything = release.model.smoke[0].model_copy(update={"expect": ""})
        adapters[adapter.name] = _ask(engine, anything, failures, adapter.name)
    advanced = _advanced(engine, before, [*answers, *adapters.values()], failures)
    return SmokeReport(
        gpus=tuple(gpus),
        driver=gpus[0].driver if gpus else "",
        health=health,
        model_id=model_id,
        model_root=root,
        answers=tuple(answers),
        tokens_advanced=advanced,
        failures=tuple(failures),
        adapters=adapters,
        asked_again=len(engine.cuts),
    )


@dataclass(frozen=True)
class _Engine:
    client: Client
    pod: str
    model: ModelSpec
    cuts: list[str] = field(default_factory=list)

    def text(self, path: str) -> str:
        return pod_http.get_text(self.client, self.pod, PORT, path, timeout_s=QUICK_S)

    def json(self, path: str) -> Any:
        return pod_http.get_json(self.client, self.pod, PORT, path, timeout_s=QUICK_S)

    def post(self, path: str, body: Any) -> Any:
        # A cut is none of the engine's, and at temperature 0 it says the same again.
        for last in (False, True):
            try:
                return pod_http.post_json(
                    self.client, self.pod, PORT, path, body, timeout_s=ANSWER_S
                )
            except PodUnreachable as error:
                if last or not error.cut:
                    raise
                self.cuts.append(str(error))
        raise AssertionError("the second try returns or raises")


def _gpus(client: Client, release: Release, pod: str, failures: list[str]) -> list[Gpu]:
    """What nvidia-smi said in the Pod's init container, before the engine started."""
    lines = logs.tail(client, pod, GPU_CHECK, 64)
    try:
        gpus = parse_nvidia_smi("\n".join(lines))
    except ValueError as error:
        failures.append(f"Pod {pod}: {error}")
        return []
    failures += check_gpus(gpus, release)
    return gpus


def check_gpus(gpus: list[Gpu], release: Release) -> list[str]:
    """What is wrong with the GPUs of a Pod of `release`: a sentence each."""
    wanted = release.model.gpus
    product = release.cluster.pool(release.model).gpu_product
    failures = []
    if len(gpus) != wanted.count:
        failures.append(f"the Pod sees {len(gpus)} GPUs, {wanted.count} were asked for")
    for gpu in gpus:
        total, used = gpu.memory_total_mib, gpu.memory_used_mib
        # Labels and nvidia-smi spell alike only in part: nvidia-a100-80gb, NVIDIA A100-SXM4-80GB.
        if not _words(product) - {"shared"} <= _words(gpu.product):
            failures.append(
                f"GPU {gpu.index} is a {gpu.product}, the node pool should have {product}"
            )
        if total and used and used > USED_BEFORE_START * total:
            failures.append(
                f"GPU {gpu.index} ({gpu.uuid}) holds {used} MiB of {total} MiB before start: "
                "another process has it. Look for it on the node with nvidia-smi"
            )
        if wanted.min_memory_mib and total is None:
            failures.append(
                f"GPU {gpu.index}: the driver doesn't say its memory, so gpus.min_memory_mib can't "
                "be checked. Take it out of the catalog for such GPUs"
            )
        if total and wanted.min_memory_mib and total < wanted.min_memory_mib:
            failures.append(
                f"GPU {gpu.index} has {total} MiB, gpus.min_memory_mib is {wanted.min_memory_mib}"
            )
    return failures


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _health(engine: _Engine, failures: list[str]) -> int:
    try:
        engine.text("/health")
    except HttpStatus as error:
        failures.append(f"/health answers {error.code}: {error.body[:200]}")
        return error.code
    except PodUnreachable as error:
        failures.append(f"/health doesn't answer: {error}")
        return 0
    return 200


def _names(engine: _Engine, release: Release, failures: list[str]) -> tuple[str, str]:
    """The engine serves this commit under this name, and not what it found elsewhere; so each
    adapter.
    """
    try:
        entries = engine.json("/v1/models")["data"]
        served, root = str(entries[0]["id"]), str(entries[0]["root"])
        others = {str(entry["id"]): str(entry["root"]) for entry in entries[1:]}
    except (HttpStatus, PodUnreachable) as error:
        failures.append(f"/v1/models: {error}")
        return "", ""
    except (LookupError, TypeError, ValueError):
        failures.append("/v1/models has no first model with id and root")
        return "", ""
    if served != release.model.served_name:
        failures.append(
            f"/v1/models says the model is {served!r}, served_name is {release.model.served_name!r}"
        )
    if root.rstrip("/") != release.weights_path:
        failures.append(f"/v1/models says the weights are {root!r}, not {release.weights_path!r}")
    for adapter in release.adapters:
        found = others.get(adapter.name, "").rstrip("/")
        if found != adapter.path:
            says = f"says it is {found!r}" if found else "doesn't have it"
            failures.append(f"adapter {adapter.name} is {adapter.path!r}, /v1/models {says}")
    return served, root


def _tokens(engine: _Engine, failures: list[str]) -> tuple[float, float] | None:
    """Prompt and generated tokens so far; None if /metrics doesn't say."""
    try:
        text = engine.text("/metrics")
    except (HttpStatus, PodUnreachable) as error:
        failures.append(f"/metrics: {error}")
        return None
    counters = [prometheus.samples(text, name) for name in (PROMPT_TOKENS, GENERATED_TOKENS)]
    if not all(counters):
        failures.append(f"/metrics has no {PROMPT_TOKENS} or {GENERATED_TOKENS}: is it a vLLM?")
        return None
    return sum(counters[0]), sum(counters[1])


def _ask(engine: _Engine, known: KnownAnswer, failures: list[str], adapter: str = "") -> Answer:
    what = f"adapter {adapter}, prompt" if adapter else "prompt"
    try:
        text, usage = _complete(engine, known, adapter or engine.model.served_name)
    except (HttpStatus, PodUnreachable) as error:
        body = f": {error.body[:200]}" if isinstance(error, HttpStatus) else ""
        failures.append(f"{what} {known.prompt!r}: {error}{body}")
        return Answer(known.prompt, known.expect, None, 0, 0, False)
    except (LookupError, TypeError, AttributeError, ValueError):
        failures.append(f"{what} {known.prompt!r}: the answer is no completion")
        return Answer(known.prompt, known.expect, None, 0, 0, False)
    prompt_tokens = int(usage.get("prompt_tokens") or 0)
    tokens = int(usage.get("completion_tokens") or 0)
    ok = text is not None and text != "" and known.expect.casefold() in text.casefold()
    if not text:
        failures.append(
            f"{what} {known.prompt!r}: {tokens} tokens and no text (thinking used them up?). "
            f"Raise max_tokens of this prompt (now {known.max_tokens})"
        )
    elif not ok:
        failures.append(f"{what} {known.prompt!r}: expected {known.expect!r}, given {text!r}")
    return Answer(known.prompt, known.expect, text, prompt_tokens, tokens, ok)


def _complete(engine: _Engine, known: KnownAnswer, name: str) -> tuple[str | None, dict[str, Any]]:
    """Text and usage. Sampling is sent, for else generation_config.json decides on it."""
    body: dict[str, Any] = {
        "model": name,
        "temperature": 0,
        "top_p": 1,
        "max_tokens": known.max_tokens,
    }
    if not engine.model.chat:
        answer = engine.post("/v1/completions", body | {"prompt": known.prompt})
        return answer["choices"][0].get("text"), answer.get("usage") or {}
    body["messages"] = [{"role": "user", "content": known.prompt}]
    try:
        # Templates that know no thinking ignore it.
        answer = engine.post(
            "/v1/chat/completions", body | {"chat_template_kwargs": {"enable_thinking": False}}
        )
    except HttpStatus as error:
        if error.code != 400:  # a tokenizer without a Jinja template may refuse the field
            raise
        answer = engine.post("/v1/chat/completions", body)
    return answer["choices"][0]["message"].get("content"), answer.get("usage") or {}


def _advanced(
    engine: _Engine,
    before: tuple[float, float] | None,
    answers: list[Answer],
    failures: list[str],
) -> int:
    """Tokens by which the counters advanced: at least those that the answers say.

    Without usage in the answers, too: there is no text without a token. An answer that was cut
    off and asked for again counts in the engine, but not among the answers.
    """
    answered = [answer for answer in answers if answer.text or answer.tokens]
    if before is None or not answered:
        return 0
    wanted = (
        max(1, sum(answer.prompt_tokens for answer in answers)),
        max(1, sum(answer.tokens for answer in answers)),
    )
    deadline = time.monotonic() + COUNTERS_S
    while True:
        after = _tokens(engine, failures)
        if after is None:
            return 0
        moved = (after[0] - before[0], after[1] - before[1])
        if moved[0] >= wanted[0] and moved[1] >= wanted[1]:
            return int(moved[0] + moved[1])
        if time.monotonic() > deadline:
            failures.append(
                f"/metrics: the counters advanced by {moved[0]:g} prompt and {moved[1]:g} "
                f"generated tokens, the answers used {wanted[0]} and {wanted[1]} "
                "or more: who answered?"
            )
            return int(moved[0] + moved[1])
        time.sleep(0.5)
