"""What a streamed answer was: when its tokens came, and what went wrong. Read after the run."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from loadtests.response import BadResponse, Response

Phase = Literal["warmup", "measure"]
# The engine gave up on an answer whose stream is otherwise whole.
GIVEN_UP = {"abort", "error"}
MOST_TOKENS = 1_000_000  # of one answer; a `usage` beyond is no count
# The fields of a row that are points in time.
_TIMES = (
    *("scheduled", "sent", "connected", "first_byte", "first_role"),
    *("first_reasoning", "first_content", "last_token", "end"),
)


@dataclass
class Exchange:
    """One request as the generator saw it. Times in ns of time.perf_counter_ns."""

    number: int
    scheduled: int
    phase: Phase
    model: str = ""
    tokens_asked: int = 0
    turn: int = 1
    sent: int | None = None
    connected: int | None = None
    end: int | None = None
    reused: bool = False
    response: Response = field(default_factory=Response)
    failure: str | None = None  # connect, timeout, reset or bad_http
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """The raw row of one request. Times in ns of the generator's monotonic clock.

    `error` is the kind of miss, None for a good answer: connect, timeout, reset, bad_http,
    http_<status>, not_streamed, error_event, closed_early (the body was cut off), no_done,
    bad_json, wrong_model, given_up (finish_reason abort or error), empty (no text at all).
    `first_byte` is that of the response, its head included.
    `first_content` is the first non-empty content or tool call. `chunks`: those with tokens;
    `chunk_ns` are their times after `scheduled`, `chunk_tokens` the tokens that each brought.
    `usage`: the engine said how many tokens it made; without it each chunk counts as one.
    `model`: the name that was asked, `tokens_asked` of it. `turn` of its conversation, from 1.
    `worker`: who sent it, of several, from 0.
    """

    rate: float
    repeat: int
    number: int
    phase: Phase
    scheduled: int
    sent: int | None
    connected: int | None
    first_byte: int | None
    first_role: int | None
    first_reasoning: int | None
    first_content: int | None
    last_token: int | None
    end: int | None
    status: int | None
    error: str | None
    detail: str
    tokens_in: int | None
    tokens_out: int | None
    chunks: int
    reused: bool
    usage: bool
    chunk_ns: tuple[int, ...]
    chunk_tokens: tuple[float, ...]
    model: str = ""
    tokens_asked: int = 0
    turn: int = 1
    worker: int = 0

    @property
    def ttft_ms(self) -> float:
        """Scheduled time → first content, reasoning or tool call; infinite for a failed one."""
        firsts = [t for t in (self.first_reasoning, self.first_content) if t is not None]
        if self.error or not firsts:
            return float("inf")
        return (min(firsts) - self.scheduled) / 1e6

    @property
    def e2e_ms(self) -> float:
        """Scheduled time → last token; infinite for a failed one."""
        if self.error or self.last_token is None:
            return float("inf")
        return (self.last_token - self.scheduled) / 1e6

    @property
    def chunk_gaps_ms(self) -> list[float]:
        """Between chunks that carry tokens."""
        times = self.chunk_ns
        return [(b - a) / 1e6 for a, b in pairwise(times)]

    @property
    def token_gaps_ms(self) -> list[float]:
        """Between tokens: the gap before a chunk is shared by the tokens that it brings."""
        gaps = []
        for gap, tokens in zip(self.chunk_gaps_ms, self.chunk_tokens[1:], strict=True):
            count = max(1, round(tokens))
            gaps += [gap / count] * count
        return gaps

    def as_json(self) -> dict[str, Any]:
        """The row for rows.jsonl.gz."""
        return {"row": "request", **asdict(self)}

    @staticmethod
    def from_json(fields: dict[str, Any], worker: int = 0, later_ns: int = 0) -> "Row":
        """What as_json wrote, as sent by `worker`, whose clock shows `later_ns` less than ours."""
        fields = {**fields, "worker": worker}
        del fields["row"]
        for name in _TIMES:
            if fields[name] is not None:
                fields[name] += later_ns
        for name in ("chunk_ns", "chunk_tokens"):
            fields[name] = tuple(fields[name])
        return Row(**fields)


def read_answer(exchange: Exchange, rate: float, repeat: int) -> Row:
    """The row of an exchange, whatever the server sent. Never raises."""
    response = exchange.response
    stream = _Stream(exchange.model)
    pieces: list[tuple[int, bytes]] = []
    try:
        pieces = response.pieces
    except BadResponse as bad:
        if exchange.failure is None:
            exchange.failure, exchange.detail = "bad_http", str(bad)
    if response.status == 200 and _is_stream(response):
        for time_ns, line in _lines(pieces):
            stream.take(time_ns, line)
    error, detail = _judge(exchange, stream, pieces)
    tokens = stream.tokens_by_chunk()
    return Row(
        rate=rate,
        repeat=repeat,
        number=exchange.number,
        phase=exchange.phase,
        scheduled=exchange.scheduled,
        sent=exchange.sent,
        connected=exchange.connected,
        first_byte=response.first_byte,
        first_role=stream.first_role,
        first_reasoning=stream.first_reasoning,
        first_content=stream.first_content,
        last_token=stream.chunks[-1][0] if stream.chunks else None,
        end=exchange.end,
        status=response.status,
        error=error,
        detail=detail[:200],
        tokens_in=stream.tokens_in,
        tokens_out=stream.tokens_out if stream.tokens_out is not None else len(tokens),
        chunks=len(stream.chunks),
        reused=exchange.reused,
        usage=stream.tokens_out is not None,
        chunk_ns=tuple(time_ns - exchange.scheduled for time_ns, _ in stream.chunks),
        chunk_tokens=tokens,
        model=exchange.model,
        tokens_asked=exchange.tokens_asked,
        turn=exchange.turn,
    )


def _is_stream(response: Response) -> bool:
    return response.headers.get("content-type", "").lower().startswith("text/event-stream")


def _judge(
    exchange: Exchange, stream: "_Stream", pieces: list[tuple[int, bytes]]
) -> tuple[str | None, str]:
    """The kind of miss and its detail; the cause that lies nearest to the wire wins."""
    response = exchange.response
    body = b"".join(piece for _, piece in pieces)[:200].decode("utf-8", "replace")
    if exchange.failure:
        return exchange.failure, exchange.detail
    if response.status is None:
        return "closed_early", "the connection ended before a response"
    if response.status != 200:
        return f"http_{response.status}", body
    if not _is_stream(response):
        return "not_streamed", f"content-type {response.headers.get('content-type')}: {body}"
    if stream.error:
        return "error_event", stream.error
    if not response.done and not stream.done:
        return "closed_early", "the connection ended within the answer"
    if not stream.done:
        return "no_done", "the stream ended without [DONE]"
    if stream.bad_json:
        return "bad_json", stream.bad_json
    if stream.other_model:
        return "wrong_model", f"{stream.other_model} answered"
    if stream.finish_reason in GIVEN_UP:
        return "given_up", f"finish_reason {stream.finish_reason}"
    if stream.first_content is None and stream.first_reasoning is None:
        return "empty", f"no text in {stream.tokens_out or 0} tokens"
    return None, ""


def _lines(pieces: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Lines of the body, each with the time at which its end came, however it was split."""
    rest = b""
    for time_ns, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield time_ns, line.rstrip(b"\r")
    if rest:  # cut off in mid-line: the last event may still be whole
        yield pieces[-1][0], rest.rstrip(b"\r")


