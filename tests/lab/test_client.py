"""The client's account, against real servers that fail in known ways."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from catalog.load import catalog
from lab.client import Client, Tally, main
from lab.client_pod import pod

ROOT = Path(__file__).parents[2]
Answer = Callable[[BaseHTTPRequestHandler, int], bool]  # False: the ordinary answer follows


class Server(ThreadingHTTPServer):
    """An engine that answers well unless `answer` does something else with the nth POST."""

    daemon_threads = True

    def __init__(self, answer: Answer = lambda handler, number: False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.posts = 0
        self.connections = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        if not self.server.answer(self, self.server.posts):
            self.reply(200, {"choices": [{"message": {"content": "Paris."}}]})

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "m", "root": "/models/org/repo/c0ffee"}]})

    def reply(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Answer = lambda handler, number: False) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url: str, *, times: int = 1, keep: bool = True, timeout_s: float = 5) -> dict[str, Any]:
    tally = Tally()
    client = Client(url, "m", timeout_s, tally)
    for _ in range(times):
        client.ask(keep)
    return tally.summary()


def test_counts_answers_by_the_commit_that_gave_them(serve: Callable[..., Server]) -> None:
    summary = ask(serve().url, times=3)
    assert (summary["requests"], summary["failures"]) == (3, 0)
    assert summary["revisions"] == {"c0ffee": 3}


@pytest.mark.parametrize(("keep", "connections"), [(True, 1), (False, 4)])
def test_keeps_connections_or_makes_new_ones(
    serve: Callable[..., Server], keep: bool, connections: int
) -> None:
    server = serve()
    ask(server.url, times=4, keep=keep)
    assert server.connections == connections


def status_503(handler: BaseHTTPRequestHandler, _: int) -> bool:
    assert isinstance(handler, Handler)
    handler.reply(503, {"error": "overloaded"})
    return True


def no_text(handler: BaseHTTPRequestHandler, _: int) -> bool:
    assert isinstance(handler, Handler)
    handler.reply(200, {"choices": [{"message": {"content": None}}]})
    return True


def not_json(handler: BaseHTTPRequestHandler, _: int) -> bool:
    assert isinstance(handler, Handler)
    handler.reply(200, b"<html>")
    return True


def half(handler: BaseHTTPRequestHandler, _: int) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    handler.close_connection = True
    return True


def silence(handler: BaseHTTPRequestHandler, _: int) -> bool:
    time.sleep(1)
    handler.close_connection = True
    return True


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (status_503, "status 503"),
        (no_text, "no text"),
        (not_json, "malformed"),
        (half, "cut"),
        (silence, "timeout"),
    ],
)
def test_counts_a_failure_as_what_it_is(
    serve: Callable[..., Server], answer: Answer, kind: str, keep: bool
) -> None:
    summary = ask(serve(answer).url, keep=keep, timeout_s=0.3)
    assert summary["failures_by_kind"] == {kind: 1}
    assert summary["requests"] == 1
    assert kind in summary["first_failure"]


def test_a_refused_connection_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert ask(f"http://127.0.0.1:{port}")["failures_by_kind"] == {"connect": 1}


def test_a_kept_connection_closed_before_an_answer_is_asked_again_and_counted(
    serve: Callable[..., Server],
) -> None:
    def closes_the_second(handler: BaseHTTPRequestHandler, number: int) -> bool:
        handler.close_connection = number == 2
        return number == 2

    summary = ask(serve(closes_the_second).url, times=2)
    assert (summary["requests"], summary["failures"], summary["resent"]) == (2, 0, 1)


def test_a_new_connection_closed_before_an_answer_is_a_failure(
    serve: Callable[..., Server],
) -> None:
    def closes(handler: BaseHTTPRequestHandler, _: int) -> bool:
        handler.close_connection = True
        return True

    summary = ask(serve(closes).url, keep=False)
    assert (summary["failures_by_kind"], summary["resent"]) == ({"cut": 1}, 0)


def test_keeps_the_rate_while_the_server_hangs(
    serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(handler: BaseHTTPRequestHandler, _: int) -> bool:
        time.sleep(0.8)
        return False

    status = main([serve(slow).url, "m", "--rate", "20", "--seconds", "1.5"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert 24 <= summary["requests"] <= 31, "it waited for answers before it asked again"


def test_sigterm_ends_it_with_a_summary_and_status(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number: number == 3 and status_503(handler, number))
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.client", server.url, "m", "--rate", "20"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    end = time.monotonic() + 20
    while server.posts < 25 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    *seconds, summary = map(json.loads, out.splitlines())
    assert process.returncode == 1, "a request failed"
    assert summary["failures_by_kind"] == {"status 503": 1}
    assert summary["requests"] == server.posts
    assert seconds
    assert {line["event"] for line in seconds} == {"second"}


def streaming(tokens: int, done: bool = True) -> Answer:
    """A stream of so many tokens; cut before its last event if not `done`."""

    def answer(handler: BaseHTTPRequestHandler, _: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        events = [{"choices": [{"delta": {"content": " x"}}]}] * tokens
        lines = [json.dumps(event) for event in events]
        lines += [json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})]
        lines += ["[DONE]"] if done else []
        for line in lines:
            frame = f"data: {line}\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame))
        handler.wfile.write(b"0\r\n\r\n" if done else b"")
        handler.close_connection = True
        return True

    return answer


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (streaming(40), None),
        (streaming(39), "incomplete"),
        (streaming(40, done=False), "incomplete"),
        (half, "incomplete"),
        (status_503, "status 503"),
    ],
    ids=["whole", "a token less", "cut at its end", "cut", "refused"],
)
def test_a_stream_is_whole_or_its_failure_is_told(
    serve: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
    failure: str | None,
) -> None:
    status = main([serve(answer).url, "m", "--stream", "40"])
    told = json.loads(capsys.readouterr().out)
    assert (status, told["whole"]) == ((1, False) if failure else (0, True))
    assert (failure or "") in told.get("failure", "")
    assert told["began"] <= told["ended"]


def test_the_pod_asks_the_models_service() -> None:
    model = catalog().model("smollm2-135m")
    made = pod("llm", model, "--rate", "50")
    command = made["spec"]["containers"][0]["command"]
    url = f"http://{model.object_name}.llm.svc:8000"
    assert command == ["python", "-m", "lab.client", url, model.served_name, "--rate", "50"]
