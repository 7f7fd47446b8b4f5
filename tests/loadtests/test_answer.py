"""Each kind of stream is counted as what it is."""

import json
import random
from typing import Any

import pytest

from loadtests.answer import Exchange, Row, read_answer
from loadtests.response import BadResponse
from tests.loadtests.servers import chunked

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
HEAD += b"Transfer-Encoding: chunked\r\n\r\n"
MS = 1_000_000


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"model": "m", **fields}).encode() + b"\n\n"


def delta(tokens: int | None = None, finish: str | None = None, **fields: Any) -> bytes:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return event(choices=[choice], **usage)


def text(text: str, tokens: int | None = None, finish: str | None = None) -> bytes:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}], **usage)


DONE = b"data: [DONE]\n\n"
USAGE_2 = event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 2})


def read(*events: bytes, end: bool = True, head: bytes = HEAD) -> Row:
    """The row of a stream whose events came at 10, 20, … ms after the scheduled time 0."""
    exchange = Exchange(0, 0, "measure", "m", sent=0, connected=0)
    exchange.response.feed(5 * MS, head)
    for number, data in enumerate(events, 1):
        exchange.response.feed(number * 10 * MS, chunked(data))
    if end:
        exchange.response.feed(10_000 * MS, b"0\r\n\r\n")
    exchange.end = 10_000 * MS
    return read_answer(exchange, 4.0, 0)


def test_completions_stream() -> None:
    row = read(text("a", 1), text(" b", 2, "length"), USAGE_2, DONE)
    assert row.error is None
    assert row.ttft_ms == 10
    assert row.e2e_ms == 20
    assert row.token_gaps_ms == [10]
    assert (row.tokens_in, row.tokens_out, row.chunks, row.usage) == (9, 2, 2, True)


def test_role_first_is_no_token() -> None:
    row = read(delta(0, role="assistant", content=""), delta(1, content="a"), DONE)
    assert row.first_role == 10 * MS
    assert row.first_byte == 5 * MS  # with the head
    assert row.ttft_ms == 20
    assert row.chunks == 1


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_counts_for_ttft(name: str) -> None:
    row = read(
        delta(0, role="assistant", content=""),
        delta(1, **{name: "hm"}),
        delta(2, content="a"),
        DONE,
    )
    assert row.error is None
    assert row.ttft_ms == 20
    assert (row.first_reasoning, row.first_content) == (20 * MS, 30 * MS)


def test_only_reasoning_is_an_answer() -> None:
    row = read(delta(1, reasoning="hm", content=None), delta(2, "length", reasoning="hm"), DONE)
    assert row.error is None
    assert row.first_content is None


def test_tool_call_counts_for_ttft() -> None:
    row = read(delta(1, tool_calls=[{"index": 0, "function": {"name": "f"}}]), DONE)
    assert (row.error, row.ttft_ms) == (None, 10)


def test_null_content_is_empty() -> None:
    row = read(delta(1, content=None), delta(50, "length", content=None, reasoning=None), DONE)
    assert (row.error, row.ttft_ms) == ("empty", float("inf"))
    assert "50 tokens" in row.detail


def test_token_without_text_is_a_token_but_not_the_first_text() -> None:
    row = read(text("", 1), text("é", 2), text("!", 3, "length"), DONE)
    assert row.error is None
    assert row.ttft_ms == 20
    assert row.chunks == 3


def test_several_tokens_a_chunk_share_its_gap() -> None:
    row = read(text("a b", 2), text(" c d e f", 6), text(" g", 7, "length"), DONE)
    assert row.chunk_gaps_ms == [10, 10]
    assert row.token_gaps_ms == [2.5, 2.5, 2.5, 2.5, 10]
    assert row.chunk_tokens == (2, 4, 1)


def test_without_usage_each_chunk_is_one_token() -> None:
    row = read(text("a"), text(" b"), text(" c", finish="length"), DONE)
    assert (row.error, row.usage, row.tokens_out) == (None, False, 3)
    assert row.token_gaps_ms == [10, 10]


def test_usage_at_the_end_is_shared_evenly() -> None:
    row = read(text("a b"), text(" c d"), event(choices=[], usage={"completion_tokens": 4}), DONE)
    assert row.chunk_tokens == (2, 2)
    assert row.token_gaps_ms == [5, 5]


def test_error_event_after_tokens_is_a_miss() -> None:
    row = read(text("a", 1), event(error={"message": "EngineCore died"}), DONE)
    assert (row.error, row.ttft_ms) == ("error_event", float("inf"))
    assert "EngineCore died" in row.detail
    assert row.first_content == 10 * MS  # kept in the raw row


def test_only_done_is_empty() -> None:
    assert read(DONE).error == "empty"


def test_end_without_done() -> None:
    assert read(text("a", 1), text("b", 2, "length")).error == "no_done"


def test_cut_off_in_the_stream() -> None:
    assert read(text("a", 1), end=False).error == "closed_early"


def test_cut_off_before_a_response() -> None:
    assert read_answer(Exchange(0, 0, "measure", "m"), 1.0, 0).error == "closed_early"


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_engine_gave_up(reason: str) -> None:
    assert read(text("a", 1, reason), DONE).error == "given_up"


def test_other_model_answered() -> None:
    row = read(event(model="x", choices=[{"text": "a"}]), DONE)
    assert (row.error, row.detail) == ("wrong_model", "x answered")


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_other_status(status: int) -> None:
    head = b"HTTP/1.1 %d Oops\r\nTransfer-Encoding: chunked\r\n\r\n" % status
    row = read(b'{"error": "busy"}', head=head)
    assert (row.error, row.status) == (f"http_{status}", status)
    assert "busy" in row.detail


