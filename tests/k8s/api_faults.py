"""A proxy before a real API server that makes it go wrong on demand.

It ends the TLS of the server, listens on loopback as plain HTTP, and handles one request a
connection. Faults: an error status, an answer that is lost after the server did its work, a cut,
a slow answer, and half-open connections (nothing comes any more, nothing is closed).
"""

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD /path?query` matches `match`.

    `status`: this answer instead of the server's, with its usual `reason` or another, or with a
    `body` that is no Status. `lost`: the
    server does it, and the answer never comes. `cut_after`: so many bytes of the answer come.
    `delay_s` before it is forwarded.
    """

    match: str
    times: int = 1
    status: int = 0
    reason: str = ""
    body: bytes = b""
    retry_after_s: int | None = None
    lost: bool = False
    cut_after: int | None = None
    delay_s: float = 0.0


@dataclass
class FaultyApi:
    """The proxy. `requests` has `METHOD /path?query` of all that came."""

    upstream: tuple[str, int]
    tls: ssl.SSLContext | None
    address: str = ""
    requests: list[str] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)
    _open: set[socket.socket] = field(default_factory=set)
    _frozen: set[socket.socket] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _away: bool = False

    def add(self, *faults: Fault) -> None:
        """Plan faults; they are used up in order."""
        with self._lock:
            self._faults += faults

    def seen(self, pattern: str) -> list[str]:
        """The requests so far that match."""
        with self._lock:
            return [line for line in self.requests if re.search(pattern, line)]

    def freeze(self) -> None:
        """Make all present connections half-open; new ones work."""
        with self._lock:
            self._frozen |= self._open

    def cut(self) -> None:
        """Close all present connections in the middle of whatever they do."""
        with self._lock:
            for connection in self._open:
                _close(connection)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within the block every connection is cut at once."""
        self._away = True
        self.cut()
        try:
            yield
        finally:
            self._away = False

    def serve(self, client: socket.socket) -> None:
        """Handle one connection of a client, to its end."""
        server = None
        try:
            with self._lock:
                self._open.add(client)
            head, body = _read_request(client)
            if not head or self._away:
                return
            line = " ".join(head.split(b"\r\n", 1)[0].decode().split(" ")[:2])
            fault = self._fault_for(line)
            time.sleep(fault.delay_s)
            if fault.status:
                client.sendall(_answer(fault))
                return
            server = self._connect()
            with self._lock:
                self._open.add(server)
            server.sendall(_one_request(head) + b"\r\n\r\n" + body)
            if fault.lost:
                server.recv(65536)
                return
            back = threading.Thread(target=self._pump, args=(client, server, None), daemon=True)
            back.start()
            self._pump(server, client, fault.cut_after)
        except OSError:
            pass  # either side went away: so does the other
        finally:
            with self._lock:
                for end in (client, server):
                    if end is not None:
                        self._open.discard(end)
                        _close(end)

    def _fault_for(self, line: str) -> Fault:
        with self._lock:
            self.requests.append(line)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return Fault("")

    def _connect(self) -> socket.socket:
        plain = socket.create_connection(self.upstream, timeout=10)
        plain.settimeout(None)
        return self.tls.wrap_socket(plain, server_hostname=self.upstream[0]) if self.tls else plain

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        """Copy until the end, or `limit` bytes; hold back for ever once frozen."""
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while source in self._frozen:
                    time.sleep(0.05)
                if limit is not None and sent + len(data) > limit:
                    sink.sendall(data[: limit - sent])
                    return
                sink.sendall(data)
                sent += len(data)


@contextlib.contextmanager
def before(kubeconfig: Path) -> Iterator[FaultyApi]:
    """A proxy before the server of the kubeconfig's current context, with its certificates.

    Tokens are the client's business: they pass through.
    """
    config = yaml.safe_load(kubeconfig.read_text())
    named = {c["name"]: c["context"] for c in config["contexts"]}[config["current-context"]]
    cluster = {c["name"]: c["cluster"] for c in config["clusters"]}[named["cluster"]]
    user = {u["name"]: u["user"] for u in config["users"]}[named["user"]]
    url = urlsplit(cluster["server"])
    proxy = FaultyApi((url.hostname or "", url.port or 443), _tls(url.scheme, cluster, user))
    listener = socket.create_server(("127.0.0.1", 0))
    proxy.address = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=proxy.serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        proxy.cut()


def kubeconfig_through(proxy: FaultyApi, kubeconfig: Path, path: Path) -> Path:
    """A copy of the kubeconfig that goes through the proxy."""
    config = yaml.safe_load(kubeconfig.read_text())
    for cluster in config["clusters"]:
        cluster["cluster"] = {"server": proxy.address}
    path.write_text(yaml.safe_dump(config))
    return path


def _tls(scheme: str, cluster: dict[str, str], user: dict[str, str]) -> ssl.SSLContext | None:
    if scheme != "https":
        return None
    authority = cluster.get("certificate-authority-data")
    context = ssl.create_default_context(
        cafile=cluster.get("certificate-authority"),
        cadata=base64.b64decode(authority).decode() if authority else None,
    )
    if "client-certificate-data" in user:
        raise ValueError("give the proxy a kubeconfig with a token, or certificates as files")
    if "client-certificate" in user:
        context.load_cert_chain(user["client-certificate"], user["client-key"])
    return context


def _read_request(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    while length and len(body) < int(length[1]):
        body += client.recv(65536)
    return head, body


def _one_request(head: bytes) -> bytes:
    """The head with `Connection: close`, so that the end of the answer is its last byte."""
    if re.search(rb"(?i)\r\nupgrade:", head):
        return head
    return re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close"


def _answer(fault: Fault) -> bytes:
    reason = fault.reason or _REASONS.get(fault.status, "Unknown")
    body = (
        fault.body
        or json.dumps(
            {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": f"fault of the test proxy: {reason}",
                "reason": reason,
                "code": fault.status,
            }
        ).encode()
    )
    lines = [
        f"HTTP/1.1 {fault.status} {reason}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if fault.retry_after_s is not None:
        lines.append(f"Retry-After: {fault.retry_after_s}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
