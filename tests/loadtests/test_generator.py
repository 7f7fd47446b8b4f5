"""The generator against a server that sends anything: each answer is counted as what it is."""

import json
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.answer import Exchange
from loadtests.engine import Engine, LoadTestError
from loadtests.generator import Generator
from loadtests.verdict import Window, untrusted
from tests.loadtests.samples import make_profile
from tests.loadtests.servers import FAST, Script, Stub, chunked, simulator

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def event(text: str, finish: str | None = None, **delta: Any) -> bytes:
    choice = {"text": text, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"model": "m", "choices": [choice]}).encode() + b"\n\n"


GOOD = HEAD + chunked(event("a")) + chunked(event("b", "length")) + chunked(DONE) + END


@contextmanager
def stub(script: Script) -> Iterator[Stub]:
    server = Stub(script)
    try:
        yield server
    finally:
        server.close()


def load(server: Stub, rate: float = 60, **changes: Any) -> tuple[Window, list[Exchange]]:
    """One window of 52 requests, calibrated, without warm-up."""
    fields: dict[str, Any] = {"base_url": server.url, "warmup_seconds": 0, "step_seconds": 0.5}
    # A lag of 2 % of it ends a window early, and this machine may be busy.
    fields |= {"timeout_s": 60.0, "slo": {"ttft_p95_ms": 50_000}}
    profile = make_profile(**{**fields, **changes})
    ended: list[Exchange] = []
    generator = Generator(profile, Engine(server.url, 5.0), ended.append)
    generator.calibrate()
    return generator.window(rate, 0), ended


def test_good_answers() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        window, ended = load(server)
    assert len(window.rows) == len(ended) == server.posts == 52
    assert {row.error for row in window.rows} == {None}
    assert all(0 < row.ttft_ms < 50_000 for row in window.rows)
    for row in window.rows:
        assert row.sent is not None
        assert row.first_content is not None
        assert row.end is not None
        assert row.scheduled <= row.sent <= row.first_content <= row.end
    # One after the other, they can share connections.
    assert any(row.reused for row in window.rows)
    assert window.samples[0]["num_requests_running"] == 1


def test_what_is_sent() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        load(server)
    body = server.bodies[0]
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 4
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    prompts = [body["prompt"].split() for body in server.bodies]
    assert {len(words) for words in prompts} == {64}
    assert len({tuple(words[:3]) for words in prompts}) == len(prompts)


def test_chat_sends_messages() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        load(server, endpoint="chat")
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["user"]


def test_shared_beginnings_are_sent_as_such() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        load(server, shared_prefix={"tokens": 30, "count": 2})
    prompts = [body["prompt"].split() for body in server.bodies]
    assert {len(words) for words in prompts} == {94}
    assert len({tuple(words[:30]) for words in prompts}) == 2
    assert len({tuple(words[30:33]) for words in prompts}) == len(prompts)


def test_a_conversation_sends_its_history() -> None:
    talk = {"turns": 3, "think_s": 0.2}
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        window, _ = load(server, endpoint="chat", conversations=talk, warmup_seconds=0.2)
    sent = {json.dumps(body["messages"]) for body in server.bodies}
    later = [body["messages"] for body in server.bodies if len(body["messages"]) == 5]
    assert later
    for messages in later:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        lengths = [len(message["content"].split()) for message in messages]
        assert lengths == [64, 4, 64, 4, 64]
    # Most began with a turn that was sent; some were amidst one when the window began.
    assert any(json.dumps(messages[:3]) in sent for messages in later)
    assert {row.turn for row in window.rows} == {1, 2, 3}


def test_several_models_are_asked_by_weight_and_each_must_answer_itself() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        window, _ = load(server, models={"m": 3, "adapter": 1})
    asked = Counter(body["model"] for body in server.bodies)
    assert asked == {"m": 39, "adapter": 13}
    # The stub always answers as m.
    wrong = [row for row in window.rows if row.error == "wrong_model"]
    assert {row.model for row in wrong} == {"adapter"}
    assert len(wrong) == 13