def test_whole_answer_where_a_stream_was_asked() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    assert read(head=head).error == "not_streamed"


def test_bad_json_is_a_miss() -> None:
    assert read(text("a", 1), b"data: {broken\n\n", DONE).error == "bad_json"


def test_invalid_utf8_is_no_crash() -> None:
    row = read(text("a", 1), b'data: {"model":"m","choices":[{"text":"\xff\xfe"}]}\n\n', DONE)
    assert row.error is None


@pytest.mark.parametrize(
    "data",
    [
        b"[1, 2]",
        b"null",
        b'"text"',
        b'{"model": "m", "choices": "none"}',
        b'{"model": "m", "choices": 7}',
        b'{"model": "m", "choices": [null]}',
        b'{"model": "m", "choices": [{"delta": "a"}]}',
        b'{"model": "m", "choices": [{"delta": ["a"]}]}',
        b"[" * 100_000,
    ],
)
def test_json_of_another_shape_is_a_miss(data: bytes) -> None:
    row = read(text("a", 1), b"data: " + data + b"\n\n", DONE)
    assert (row.error, row.ttft_ms) == ("bad_json", float("inf"))


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "none",
        [3],
        {},
        {"completion_tokens": "2", "prompt_tokens": None},
        {"completion_tokens": -2},
        {"completion_tokens": 1e99},
        {"completion_tokens": 10**40},
    ],
)
def test_usage_that_is_none_counts_chunks(usage: Any) -> None:
    chunk = {"index": 0, "text": "a", "finish_reason": None}
    row = read(event(choices=[chunk], usage=usage), event(choices=[chunk], usage=usage), DONE)
    assert (row.error, row.usage, row.tokens_in, row.tokens_out) == (None, False, None, 2)


def test_error_as_older_engines_write_it() -> None:
    row = read(text("a", 1), event(object="error", message="too long", code=400), DONE)
    assert row.error == "error_event"
    assert "too long" in row.detail


def test_a_finish_reason_of_another_shape() -> None:
    choice = {"index": 0, "text": "a", "finish_reason": ["stop"]}
    assert read(event(choices=[choice]), DONE).error is None


def test_a_stream_is_one_however_its_type_is_spelt() -> None:
    head = HEAD.replace(b"text/event-stream", b"Text/Event-Stream")
    assert read(text("a", 1), DONE, head=head).error is None


KINDS = {
    *(None, "bad_http", "bad_json", "closed_early", "empty", "error_event", "given_up"),
    *("no_done", "not_streamed", "wrong_model"),
}
SAMPLE = HEAD + b"".join(
    map(
        chunked,
        (
            b": ping\n\n",
            delta(0, role="assistant", content=""),
            delta(1, reasoning="hm"),
            delta(3, content="é b"),
            text(" c", 4, "length"),
            USAGE_2,
            DONE,
        ),
    )
)


def broken(rng: random.Random) -> bytes:
    """A stream with some bytes changed, lost or doubled."""
    data = bytearray(SAMPLE + b"0\r\n\r\n")
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(len(data))
        change = rng.randrange(4)
        if change == 0:
            data[at] = rng.randrange(256)
        elif change == 1:
            del data[at : at + rng.randint(1, 40)]
        elif change == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        else:
            data[at:at] = rng.choice([b"\r", b"\n", b"\xb2", b"-1", b"[", b'"', b"9" * 5000])
    return bytes(data)


def test_no_bytes_crash_it_and_each_answer_has_a_kind() -> None:
    seen = set()
    for seed in range(5000):
        rng = random.Random(seed)
        data, at = broken(rng), 0
        exchange = Exchange(0, 0, "measure", "m", sent=0, connected=0)
        try:
            while at < len(data):
                size = rng.choice([1, 3, 50, 4000])
                if exchange.response.feed(at, data[at : at + size]):
                    break
                at += size
        except BadResponse as error:
            exchange.failure, exchange.detail = "bad_http", str(error)
        exchange.end = len(data)
        row = read_answer(exchange, 4.0, 0)
        kind = row.error
        assert kind in KINDS or str(kind).startswith("http_"), (seed, kind)
        assert (kind is None) == (row.ttft_ms < float("inf")), seed
        assert len(row.token_gaps_ms) >= 0
        seen.add(kind)
    assert {"bad_http", "bad_json", "closed_early", "no_done", "wrong_model"} <= seen


def test_a_transport_failure_wins() -> None:
    exchange = Exchange(0, 0, "measure", "m", failure="timeout", detail="no end within 1 s")
    exchange.response.feed(1, HEAD + chunked(text("a", 1)))
    row = read_answer(exchange, 1.0, 0)
    assert (row.error, row.detail) == ("timeout", "no end within 1 s")


@pytest.mark.parametrize("size", [1, 2, 3, 11])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_frames_and_utf8_split_anywhere(size: int, newline: bytes) -> None:
    choice = {"text": "héllo 😀", "finish_reason": "length"}
    data = json.dumps({"model": "m", "choices": [choice]}, ensure_ascii=False).encode()
    stream = (
        b": keep-alive\n\nevent: message\nid: 7\nretry: 10\ndata:" + data + b"\n\n: ping\n\n" + DONE
    ).replace(b"\n", newline)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    row = read(*pieces)
    assert row.error is None
    assert row.chunks == 1
    # It is there when its line ends, no sooner.
    ends = stream.index(newline, stream.index(data)) + len(newline)
    assert row.first_content == -(-ends // size) * 10 * MS