def _tokens(count: Any, before: int | None) -> int | None:
    """A count as `usage` has it, or the one before where it is none."""
    return count if isinstance(count, int) and 0 <= count <= MOST_TOKENS else before


class _Stream:
    """Server-sent events of vLLM's two streaming endpoints."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.first_role: int | None = None
        self.first_reasoning: int | None = None
        self.first_content: int | None = None
        self.chunks: list[tuple[int, int | None]] = []  # time, tokens so far by `usage`
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.error = ""
        self.bad_json = ""
        self.other_model = ""

    def take(self, time_ns: int, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return  # a comment (keep-alive), a blank line, another field
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data.decode("utf-8", "replace"))
            self._event(time_ns, event)
        except (ValueError, RecursionError, AttributeError, TypeError):
            # No JSON, or none of the shape that the API has: whatever it is, it is no answer.
            self.bad_json = self.bad_json or data[:100].decode("utf-8", "replace")

    def _event(self, time_ns: int, event: dict[str, Any]) -> None:
        if event.get("error") or event.get("object") == "error":
            self.error = self.error or json.dumps(event.get("error") or event)
            return
        answered = event.get("model")
        if answered and answered != self.model:
            self.other_model = str(answered)
        before = self.tokens_out or 0
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.tokens_in = _tokens(usage.get("prompt_tokens"), self.tokens_in)
            self.tokens_out = _tokens(usage.get("completion_tokens"), self.tokens_out)
        choices = event.get("choices") or []
        text = False
        for choice in choices:
            text = self._choice(time_ns, choice) or text
        # A token may come without text (half of a character), but then usage counts it. The last
        # event has usage and no choices: it brings no token.
        if text or (choices and (self.tokens_out or 0) > before):
            self.chunks.append((time_ns, self.tokens_out))

    def _choice(self, time_ns: int, choice: dict[str, Any]) -> bool:
        self.finish_reason = str(choice.get("finish_reason") or "") or self.finish_reason
        delta = choice.get("delta") or {}
        if "role" in delta and self.first_role is None:
            self.first_role = time_ns
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        content = choice.get("text") or delta.get("content") or delta.get("tool_calls")
        if reasoning and self.first_reasoning is None:
            self.first_reasoning = time_ns
        if content and self.first_content is None:
            self.first_content = time_ns
        return bool(reasoning or content)

    def tokens_by_chunk(self) -> tuple[float, ...]:
        """Tokens of each chunk: by running usage, else the total shared evenly, else one each."""
        counts = [count for _, count in self.chunks]
        known = [count for count in counts if count is not None]
        if counts and len(known) == len(counts) and known == sorted(known):
            return tuple(float(b - a) for a, b in pairwise([0, *known]))
        each = self.tokens_out / len(counts) if counts and self.tokens_out else 1.0
        return tuple(each for _ in counts)
