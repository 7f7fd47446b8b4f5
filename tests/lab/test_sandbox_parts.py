"""The parts of the lab that need neither root nor programs."""

import base64
import json
import random
import socket
import ssl
import subprocess
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.gpus import Gpu, parse_nvidia_smi
from k8s.manifests.engine import NVIDIA_SMI
from lab import lab as labs
from lab import programs
from lab.kubernetes import addons, certificates, components, image_store, preflight
from lab.kubernetes.api import Api, ApiError, explain_pods, load
from lab.kubernetes.bringup import Abandoned, first_error
from lab.kubernetes.sandbox import MARKER, LabError, hold_name

HERE = Path(components.__file__).parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return programs.cache_folder()


# Certificates


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "pki"
    certificates.make_all(folder)
    return folder


def test_clients_trust_the_api_server_at_every_name_of_it(pki: Path) -> None:
    for name in ("127.0.0.1", "10.123.0.10", "kubernetes.default.svc"):
        assert handshake(pki, "apiserver", "ca", name)


def test_a_certificate_of_another_authority_is_refused(pki: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, "apiserver", "front-proxy-ca", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(pki, "apiserver", "ca", "10.9.9.9")


def test_keys_are_the_owners_alone(pki: Path) -> None:
    assert {oct(path.stat().st_mode & 0o777) for path in pki.iterdir()} == {"0o600"}


def test_kubeconfigs_need_no_other_file(pki: Path, tmp_path: Path) -> None:
    file = tmp_path / "config"
    certificates.write_kubeconfig(file, pki, "127.0.0.1", 1234, {"token": "t"}, namespace="llm")
    config = yaml.safe_load(file.read_text())
    assert config["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:1234"
    authority = config["clusters"][0]["cluster"]["certificate-authority-data"]
    assert base64.b64decode(authority) == (pki / "ca.crt").read_bytes()
    assert config["users"][0]["user"] == {"token": "t"}
    assert config["contexts"][0]["context"]["namespace"] == "llm"


def handshake(pki: Path, server: str, authority: str, name: str) -> bool:
    """A TLS handshake between both ends in memory; raises SSLError."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(pki / f"{server}.crt", pki / f"{server}.key")
    here = ssl.create_default_context(cafile=str(pki / f"{authority}.crt"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(to_client, to_server, server_hostname=name)
    other = there.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for end in (client, other):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    return len(done) == 2


# The stand-in for nvidia-smi


def nvidia_smi(*arguments: str, devices: str = "GPU-1,GPU-2") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", HERE / "nvidia-smi", *arguments],
        env={"NVIDIA_VISIBLE_DEVICES": devices, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_nvidia_smi_prints_the_csv_that_it_is_asked_for() -> None:
    done = nvidia_smi("--query-gpu=index,name,uuid,memory.total,fan.speed", "--format=csv")
    assert done.stdout.splitlines() == [
        "index, name, uuid, memory.total [MiB], fan.speed",
        "0, NVIDIA L4 SIMULATED, GPU-1, 23034 MiB, [N/A]",
        "1, NVIDIA L4 SIMULATED, GPU-2, 23034 MiB, [N/A]",
    ]
    query = "--query-gpu=index,name,uuid,memory.total,driver_version"
    assert nvidia_smi(query, "--format=csv").stdout.splitlines() == [
        "index, name, uuid, memory.total [MiB], driver_version",
        "0, NVIDIA L4 SIMULATED, GPU-1, 23034 MiB, 0.0.0-simulated",
        "1, NVIDIA L4 SIMULATED, GPU-2, 23034 MiB, 0.0.0-simulated",
    ]
    plain = nvidia_smi("--query-gpu=memory.used, count", "--format=csv,noheader,nounits")
    assert plain.stdout.splitlines() == ["0, 2", "0, 2"]
    plain = nvidia_smi("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    assert plain.stdout.splitlines() == ["GPU-1, 23034", "GPU-2, 23034"]


def test_what_a_pod_asks_nvidia_smi_for_is_what_is_read() -> None:
    found = parse_nvidia_smi(nvidia_smi(*NVIDIA_SMI[1:]).stdout)
    assert found == [
        Gpu(index, "NVIDIA L4 SIMULATED", f"GPU-{index + 1}", 23034, 0, "0.0.0-simulated")
        for index in range(2)
    ]


def test_nvidia_smi_lists_the_granted_devices_and_says_that_they_are_simulated() -> None:
    one = nvidia_smi("-L", devices="GPU-a").stdout
    assert one == "GPU 0: NVIDIA L4 SIMULATED (UUID: GPU-a)\n"
    lines = nvidia_smi("-L").stdout.splitlines()
    assert [line.split("UUID: ")[1] for line in lines] == ["GPU-1)", "GPU-2)"]
    assert all("SIMULATED" in line for line in lines)


def test_nvidia_smi_fails_without_devices_and_on_what_it_does_not_know() -> None:
    none = nvidia_smi("-L", devices="")
    assert (none.returncode, none.stdout) == (6, "No devices were found\n")
    assert nvidia_smi("--loop=1").returncode == 2
    assert nvidia_smi("--nonsense").returncode == 2


# Manifests


def test_addons_use_images_that_the_set_up_builds() -> None:
    from lab import images

    built = {images.reference(name) for name in (*images.STATIC, *images.PYTHON)}
    for file in HERE.glob("*.yaml"):
        text = file.read_text()
        used = {word.strip('"]},') for word in text.split() if word.startswith("lab.local/")}
        assert used <= built, file.name


def test_the_volume_is_the_cluster_files_claim() -> None:
    from catalog.load import catalog

    (volume,) = addons.read("storage.yaml")
    for name in labs.CLUSTERS.values():
        cluster = catalog().cluster(name)
        claimed = (cluster.namespace, cluster.storage.claim)
        reference = volume["spec"]["claimRef"]
        assert (reference["namespace"], reference["name"]) == claimed


def test_load_unpacks_lists_and_skips_empty_documents() -> None:
    text = "---\n{kind: A}\n---\n---\nkind: List\nitems: [{kind: B}, {kind: C}]\n"
    assert [obj["kind"] for obj in load(text)] == ["A", "B", "C"]


# The image store


def test_the_store_of_another_containerd_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "_version", lambda: "2")
    assert image_store.contents() == {}
    image_store.folder().mkdir(parents=True)
    file = image_store.folder() / image_store.CONTENTS
    file.write_text(json.dumps({"pause": "a.tar", "containerd": "1"}))
    assert image_store.contents() == {}
    file.write_text(json.dumps({"pause": "a.tar", "containerd": "2"}))
    assert image_store.contents() == {"pause": "a.tar"}


def test_lacking_are_new_images_and_changed_ones() -> None:
    archives = {name: Path(f"/{name}/new.tar") for name in ("same", "changed", "new")}
    kept = {"same": "new.tar", "changed": "old.tar"}
    assert image_store.lacking(archives, kept).keys() == {"changed", "new"}


# Refusals


def test_a_port_in_use_is_named_and_the_others_are_free_again() -> None:
    # Below the ports that the kernel gives to connections, which come and go.
    port = random.randrange(20000, 30000)
    refused = pytest.raises(LabError, match=f"port {port} of 127.0.0.1 can't be used")
    with socket.create_server(("127.0.0.1", port)), refused:
        labs.listen(port - 1)
    socket.create_server(("127.0.0.1", port - 1)).close()


@pytest.mark.parametrize("name", ["", "Lab", "a/b", "-a", "a" * 31])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="can't be a lab's name"), labs.start(name):
        pass


def test_what_is_missing_is_said_in_one_message_with_the_way_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "FREE_BYTES", 1 << 60)
    with pytest.raises(LabError) as error:
        preflight.check(cache / "run" / "x")
    assert "programs are not built yet" in str(error.value)
    assert "MiB are free" in str(error.value)
    assert "KUBECONFIG" in str(error.value)


# Finding and sweeping


def test_a_lab_that_is_not_running_is_not_found(cache: Path) -> None:
    state = labs.states() / "gone"
    state.mkdir(parents=True)
    (state / "lab.json").write_text("{}")
    assert labs.find("gone") is None
    assert labs.find("never") is None
    assert labs.running() == []


def test_sweeps_dead_labs_alone(cache: Path) -> None:
    for name in ("dead", "alive", "other"):
        (labs.states() / name).mkdir(parents=True)
    for name in ("dead", "alive"):
        (labs.states() / name / MARKER).touch()
    with hold_name("alive"):
        labs.sweep()
    assert {path.name for path in labs.states().iterdir()} == {"alive", "other"}


def test_the_part_that_failed_is_quoted_and_not_those_that_gave_up_for_it() -> None:
    futures: list[Future[None]] = [Future(), Future()]
    futures[0].set_exception(Abandoned("another part of the lab failed"))
    futures[1].set_exception(LabError("etcd ended"))
    with pytest.raises(LabError, match="etcd ended"):
        first_error(futures)


# The API client, against a server that misbehaves


class FakeApi(BaseHTTPRequestHandler):
    """Not ready at first, then slow to know a kind, then full of conflicts."""

    protocol_version = "HTTP/1.1"
    patches = 0
    discoveries = 0

    def do_GET(self) -> None:
        if self.path == "/apis/example.org/v1":
            FakeApi.discoveries += 1
            known = [{"name": "things", "kind": "Thing", "namespaced": True}]
            known += [{"name": "things/status", "kind": "Thing", "namespaced": True}]
            self.reply(200, {"resources": known if FakeApi.discoveries > 2 else []})
        elif self.path.endswith("/log?tailLines=8"):
            self.reply(200, "out of cheese")
        elif self.path.endswith("/pods"):
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
            statuses = [{"name": "c", "state": waiting}]
            status = {"phase": "Running", "containerStatuses": statuses}
            self.reply(200, {"items": [{"metadata": {"name": "p"}, "status": status}]})
        else:
            self.reply(404, {"message": "no such path"})

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        FakeApi.patches += 1
        if FakeApi.patches < 3:
            self.reply(409, {"message": "conflict"})
        elif "bad" in self.path:
            self.reply(422, {"message": "spec.x: Invalid"})
        else:
            self.reply(200, {"path": self.path})

    def reply(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def api(pki: Path) -> Any:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeApi)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "apiserver.crt", pki / "apiserver.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Api(server.server_address[1], pki)
    server.shutdown()
    server.server_close()


def thing(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "example.org/v1",
        "kind": "Thing",
        "metadata": {"name": name, "namespace": "n"},
    }


def test_apply_waits_for_the_kind_and_tries_again_on_conflicts(api: Api) -> None:
    applied = api.apply(thing("good"))
    path = "/apis/example.org/v1/namespaces/n/things/good"
    assert applied["path"].startswith(f"{path}?fieldManager=")
    assert (FakeApi.patches, FakeApi.discoveries) == (3, 3)


def test_apply_says_at_once_what_is_invalid(api: Api) -> None:
    with pytest.raises(ApiError, match=r"things/bad.*spec\.x: Invalid"):
        api.apply(thing("bad"))


def test_a_wait_ends_with_the_last_state_and_the_reason(api: Api) -> None:
    with pytest.raises(
        LabError, match=r"(?s)the thing was not ready .* it does not exist.*because"
    ):
        api.wait("the thing", "/nowhere", bool, deadline_s=0.1, why=lambda: "because")


def test_pods_are_explained_with_their_reasons_and_logs(api: Api) -> None:
    said = explain_pods(api, "n")
    assert "Pod p, Running" in said
    assert "CrashLoopBackOff; back-off" in said
    assert "out of cheese" in said