def misbehave(connection: socket.socket, number: int) -> None:
    """One of nine behaviours in turn."""
    kind = number % 9
    if kind == 0:
        connection.sendall(GOOD)
    elif kind == 1:  # split anywhere, with comments and CRLF
        stream = b": keep-alive\r\n\r\n" + event("é", role="assistant") + event("b", "length")
        data = HEAD + b"".join(chunked(stream[i : i + 3]) for i in range(0, len(stream), 3))
        data += chunked(DONE) + END
        for at in range(0, len(data), 50):
            connection.sendall(data[at : at + 50])
    elif kind == 2:
        error = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
        connection.sendall(HEAD + chunked(event("a")) + chunked(error) + chunked(DONE) + END)
    elif kind == 3:
        connection.sendall(HEAD + chunked(DONE) + END)
    elif kind == 4:
        connection.sendall(HEAD + chunked(event("a")))
        connection.shutdown(socket.SHUT_RDWR)
    elif kind == 5:
        connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nRetry-After: 1\r\n\r\nbusy")
    elif kind == 6:
        connection.sendall(b"+OK this is POP3\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)
    elif kind == 7:  # a reset instead of an answer
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(connection.detach())
    else:
        body = b'{"choices": [{"text": "a"}]}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)


def test_each_miss_by_its_kind_and_none_is_sent_twice() -> None:
    with stub(misbehave) as server:
        window, ended = load(server)
        assert server.posts == 52
    assert len(window.rows) == len(ended) == 52
    kinds = Counter(row.error for row in window.rows)
    # 52 = 5 * 9 + 7: the first seven behaviours once more. A reset can be seen as an end.
    ended_by_reset = kinds.pop("reset", 0)
    kinds["closed_early"] += ended_by_reset
    assert kinds == {
        None: 12,
        "error_event": 6,
        "empty": 6,
        "closed_early": 6 + 5,
        "http_503": 6,
        "bad_http": 6,
        "not_streamed": 5,
    }


def stream(*events: bytes, newline: bytes = b"\n") -> bytes:
    """A whole response, an event a chunk."""
    data = b"".join(chunked(one.replace(b"\n", newline)) for one in (*events, DONE))
    return HEAD + data + END


def usage(tokens: int, text: str, finish: str | None = None) -> bytes:
    choice = {"text": text, "finish_reason": finish}
    counts = {"prompt_tokens": 64, "completion_tokens": tokens}
    fields = {"model": "m", "choices": [choice], "usage": counts}
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


PING = b": keep-alive\n\n"
ODD = b'data: {"model":"m","choices":[{"text":"\xff\xfe"}]}\n\n'
PLAIN = b"HTTP/1.1 %s\r\nContent-Length: 5\r\n\r\nsorry"
UNFRAMED = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
# What a server sends, and what that is.
ANSWERS: dict[str, tuple[bytes, str | None]] = {
    "400": (PLAIN % b"400 Bad Request", "http_400"),
    "401": (PLAIN % b"401 Unauthorized", "http_401"),
    "404": (PLAIN % b"404 Not Found", "http_404"),
    "429": (b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n", "http_429"),
    "a redirect": (
        b"HTTP/1.1 307 Away\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n",
        "http_307",
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "http_204"),
    "no usage": (stream(event("a"), event("b", "length")), None),
    "role first": (stream(event("", role="assistant"), usage(1, "a"), usage(2, "b")), None),
    "reasoning first": (stream(event("", reasoning="hm"), event("a", "length")), None),
    "only reasoning": (stream(event("", reasoning_content="hm"), event("", "length")), None),
    "several tokens a chunk": (stream(usage(3, "a b c"), usage(4, " d", "length")), None),
    "CRLF, comments": (stream(PING, event("é"), PING, event("b"), newline=b"\r\n"), None),
    "invalid UTF-8": (stream(ODD, event("b", "length")), None),
    "another model": (stream(event("a").replace(b'"m"', b'"x"')), "wrong_model"),
    "no JSON": (stream(event("a"), b"data: {oops\n\n"), "bad_json"),
    "another shape": (stream(event("a"), b'data: {"choices": [null]}\n\n'), "bad_json"),
    "an error event": (stream(event("a"), b'data: {"error": {"message": "x"}}\n\n'), "error_event"),
    "given up": (stream(event("a", "abort")), "given_up"),
    "no text": (stream(event("", role="assistant"), event("", "length")), "empty"),
    "only comments": (stream(PING, PING), "empty"),
    "no end mark": (HEAD + chunked(event("a")) + END, "no_done"),
    "cut in a frame": (HEAD + chunked(event("a"))[:-9], "closed_early"),
    "cut in the head": (HEAD[:30], "closed_early"),
    "nothing": (b"", "closed_early"),
    "until the end": (UNFRAMED + event("a") + event("b", "length") + DONE, None),
    "until the end, cut": (UNFRAMED + event("a"), "closed_early"),
    "a bad chunk": (HEAD + b"zz\r\n", "bad_http"),
    "a bad length": (b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nab", "bad_http"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "bad_http"),
}


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_each_answer_is_counted_as_what_it_is(size: int) -> None:
    """Each in pieces of `size` bytes, and one request each."""
    answers = list(ANSWERS.values())
    sent: list[str | None] = []

    def answer(connection: socket.socket, number: int) -> None:
        data, kind = answers[number % len(answers)]
        sent.append(kind)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), size):
            connection.sendall(data[at : at + size])
        if kind in ("closed_early", "bad_http") or data.startswith(UNFRAMED):
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65536)  # until the client closes: no reset on the way

    with stub(answer) as server:
        window, ended = load(server, rate=116, step_seconds=1)
        assert server.posts == 116 == 4 * len(answers)
    assert len(window.rows) == len(ended) == 116
    assert Counter(row.error for row in window.rows) == Counter(sent)
    for row in window.rows:
        assert (row.error is None) == (row.ttft_ms < float("inf"))
        assert row.end is not None
    assert {row.tokens_out for row in window.rows if row.usage} == {2, 4}


