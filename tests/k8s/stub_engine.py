"""A stub of vLLM's API, for what a well-behaved engine never does."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StubEngine:
    """What it answers. `posts`: the bodies that it got."""

    name: str
    root: str
    message: dict[str, Any] = field(default_factory=lambda: {"content": "It is Paris."})
    health: int = 200
    refuses: str = ""  # a field of the body that it answers 400 to
    counts: bool = True
    says_usage: bool = True
    running: float = 0
    waiting: float = 0
    port: int = 0
    posts: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 100
    generated: int = 100
    adapters: dict[str, str] = field(default_factory=dict)  # name -> root
    adapter_says: str | None = "SELECT 1;"

    def metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.name}"}}'
        return (
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{labels} {self.running}\n"
            f"vllm:num_requests_waiting{labels} {self.waiting}\n"
            f"vllm:prompt_tokens_total{labels} {self.prompt_tokens}\n"
            f"vllm:generation_tokens_total{labels} {self.generated}\n"
        )

    def complete(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.posts.append(body)
        if self.refuses in body:
            return 400, {"error": {"message": f"{self.refuses} is not supported"}}
        if self.counts:
            self.prompt_tokens += 10
            self.generated += 7
        message = self.message
        if body["model"] != self.name:
            if body["model"] not in self.adapters:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            message = {"content": self.adapter_says}
        choice: dict[str, Any] = {"message": message, "finish_reason": "stop"}
        if path == "/v1/completions":
            choice = {"text": self.message["content"]}
        usage = {"prompt_tokens": 10, "completion_tokens": 7}
        return 200, {"choices": [choice]} | ({"usage": usage} if self.says_usage else {})


@contextlib.contextmanager
def serving(engine: StubEngine) -> Iterator[StubEngine]:
    """Serve it on loopback until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/health":
                self._answer(engine.health, "")
            elif self.path == "/metrics":
                self._answer(200, engine.metrics())
            else:
                names = {engine.name: engine.root, **engine.adapters}
                entries = [{"id": name, "root": root} for name, root in names.items()]
                self._answer(200, json.dumps({"data": entries}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = engine.complete(self.path, body)
            self._answer(status, json.dumps(answer))

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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
