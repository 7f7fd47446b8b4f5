"""A web server that is no API server: it answers all requests alike."""

import contextlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml


@contextlib.contextmanager
def answering(
    path: Path, status: int, body: bytes, headers: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Its address; a kubeconfig with that address is written to `path`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PATCH = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        address = f"http://127.0.0.1:{server.server_port}"
        kubeconfig = {
            "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "c"}}],
            "clusters": [{"name": "c", "cluster": {"server": address}}],
        }
        path.write_text(yaml.safe_dump(kubeconfig))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield address
        finally:
            server.shutdown()