def test_a_stream_without_end_is_a_timeout() -> None:
    """It lives, and says nothing."""

    def comment(connection: socket.socket, _: int) -> None:
        connection.sendall(HEAD)
        for _ in range(200):
            connection.sendall(chunked(PING))
            time.sleep(0.02)

    with stub(comment) as server:
        window, _ = load(server, rate=200, timeout_s=1.0, slo={"ttft_p95_ms": 900})
    assert {row.error for row in window.rows} == {"timeout"}


def test_too_few_file_descriptors_are_a_miss_for_each_request(tmp_path: Path) -> None:
    """The generator's own limit: nothing is dropped, and it is said."""
    slow = {**FAST, "ttft_base_ms": 2000}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with simulator(tmp_path / "m", simulation={"service_curve": slow}) as engine:
        profile = make_profile(
            base_url=engine.url,
            warmup_seconds=0,
            step_seconds=0.5,
            timeout_s=60,
            slo={"ttft_p95_ms": 50_000},
        )
        generator = Generator(profile, Engine(engine.url, 5.0), lambda exchange: None)
        generator.calibrate()
        descriptors = list(Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors) + 20, hard))
        try:
            rows = generator.window(60, 0).rows
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows) == 52
    failed = [row for row in rows if row.error]
    assert {row.error for row in failed} == {"connect"}
    assert "Too many open files" in failed[0].detail
    assert any(row.error is None for row in rows)


def test_a_stalled_server_delays_no_request() -> None:
    started = time.monotonic()

    def stall(connection: socket.socket, _: int) -> None:
        # All answers wait for one point in time; a closed loop would send a handful until then.
        time.sleep(max(0.0, started + 4 - time.monotonic()))
        connection.sendall(GOOD)

    with stub(stall) as server:
        window, _ = load(server)
    assert len(window.rows) == 52
    assert max(row.sent or 0 for row in window.rows) < min(
        row.first_byte or 0 for row in window.rows
    )
    # The wait counts from the scheduled time: less for those that came later.
    assert window.rows[0].ttft_ms > window.rows[-1].ttft_ms


