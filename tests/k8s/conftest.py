"""A real API server for the tests of k8s/, and clients of it."""

import base64
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k8s.client import Client
from k8s.transport import Transport
from tests.k8s import api_faults, apiserver, simulated_node
from tests.k8s.simulated_node import SimulatedNode

# A cluster to use in place of a server of our own: a namespace of the tests' own is all of it that
# they touch, and ADMIN_KUBECONFIG may make one if KUBECONFIG's account may not.
GIVEN = os.environ.get("ADMIN_KUBECONFIG") or os.environ.get("KUBECONFIG")


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apiserver.ApiServer | None]:
    """etcd, API server and some controllers, where their programs are built; else None.

    None too where KUBECONFIG names a cluster.
    """
    programs = None if GIVEN else apiserver.find_programs()
    if programs is None:
        yield None
        return
    with apiserver.start(programs, tmp_path_factory.mktemp("apiserver")) as server:
        yield server


@pytest.fixture(scope="session")
def kubeconfig(
    own_server: apiserver.ApiServer | None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One with full permissions: of the cluster that is given, else of our own server."""
    if GIVEN:
        return with_files(Path(GIVEN), tmp_path_factory.mktemp("kubeconfig"))
    if own_server is not None:
        return own_server.kubeconfig(tmp_path_factory.mktemp("kubeconfig") / "admin")
    pytest.fail(
        "no API server for this test: `make test` builds one, or set KUBECONFIG to a cluster "
        "in which the tests may create namespaces"
    )


def with_files(given: Path, folder: Path) -> Path:
    """A copy of a kubeconfig whose certificates are files, as the proxy of `faults` wants them."""
    config = yaml.safe_load(given.read_text())
    for number, user in enumerate(entry["user"] for entry in config["users"]):
        for key in ("client-certificate", "client-key"):
            if data := user.pop(f"{key}-data", None):
                file = folder / f"{key}-{number}"
                file.write_bytes(base64.b64decode(data))
                user[key] = str(file)
    copy = folder / "config"
    copy.write_text(yaml.safe_dump(config))
    return copy


@pytest.fixture
def server(own_server: apiserver.ApiServer | None) -> apiserver.ApiServer:
    """For tests that need a server of our own: they change tokens, certificates or CRDs, or play
    the node."""
    if GIVEN:
        pytest.skip("allowed on an API server of our own only, and KUBECONFIG names a cluster")
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
