"""A simulated node: a kubelet's HTTP server and Pod statuses, without containers.

The API server asks it for logs and port-forwards as it asks a real kubelet. What a container
writes and how it ends is up to the test. The real thing is what the lab's tests use.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import socket
import ssl
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from k8s.answers import Asked
from k8s.client import Client
from k8s.transport import Request

Obj = dict[str, Any]


@dataclass
class Run:
    """One run of a container: its log lines as `<time stamp> <text>`, and whether it has ended."""

    container_id: str
    lines: list[str] = field(default_factory=list)
    ended: bool = False


@dataclass
class SimulatedPod:
    """A Pod with one container on the simulated node."""

    client: Client
    name: str
    container: str
    runs: list[Run] = field(default_factory=list)

    def start(self) -> None:
        """A new run of the container."""
        self.runs.append(Run(f"simulated://{uuid.uuid4().hex}"))
        self._status("Running", {"running": {"startedAt": _now_s()}})

    def wait(self, reason: str, message: str) -> None:
        """The container waits, as the kubelet says when it can't start it."""
        self._status("Pending", {"waiting": {"reason": reason, "message": message}})

    def write(self, *lines: str, stamp: str | None = None) -> None:
        """Lines of the container's log."""
        self.runs[-1].lines += [f"{stamp or now_ns()} {line}" for line in lines]

    def say(self, **event: Any) -> None:
        """A JSON event."""
        self.write(json.dumps(event))

    def end(self, code: int = 0, reason: str | None = None) -> None:
        """The container ends."""
        self.runs[-1].ended = True
        self._status(
            "Succeeded" if code == 0 else "Failed", {"terminated": self._end(code, reason)}
        )

    def restart(self, code: int = 1) -> None:
        """The container ends and another run begins."""
        self.runs[-1].ended = True
        last = {"terminated": self._end(code, "Error")}
        self.runs.append(Run(f"simulated://{uuid.uuid4().hex}"))
        self._status("Running", {"running": {"startedAt": _now_s()}}, last)

    def evict(self, message: str) -> None:
        """The kubelet evicts the Pod."""
        self.runs[-1].ended = True
        status = {"phase": "Failed", "reason": "Evicted", "message": message}
        patch_status(self.client, self.name, status)

    def _end(self, code: int, reason: str | None) -> Obj:
        return {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "startedAt": _now_s(),
            "finishedAt": _now_s(),
            "containerID": self.runs[-1].container_id,
        }

    def _status(self, phase: str, state: Obj, last: Obj | None = None) -> None:
        status = {
            "name": self.container,
            "image": "i",
            "imageID": "i",
            "ready": False,
            "restartCount": max(0, len(self.runs) - 1),
            "state": state,
            "lastState": last or {},
        }
        if self.runs and "waiting" not in state:
            status["containerID"] = self.runs[-1].container_id
        patch_status(self.client, self.name, {"phase": phase, "containerStatuses": [status]})