def test_no_answer_is_a_timeout() -> None:
    with stub(lambda connection, _: time.sleep(3)) as server:
        window, _ = load(server, rate=200, timeout_s=0.6, slo={"ttft_p95_ms": 500})
    assert {row.error for row in window.rows} == {"timeout"}
    assert {row.ttft_ms for row in window.rows} == {float("inf")}


def test_a_server_that_went_away_is_a_miss_for_each_request() -> None:
    server = Stub(lambda connection, _: connection.sendall(GOOD))
    profile = make_profile(
        base_url=server.url, warmup_seconds=0, step_seconds=0.5, slo={"ttft_p95_ms": 50_000}
    )
    generator = Generator(profile, Engine(server.url, 5.0), lambda exchange: None)
    generator.calibrate()
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    server.close()
    generator.address = ("127.0.0.1", port)
    rows = generator.window(60, 0).rows
    assert {row.error for row in rows} == {"connect"}
    assert len(rows) == 52
    assert all(row.sent is not None for row in rows)


def test_away_from_the_start_is_said_once() -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    url = f"http://127.0.0.1:{port}"
    generator = Generator(make_profile(base_url=url), Engine(url, 1.0), lambda exchange: None)
    with pytest.raises(LoadTestError, match=f"{url}/tokenize: .*refused") as away:
        generator.calibrate()
    assert away.value.name == "EngineUnreachable"


def test_unknown_host_is_said_so() -> None:
    url = "http://nowhere.invalid:8000"
    with pytest.raises(LoadTestError, match=r"nowhere\.invalid can't be resolved"):
        Generator(make_profile(base_url=url), Engine(url, 1.0), lambda exchange: None)


def test_prompt_shorter_than_the_template_is_refused() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        profile = make_profile(base_url=server.url, prompt_tokens=20)
        generator = Generator(profile, Engine(server.url, 5.0), lambda exchange: None)
        generator.calibrate()
        server.template = 22
        with pytest.raises(LoadTestError, match="chat template alone has 22"):
            generator.calibrate()


def test_prompts_leave_room_for_the_template() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        server.template = 20
        load(server, endpoint="chat")
    assert {len(body["messages"][0]["content"].split()) for body in server.bodies} == {44}


def test_engine_facts() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        facts = Engine(server.url, 5.0).facts("m")
        assert (facts.version, facts.root, facts.max_model_len) == ("0.0.stub", "/models/m", 4096)
        assert Engine(server.url, 5.0).facts("").model == "m"
        with pytest.raises(LoadTestError, match="serves m, not 'other'"):
            Engine(server.url, 5.0).facts("other")


def test_a_request_beyond_the_socket_buffer_is_sent_whole() -> None:
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        window, _ = load(server, prompt_tokens=400_000, output_tokens=2)
    assert {row.error for row in window.rows} == {None}
    assert {len(body["prompt"].split()) for body in server.bodies} == {400_000}


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    def answer_and_close(connection: socket.socket, _: int) -> None:
        connection.sendall(GOOD)  # without saying that it will close
        connection.shutdown(socket.SHUT_RDWR)

    with stub(answer_and_close) as server:
        window, _ = load(server, arrival="constant", rate=20)
    assert {row.error for row in window.rows} == {None}
    assert not any(row.reused for row in window.rows)


def test_a_generator_that_stood_still_says_so() -> None:
    pauses = [0.0] * 10 + [0.5]
    with stub(lambda connection, _: connection.sendall(GOOD)) as server:
        profile = make_profile(
            base_url=server.url, warmup_seconds=0, step_seconds=0.5, slo={"ttft_p95_ms": 4000}
        )
        generator = Generator(
            profile,
            Engine(server.url, 5.0),
            lambda _: time.sleep(pauses.pop(0) if pauses else 0),
        )
        generator.calibrate()
        window = generator.window(40, 0)
    assert "stood still" in untrusted(window, profile)
