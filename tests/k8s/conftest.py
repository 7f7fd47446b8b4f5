"""A real API server for the tests of k8s/, and clients of it."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.client import Client
from k8s.transport import Transport
from tests.k8s import api_faults, apiserver, simulated_node
from tests.k8s.simulated_node import SimulatedNode


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apiserver.ApiServer | None]:
    """etcd, API server and some controllers, where their programs are built; else None."""
    programs = apiserver.find_programs()
    if programs is None:
        yield None
        return
    with apiserver.start(programs, tmp_path_factory.mktemp("apiserver")) as server:
        yield server


@pytest.fixture(scope="session")
def kubeconfig(
    own_server: apiserver.ApiServer | None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A kubeconfig with a token, full permissions: of the own API server, else KUBECONFIG."""
    if own_server is not None:
        return own_server.kubeconfig(tmp_path_factory.mktemp("kubeconfig") / "admin")
    if given := os.environ.get("KUBECONFIG"):
        return Path(given)
    pytest.fail(
        "no API server for this test: `make test` builds one, or set KUBECONFIG to a cluster "
        "in which the tests may create namespaces"
    )


@pytest.fixture
def server(own_server: apiserver.ApiServer | None) -> apiserver.ApiServer:
    """For tests of tokens and certificates, which need a server of our own."""
    if own_server is None:
        pytest.fail("this test needs its own API server: `make test` builds its programs")
    return own_server


@pytest.fixture(scope="session")
def namespace(kubeconfig: Path) -> Iterator[str]:
    """A namespace of this session, deleted at its end."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(kubeconfig))
        client = Client(Transport(None), name)
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    client.delete("Namespace", name)


@pytest.fixture
def client(kubeconfig: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client with full permissions in a namespace of its own."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    return Client(Transport(None), namespace)


@pytest.fixture
def faults(kubeconfig: Path) -> Iterator[api_faults.FaultyApi]:
    """A proxy before the API server, to make it go wrong."""
    with api_faults.before(kubeconfig) as proxy:
        yield proxy


@pytest.fixture
def faulty(
    faults: api_faults.FaultyApi,
    kubeconfig: Path,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Client:
    """A client that goes through `faults`, and has had its first answer."""
    path = api_faults.kubeconfig_through(faults, kubeconfig, tmp_path / "through-proxy")
    monkeypatch.setenv("KUBECONFIG", str(path))
    client = Client(Transport(None), namespace)
    client.list("ConfigMap")
    faults.requests.clear()
    return client


@pytest.fixture
def name() -> str:
    """A name for an object that no other test uses."""
    return f"t-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def node(client: Client, server: apiserver.ApiServer, tmp_path: Path) -> Iterator[SimulatedNode]:
    """A simulated node, for logs, Jobs and port-forwards without containers."""
    with simulated_node.start(client, tmp_path) as node:
        yield node


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses between polls than in production, where the API server is to be spared."""
    monkeypatch.setattr("k8s.jobs._POLL_S", 0.1)
    monkeypatch.setattr("k8s.logs._POLL_S", 0.1)
    monkeypatch.setattr("k8s.lease._POLL_S", 0.1)
    monkeypatch.setattr("k8s.wait._ASK_AGAIN_S", 1)