@dataclass
class SimulatedNode:
    """The node. `pods` by name."""

    client: Client
    name: str
    pods: dict[str, SimulatedPod] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def pod(self, name: str) -> SimulatedPod:
        """Make a Pod on this node, not started yet."""
        self.client.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name},
                "spec": {
                    "nodeName": self.name,
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "main", "image": "i"}],
                },
            }
        )
        return self._known(name, "main")

    def play(
        self, job: str, script: Callable[[SimulatedPod], None], other_than: str = ""
    ) -> threading.Thread:
        """When the Job has a Pod that is not on a node, put it here and run the script.

        `other_than`: not for Pods of the Job with this uid.
        """

        def wait_and_play() -> None:
            while not self._stop.is_set():
                for pod in self.client.list("Pod", labels={"batch.kubernetes.io/job-name": job}):
                    owner = pod["metadata"]["ownerReferences"][0]["uid"]
                    if not pod["spec"].get("nodeName") and owner != other_than:
                        name = pod["metadata"]["name"]
                        self._bind(name)
                        script(self._known(name, pod["spec"]["containers"][0]["name"]))
                        return
                time.sleep(0.1)

        thread = threading.Thread(target=wait_and_play, daemon=True)
        thread.start()
        return thread

    def remove_deleted(self) -> None:
        """As a kubelet does: finish the deletion of Pods, until the node stops, and then once
        more: a Pod that is for ever on its way out would be waited for by later tests.
        """
        stopped = False
        while not stopped:
            stopped = self._stop.wait(0.2)
            here = self.client.list("Pod", fields={"spec.nodeName": self.name})
            staying = set()
            for pod in here:
                name = pod["metadata"]["name"]
                if pod["metadata"].get("deletionTimestamp"):
                    _call(self.client, "DELETE", name, body={"gracePeriodSeconds": 0})
                else:
                    staying.add(name)
            for name in self.pods.keys() - staying:
                for run in self.pods[name].runs:
                    run.ended = True

    def stop(self) -> None:
        """No more Pods."""
        self._stop.set()

    def _known(self, name: str, container: str) -> SimulatedPod:
        self.pods[name] = SimulatedPod(self.client, name, container)
        return self.pods[name]

    def _bind(self, pod: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
        _call(self.client, "POST", pod, "binding", body)


@contextlib.contextmanager
def start(client: Client, folder: Path) -> Iterator[SimulatedNode]:
    """A node that serves logs and port-forwards (to loopback) until the block ends."""
    node = SimulatedNode(client, f"simulated-{uuid.uuid4().hex[:8]}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(node))
    server.daemon_threads = True
    server.socket = _certificate(folder).wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    client.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": server.server_address[1]}},
    }
    _call(client, "PATCH", node.name, "status", {"status": status}, kind="nodes")
    kubelet = threading.Thread(target=node.remove_deleted, daemon=True)
    kubelet.start()
    try:
        yield node
    finally:
        node.stop()
        kubelet.join(10)
        server.shutdown()
        server.server_close()
        client.delete("Node", node.name)


def _handler(node: SimulatedNode) -> type[http.server.BaseHTTPRequestHandler]:
    class Kubelet(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            _, what, _, pod, *_ = url.path.split("/")
            if what == "containerLogs":
                with contextlib.suppress(OSError):
                    self._log(node.pods[pod], query)
            elif what == "portForward":
                self._forward(int(query["port"]))
            self.close_connection = True

        def _log(self, pod: SimulatedPod, query: dict[str, str]) -> None:
            run = pod.runs[-2 if query.get("previous") == "true" else -1]
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            since = query.get("sinceTime")
            at = max(0, len(run.lines) - int(query["tailLines"])) if "tailLines" in query else 0
            while True:
                ended = run.ended
                for raw in run.lines[at:]:
                    at += 1
                    stamp, _, text = raw.partition(" ")
                    if since and text and stamp[0] == "2" and _time(stamp) < _time(since):
                        continue
                    line = f"{raw}\n" if query.get("timestamps") == "true" else f"{text}\n"
                    self._chunk(line.encode())
                if ended or query.get("follow") != "true":
                    break
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _forward(self, port: int) -> None:
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", accept)
            self.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
            self.end_headers()
            for channel in (0, 1):
                self._frame(channel, struct.pack("<H", port))
            try:
                target = socket.create_connection(("127.0.0.1", port), timeout=5)
            except OSError as error:
                self._frame(1, f"an error occurred forwarding {port}: {error}".encode())
                return
            threading.Thread(target=self._back, args=(target,), daemon=True).start()
            with contextlib.suppress(OSError):
                while (data := self._next_frame()) is not None:
                    target.sendall(data[1:])
            target.close()

        def _back(self, target: socket.socket) -> None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed by the other thread
                while data := target.recv(65536):
                    self._frame(0, data)
                self.wfile.write(b"\x88\x00")

        def _frame(self, channel: int, data: bytes) -> None:
            payload = bytes((channel,)) + data
            size = len(payload)
            if size < 126:
                head = bytes((0x82, size))
            elif size <= 0xFFFF:
                head = b"\x82\x7e" + struct.pack(">H", size)
            else:
                head = b"\x82\x7f" + struct.pack(">Q", size)
            self.wfile.write(head + payload)
            self.wfile.flush()

        def _next_frame(self) -> bytes | None:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 0x0F == 8:
                return None
            size = head[1] & 0x7F
            if size >= 126:
                packed = self.rfile.read(2 if size == 126 else 8)
                size = int.from_bytes(packed, "big")
            mask, data = self.rfile.read(4), self.rfile.read(size)
            return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))

        def log_message(self, *args: object) -> None:
            pass

    return Kubelet


def _call(
    client: Client, method: str, name: str, subresource: str = "", body: Any = None, kind: str = ""
) -> None:
    where = kind or f"namespaces/{client.namespace}/pods"
    path = f"/api/v1/{where}/{name}" + (f"/{subresource}" if subresource else "")
    asked = Asked(method, None, None, path, "the test's API server", "the test")
    with contextlib.suppress(Exception) if method == "DELETE" else contextlib.nullcontext():
        kind_of_body = "application/merge-patch+json" if method == "PATCH" else "application/json"
        client.transport.call(Request(asked, method, path, {}, body, kind_of_body))


def patch_status(client: Client, pod: str, status: Obj) -> None:
    """What a kubelet or the scheduler does."""
    _call(client, "PATCH", pod, "status", {"status": status})


def _certificate(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated-kubelet")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = folder / "simulated-kubelet.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def _time(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)


def now_ns() -> str:
    """A time stamp as the kubelet puts before a line."""
    now = time.time_ns()
    seconds = datetime.fromtimestamp(now // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{seconds}.{now % 10**9:09d}Z"


def _now_s() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
