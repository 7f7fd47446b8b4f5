"""HTTP to a Pod through the API server's port-forward.

It works from a laptop and through NetworkPolicies, and keeps the Authorization header, which the
API server's proxy subresource drops. The RBAC verbs are get and create on pods/portforward.
"""

import contextlib
import http.client
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import websocket

from k8s.client import Client
from k8s.errors import HttpStatus, Invalid, NotFound, PodUnreachable, Unreachable
from k8s.kinds import kind_of
from k8s.transport import Backoff, Request

# https://kubernetes.io/docs/reference/…/pods portforward: frames of a web socket start with a
# channel byte, even for the data of a port, odd for its errors; the first frame of each channel
# holds the port's number.
_PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
# A connection that breaks off says nothing of the Pod: API servers and proxies restart.
_GET_TRIES = 3
_AGAIN_S = 0.5


@contextlib.contextmanager
def pod_connection(
    client: Client, pod: str, port: int, *, timeout_s: float, namespace: str | None = None
) -> Iterator[http.client.HTTPConnection]:
    """An HTTP connection to the port of the Pod; for one thread at a time.

    `timeout_s`: for the opening, and for each wait for bytes. Raises PodUnreachable, also for
    what happens in the block: nothing listens, the Pod ends, no answer in time; and for a Pod
    that is gone or has no node.
    """
    what = f"Pod {namespace or client.namespace}/{pod} port {port}"
    forward = _open(client, pod, port, timeout_s, namespace, what)
    connection = http.client.HTTPConnection(pod, port, timeout=timeout_s)
    connection.sock = forward
    try:
        yield connection
    except TimeoutError as error:
        raise PodUnreachable(f"{what}: no answer in {timeout_s:g} s") from error
    except (http.client.HTTPException, ConnectionError) as error:
        why = forward.trouble or str(error) or type(error).__name__
        broke_off = isinstance(error, ConnectionError | http.client.IncompleteRead)
        cut = broke_off and not forward.trouble
        raise PodUnreachable(f"{what}: {why}", cut=cut) from error
    finally:
        connection.close()
        forward.close()


def get_text(
    client: Client,
    pod: str,
    port: int,
    path: str,
    *,
    timeout_s: float,
    namespace: str | None = None,
) -> str:
    """GET, again after a cut; the body as text. `timeout_s` is for each try. Raises
    PodUnreachable, HttpStatus for a status of 300 or more.
    """
    for tries_left in reversed(range(_GET_TRIES)):
        try:
            return _ask(client, pod, port, "GET", path, None, timeout_s, namespace)
        except PodUnreachable as error:
            if not error.cut or not tries_left:
                raise
            time.sleep(_AGAIN_S)
    raise AssertionError("the last try returns or raises")


def get_json(client: Client, pod: str, port: int, path: str, *, timeout_s: float) -> Any:
    """The same; the body as JSON."""
    text = get_text(client, pod, port, path, timeout_s=timeout_s)
    return _parse(text, f"GET {path} of Pod {pod} port {port}")


def post_json(
    client: Client,
    pod: str,
    port: int,
    path: str,
    body: Any,
    *,
    timeout_s: float,
) -> Any:
    """POST JSON, once; the answer as JSON."""
    text = _ask(client, pod, port, "POST", path, body, timeout_s, None)
    return _parse(text, f"POST {path} of Pod {pod} port {port}")


def _ask(
    client: Client,
    pod: str,
    port: int,
    method: str,
    path: str,
    body: Any,
    timeout_s: float,
    namespace: str | None,
) -> str:
    # Never `Connection: close`: when the Pod closes first, containerd drops what the kubelet hasn't
    # forwarded yet (seen with 1.6: always, for answers above a few kB).
    sent, data = {}, None
    if body is not None:
        sent = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
    with pod_connection(client, pod, port, timeout_s=timeout_s, namespace=namespace) as connection:
        connection.request(method, path, body=data, headers=sent)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
    if answer.status >= 300:
        raise HttpStatus(
            f"{method} {path} of Pod {namespace or client.namespace}/{pod} port {port}: "
            f"HTTP status {answer.status}: {text[:500]}",
            code=answer.status,
            body=text,
        )
    return text


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PodUnreachable(f"{what}: the answer isn't JSON: {text[:200]!r}") from error


def _open(
    client: Client, pod: str, port: int, timeout_s: float, namespace: str | None, what: str
) -> "_Forward":
    """The opening changes nothing, so it is tried again while there is time."""
    deadline = time.monotonic() + timeout_s
    where = namespace or client.namespace
    kind = kind_of("Pod")
    asked = client.asked(f"forward port {port} of", kind, pod, where)
    request = Request(asked, "GET", kind.path(where, pod, "portforward"), {"ports": str(port)})
    backoff = Backoff()
    while True:
        try:
            left = max(1.0, deadline - time.monotonic())
            return _Forward(client.transport.websocket(request, _PROTOCOL, left), timeout_s)
        except Unreachable as error:
            if not backoff.sleep(deadline, error.retry_after_s):
                raise PodUnreachable(f"{what}: {error}") from error
        except (NotFound, Invalid) as error:
            raise PodUnreachable(f"{what}: {error}", code=error.code) from error


class _Forward:
    """As much of a socket as http.client needs, over the frames of a port-forward.

    kubernetes.stream.portforward has a thread and a socket pair a connection instead; its thread
    dies with a traceback on a reset connection, it can't open with a timeout, and its errors
    don't reach the reader.
    """

    def __init__(self, frames: websocket.WebSocket, timeout_s: float) -> None:
        frames.settimeout(timeout_s)
        self._frames = frames
        self._opened: set[int] = set()
        self.trouble = ""

    def sendall(self, data: bytes) -> None:
        """Send as data of the port."""
        with _plain_errors():
            self._frames.send_binary(bytes((_DATA,)) + data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """A file to read the port's data from."""
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(self))

    def receive(self) -> bytes:
        """The next data; b"" at the end. Raises ConnectionError for the port's own errors."""
        while True:
            with _plain_errors():
                opcode, frame = self._frames.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE or not frame:
                return b""
            channel, data = frame[0], bytes(frame[1:])
            if channel not in self._opened:
                self._opened.add(channel)
            elif channel == _ERROR:
                self.trouble = data.decode("utf-8", "replace").strip()
                raise ConnectionError(self.trouble)
            elif data:
                return data

    def close(self) -> None:
        """At once, without waiting for the other side's goodbye."""
        with contextlib.suppress(OSError):
            self._frames.shutdown()  # type: ignore[no-untyped-call]


class _Reader(io.RawIOBase):
    def __init__(self, forward: _Forward) -> None:
        self._forward = forward
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or self._forward.receive()
        taken = min(len(buffer), len(data))
        buffer[:taken] = data[:taken]
        self._rest = data[taken:]
        return taken


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The web socket library's and the system's errors as those of a connection."""
    try:
        yield
    except (TimeoutError, ConnectionError):
        raise
    except OSError as error:  # no route to the host, TLS: to http.client's user that is a cut too
        raise ConnectionError(str(error)) from error
    except websocket.WebSocketTimeoutException as error:
        raise TimeoutError(str(error)) from error
    except websocket.WebSocketConnectionClosedException as error:
        raise ConnectionError("the connection was cut") from error
    except websocket.WebSocketException as error:
        raise ConnectionError(str(error)) from error
