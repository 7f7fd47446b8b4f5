"""What the reference server answers: for each request its parts, and when each is due. Pure.

A part is bytes that are written at once, at a time counted from the request's arrival. It may
complete tokens; that moment, in the server's log, is the truth that the tools are scored by.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

MODEL = "reference"
PROMPT_TOKENS = 64
TOKENS = 32
TTFT_MS, ITL_MS = 200.0, 20.0
HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: reference-server\r\n"
    b"Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_REFUSAL = b'{"error":{"message":"Too many requests","type":"RateLimitError","code":429}}'
REFUSED = (
    b"HTTP/1.1 429 Too Many Requests\r\nServer: reference-server\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_REFUSAL), _REFUSAL)
)

Fault = Literal["error_event", "truncation", "429"]
FAULT_EVERY = 10  # of requests, one goes wrong in the scenarios with a fault


@dataclass(frozen=True)
class Part:
    """`data`, written `at` ns after the request came, completes `tokens` tokens. `close`: the
    connection is closed after it."""

    at: int
    data: bytes
    tokens: int = 0
    close: bool = False


@dataclass(frozen=True)
class Script:
    """The answer to one request. `fault`: it is one that a tool has to count as failed."""

    parts: tuple[Part, ...]
    fault: str = ""


@dataclass(frozen=True)
class Queue:
    """One server with exponential service times, and room for `room` requests, the served one
    included; who finds none gets 429 (M/M/1/K). The first token ends the service."""

    service_ms: float = 20.0
    room: int = 40


@dataclass(frozen=True)
class Scenario:
    """`chat`: the endpoint that the tools are told to load. `first`: what precedes the content.
    `stall`: the server stops once, so long, in mid-run."""

    name: str
    chat: bool = False
    heavy_tail: bool = False
    tokens_a_chunk: int = 1
    first: Literal["", "role", "reasoning"] = ""
    split: bool = False
    stall_s: float = 0.0
    fault: Fault | None = None
    queue: Queue | None = None


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("fixed"),
        Scenario("heavy_tail", heavy_tail=True),
        Scenario("role_first", chat=True, first="role"),
        Scenario("reasoning_first", chat=True, first="reasoning"),
        Scenario("several_tokens", tokens_a_chunk=4),
        Scenario("split", split=True),
        Scenario("stall", stall_s=2.0),
        Scenario("error_event", fault="error_event"),
        Scenario("truncation", fault="truncation"),
        Scenario("429", fault="429"),
        Scenario("queue", queue=Queue()),
        # Room enough that nobody is refused below its λ*, and far beyond.
        Scenario("knee", queue=Queue(service_ms=2.0, room=400)),
    )
}


def script(scenario: Scenario, number: int, chat: bool, running_usage: bool) -> Script:
    """The answer to request `number`, the same in every run."""
    failing = scenario.fault is not None and number % FAULT_EVERY == FAULT_EVERY - 1
    if failing and scenario.fault == "429":
        return Script((Part(0, REFUSED),), "429")
    if scenario.heavy_tail:
        # Lognormal with the fixed scenario's medians; 1 % of the first tokens take above 6 times.
        rng = random.Random(f"{scenario.name} {number}")
        first = TTFT_MS * rng.lognormvariate(0.0, 0.8)
        gaps = [ITL_MS * rng.lognormvariate(0.0, 0.6) for _ in range(TOKENS - 1)]
        return _stream(scenario, chat, running_usage, first, tuple(gaps), failing)
    return _even(scenario, chat, running_usage, failing)


@cache
def _even(scenario: Scenario, chat: bool, running_usage: bool, failing: bool) -> Script:
    chunks = TOKENS // scenario.tokens_a_chunk
    first = 0.0 if scenario.queue else TTFT_MS
    gaps = (ITL_MS * scenario.tokens_a_chunk,) * (chunks - 1)
    return _stream(scenario, chat, running_usage, first, gaps, failing)


def _stream(
    scenario: Scenario,
    chat: bool,
    running_usage: bool,
    first_ms: float,
    gaps_ms: Sequence[float],
    failing: bool,
) -> Script:
    parts = [Part(0, HEAD)]
    if chat:
        # As early as can be where the role is the point, else as vLLM does: with the first token.
        at = first_ms / 2 if scenario.first == "role" else first_ms
        parts.append(Part(_ns(at), _event({"role": "assistant", "content": ""}, chat, 0, None)))
    due, done = first_ms, 0

    def frame(delta: dict[str, Any], tokens: int) -> bytes:
        return _event(delta, chat, tokens if running_usage else None, _finish(tokens))

    for chunk, gap in enumerate([0.0, *gaps_ms]):
        due += gap
        if failing and chunk == len(gaps_ms) // 2:
            parts.append(_failure(scenario, _ns(due)))
            return Script(tuple(parts), scenario.fault or "")
        done += scenario.tokens_a_chunk
        word = " é€" if scenario.split else " word"
        text = word * scenario.tokens_a_chunk
        reasoning = chat and scenario.first == "reasoning" and chunk < len(gaps_ms) // 4
        data = frame({"reasoning" if reasoning else "content": text}, done)
        if scenario.split:
            # In the chunk's size, in the middle of a character, and before the line ends.
            inside = data.index("€".encode()) + 1
            cuts = [0, 1, inside, len(data) - 4]
            for number, cut in enumerate(cuts):
                end = cuts[number + 1] if number + 1 < len(cuts) else len(data)
                last = end == len(data)
                # Apart in time, or they would leave as one packet.
                parts.append(Part(_ns(due + number), data[cut:end], int(last)))
        else:
            parts.append(Part(_ns(due), data, scenario.tokens_a_chunk))
    tail = _chunk(_data({**_top(chat), "choices": [], "usage": _usage(done)}))
    tail += _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    parts.append(Part(parts[-1].at, tail))
    return Script(tuple(parts))


def _failure(scenario: Scenario, at: int) -> Part:
    if scenario.fault == "truncation":
        return Part(at, b"", close=True)
    error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
    return Part(at, _chunk(_data(error)) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _top(chat: bool) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "cmpl-reference", "object": kind, "created": 1, "model": MODEL}


def _event(delta: dict[str, Any], chat: bool, tokens: int | None, finish: str | None) -> bytes:
    choice: dict[str, Any] = {"index": 0}
    choice |= {"delta": delta} if chat else {"text": delta["content"]}
    event = {**_top(chat), "choices": [{**choice, "logprobs": None, "finish_reason": finish}]}
    if tokens is not None:
        event["usage"] = _usage(tokens)
    return _chunk(_data(event))


def _finish(tokens: int) -> str | None:
    return "length" if tokens == TOKENS else None


def _usage(tokens: int) -> dict[str, int]:
    total = PROMPT_TOKENS + tokens
    return {"prompt_tokens": PROMPT_TOKENS, "total_tokens": total, "completion_tokens": tokens}


def _data(event: dict[str, Any]) -> bytes:
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _ns(ms: float) -> int:
    return round(ms * 1e6)


def attainment(queue: Queue, rate: float, ttft_ms: float) -> float:
    """The share of requests, at `rate` a second by Poisson, that get their first token within
    `ttft_ms`; a refused one doesn't.

    M/M/1/K: an arrival finds n requests with p(n) ~ (rate/mu)^n, n = 0…K (PASTA); with n < K its
    sojourn is the sum of n + 1 exponential service times, so Erlang (Kleinrock 1975, 3.6).
    """
    mu = 1e3 / queue.service_ms
    load, x = rate / mu, mu * ttft_ms / 1e3
    weights = [load**n for n in range(queue.room + 1)]
    # Erlang's distribution function: P(Poisson(x) > n).
    term, below, met = math.exp(-x), 0.0, 0.0
    for n in range(queue.room):
        below += term
        met += weights[n] * (1.0 - below)
        term *= x / (n + 1)
    return met / sum(weights)


def knee(queue: Queue, ttft_ms: float, share: float = 0.95) -> float:
    """λ*, requests/s: the highest rate at which `share` of them meets `ttft_ms`; by bisection."""
    low, high = 0.0, 10e3 / queue.service_ms
    for _ in range(60):
        middle = (low + high) / 2
        if attainment(queue, middle, ttft_ms) >= share:
            low = middle
        else:
            high = middle
    return low
