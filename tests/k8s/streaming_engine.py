"""A stub of vLLM's API that streams, and counts the requests that someone still reads."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TOKEN_SECONDS = 0.02


@dataclass
class StreamingEngine:
    """`others`: requests in flight besides those that it streams. `posts`: the bodies it got."""

    others: float = 0
    waiting: float = 0
    refuses: bool = False
    max_model_len: int | None = 2048
    port: int = 0
    posts: list[dict[str, Any]] = field(default_factory=list)
    _streams: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def running(self) -> float:
        """What its metric shows."""
        return self._streams + self.others

    def metrics(self) -> str:
        return (
            f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            f'vllm:num_requests_waiting{{engine="0"}} {self.waiting}\n'
        )

    def models(self) -> dict[str, Any]:
        length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        return {"data": [{"id": "m"} | length]}

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        with self._lock:
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1


@contextlib.contextmanager
def serving(engine: StreamingEngine) -> Iterator[StreamingEngine]:
    """Serve it on loopback until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_metrics = self.path == "/metrics"
            self._answer(200, engine.metrics() if is_metrics else json.dumps(engine.models()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.posts.append(body)
            if engine.refuses:
                self._answer(400, "no such model")
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with engine.streaming(), contextlib.suppress(OSError):
                for _ in range(body["max_tokens"]):
                    self._chunk(b"data: {}\n\n")
                    time.sleep(TOKEN_SECONDS)
                self._chunk(b"data: [DONE]\n\n")
                self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    engine.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
