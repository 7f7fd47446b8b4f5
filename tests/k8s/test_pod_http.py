"""HTTP to a Pod: a real HTTP server behind the API server's port-forward."""

import errno
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import websocket

from k8s.client import Client
from k8s.errors import Forbidden, HttpStatus, PodUnreachable
from k8s.pod_http import get_json, get_text, pod_connection, post_json
from k8s.transport import Transport
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.apiserver import NOBODY_TOKEN, ApiServer, free_port
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.stub_engine import StubEngine, serving


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """An HTTP server on loopback, where the simulated node forwards to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/slow":
                time.sleep(3)
            if self.path == "/stream":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for i in range(3):
                    self.wfile.write(f"2\r\n{i}\n\r\n".encode())
                    time.sleep(0.1)
                self.wfile.write(b"0\r\n\r\n")
                return
            if self.path == "/half":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"half")
                self.close_connection = True
                return
            status = 503 if self.path == "/busy" else 200
            said = {"path": self.path, "authorization": self.headers["Authorization"]}
            self._answer(status, json.dumps(said).encode())

        def do_POST(self) -> None:
            self._answer(200, self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def pod(node: SimulatedNode, name: str) -> str:
    node.pod(name).start()
    return name


def test_get_keeps_the_authorization(client: Client, pod: str, port: int) -> None:
    with pod_connection(client, pod, port, timeout_s=5) as connection:
        headers = {"Authorization": "Bearer key-of-the-engine"}
        connection.request("GET", "/v1/models", headers=headers)
        said = json.load(connection.getresponse())
    assert said == {"path": "/v1/models", "authorization": "Bearer key-of-the-engine"}


def test_post_of_more_than_a_frame(client: Client, pod: str, port: int) -> None:
    body = {"prompt": "x" * 300_000}
    assert post_json(client, pod, port, "/v1/completions", body, timeout_s=10) == body


def test_several_requests_and_a_stream_on_one_connection(
    client: Client, pod: str, port: int
) -> None:
    with pod_connection(client, pod, port, timeout_s=5) as connection:
        for path in ("/a", "/b"):
            connection.request("GET", path)
            assert json.load(connection.getresponse())["path"] == path
        connection.request("GET", "/stream")
        assert list(connection.getresponse()) == [b"0\n", b"1\n", b"2\n"]


def test_at_the_same_time(client: Client, pod: str, port: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = [f"/{i}" for i in range(24)]
        said = pool.map(lambda p: get_json(client, pod, port, p, timeout_s=20)["path"], paths)
        assert list(said) == paths


def test_error_status_has_its_text(client: Client, pod: str, port: int) -> None:
    with pytest.raises(HttpStatus, match=f"GET /busy of Pod .*{pod} port {port}: .* 503") as error:
        get_text(client, pod, port, "/busy", timeout_s=5)
    assert error.value.code == 503
    assert '"/busy"' in error.value.body


def test_nothing_listens(client: Client, pod: str) -> None:
    port = free_port()
    with pytest.raises(
        PodUnreachable, match=f"{pod} port {port}: an error occurred forwarding"
    ) as error:
        get_text(client, pod, port, "/", timeout_s=5)
    assert not error.value.cut


def test_no_answer_in_time(client: Client, pod: str, port: int) -> None:
    with pytest.raises(PodUnreachable, match=f"{pod} port {port}: no answer in 1 s"):
        get_text(client, pod, port, "/slow", timeout_s=1)


def test_answer_that_always_breaks_off(
    faulty: Client, faults: FaultyApi, pod: str, port: int
) -> None:
    with pytest.raises(PodUnreachable, match="IncompleteRead"):
        get_text(faulty, pod, port, "/half", timeout_s=5)
    assert len(faults.seen("portforward")) == 3


def test_a_get_is_asked_again_after_a_cut(
    faulty: Client, faults: FaultyApi, pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine("m", "/models/m")
    asked = []

    def metrics() -> str:
        asked.append("metrics")
        if len(asked) == 1:
            faults.cut()
        return "all is well"

    monkeypatch.setattr(engine, "metrics", metrics)
    with serving(engine):
        assert get_text(faulty, pod, engine.port, "/metrics", timeout_s=10) == "all is well"
    assert len(asked) == 2


def test_a_post_is_sent_once(
    faulty: Client, faults: FaultyApi, pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine("m", "/models/m")
    bodies = []

    def complete(_: str, body: dict[str, str]) -> tuple[int, dict[str, str]]:
        bodies.append(body)
        faults.cut()
        return 200, {}

    monkeypatch.setattr(engine, "complete", complete)
    with serving(engine):
        with pytest.raises(PodUnreachable) as error:
            post_json(faulty, pod, engine.port, "/v1/completions", {"model": "m"}, timeout_s=10)
        assert error.value.cut
    assert len(bodies) == 1


def test_no_such_pod(client: Client, server: ApiServer) -> None:
    with pytest.raises(PodUnreachable, match=r"Pod .*/nothing doesn't exist"):
        get_text(client, "nothing", 8000, "/", timeout_s=5)


def test_a_pod_without_a_node(client: Client, server: ApiServer, name: str) -> None:
    client.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"containers": [{"name": "main", "image": "i"}]},
        }
    )
    with pytest.raises(PodUnreachable, match=f"Pod .*{name} port 8000: .*does not have a host"):
        get_text(client, name, 8000, "/", timeout_s=5)


def test_missing_permission(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "k", NOBODY_TOKEN)))
    nobody = Client(Transport(None), "default")
    with pytest.raises(Forbidden, match="'nobody' may not get pods/portforward in namespace def"):
        get_text(nobody, "nothing", 8000, "/", timeout_s=5)


def test_bad_api_while_opening(faulty: Client, faults: FaultyApi, pod: str, port: int) -> None:
    faults.add(Fault("portforward", status=500), Fault("portforward", lost=True))
    assert get_json(faulty, pod, port, "/x", timeout_s=10)["path"] == "/x"
    assert len(faults.seen("portforward")) == 3


def test_half_open_connection(faulty: Client, faults: FaultyApi, pod: str, port: int) -> None:
    with (
        pytest.raises(PodUnreachable, match="no answer in 1 s"),
        pod_connection(faulty, pod, port, timeout_s=1) as connection,
    ):
        connection.request("GET", "/a")
        connection.getresponse().read()
        faults.freeze()
        connection.request("GET", "/b")
        connection.getresponse()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ssl.SSLError(1, "[SSL] record layer failure"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
)
def test_trouble_of_the_system_names_the_pod(
    client: Client, pod: str, port: int, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def broken(_: websocket.WebSocket) -> None:
        raise error

    monkeypatch.setattr(websocket.WebSocket, "recv_data", broken)
    with pytest.raises(PodUnreachable, match=f"{pod} port {port}: ") as raised:
        get_text(client, pod, port, "/", timeout_s=5)
    assert str(error) in str(raised.value)
