"""The client against a real API server, and against one that goes wrong."""

import contextlib
import dataclasses
import http.server
import re
import threading
import time
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml

from k8s.client import Client
from k8s.errors import (
    AlreadyExists,
    ConfigError,
    Conflict,
    Forbidden,
    Invalid,
    MissingKind,
    NotFound,
    Unauthorized,
    Unreachable,
)
from k8s.kinds import KINDS
from k8s.transport import Transport
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.apiserver import ADMIN_TOKEN, NOBODY_TOKEN, ApiServer
from tests.k8s.web_server import answering


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def deployment(name: str, replicas: int | None = None) -> dict[str, Any]:
    labels = {"app": name}
    spec: dict[str, Any] = {
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "c", "image": "example.com/none:1"}]},
        },
    }
    if replicas is not None:
        spec["replicas"] = replicas
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": spec,
    }


# What the server says, in our words


def test_create_find_list_delete(client: Client, name: str) -> None:
    client.create({**config_map(name, a="1"), "metadata": {"name": name, "labels": {"t": name}}})
    assert client.get("ConfigMap", name)["data"] == {"a": "1"}
    [listed] = client.list("ConfigMap", labels={"t": name})
    assert (listed["kind"], listed["metadata"]["name"]) == ("ConfigMap", name)
    with pytest.raises(AlreadyExists):
        client.create(config_map(name))
    client.delete("ConfigMap", name)
    assert client.find("ConfigMap", name) is None
    client.delete("ConfigMap", name)
    with pytest.raises(NotFound, match=f"ConfigMap {client.namespace}/{name} doesn't exist"):
        client.get("ConfigMap", name)


def test_list_is_read_page_by_page(
    client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.client._PAGE", "2")
    for i in range(5):
        obj = config_map(f"{name}-{i}")
        obj["metadata"]["labels"] = {"t": name}
        client.create(obj)
    listed = client.list("ConfigMap", labels={"t": name})
    assert [obj["metadata"]["name"] for obj in listed] == [f"{name}-{i}" for i in range(5)]


def test_delete_only_the_object_of_that_uid(client: Client, name: str) -> None:
    client.create(config_map(name))
    client.delete("ConfigMap", name, uid="00000000-0000-0000-0000-000000000000")
    live = client.get("ConfigMap", name)
    client.delete("ConfigMap", name, uid=live["metadata"]["uid"])
    assert client.find("ConfigMap", name) is None


def test_apply_refuses_an_unknown_field_at_once(client: Client, name: str) -> None:
    wrong = deployment(name)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Never"
    started = time.monotonic()
    with pytest.raises(Invalid, match="imagePullPolice"):
        client.apply(wrong)
    assert time.monotonic() - started < 10


def test_apply_dry_run_changes_nothing(client: Client, name: str) -> None:
    assert client.apply(config_map(name, a="1"), dry_run=True)["data"] == {"a": "1"}
    assert client.find("ConfigMap", name) is None


def test_apply_names_fields_and_their_manager(client: Client, name: str) -> None:
    client.apply(deployment(name, replicas=0), manager="kubectl")
    with pytest.raises(Conflict, match=r"\.spec\.replicas \(set by 'kubectl'\)") as error:
        client.apply(deployment(name, replicas=1))
    assert error.value.fields == {".spec.replicas": "kubectl"}
    assert client.apply(deployment(name, replicas=0), force=True)["spec"]["replicas"] == 0


def test_scale_and_patch(client: Client, name: str) -> None:
    live = client.apply(deployment(name, replicas=0))
    client.scale("Deployment", name, 2)
    assert client.get("Deployment", name)["spec"]["replicas"] == 2
    stale = {"metadata": {"resourceVersion": live["metadata"]["resourceVersion"], "labels": {}}}
    with pytest.raises(Conflict):
        client.patch("Deployment", name, {**stale, "spec": {"replicas": 0}})
    client.patch("Deployment", name, {"spec": {"replicas": 0}})
    assert client.get("Deployment", name)["spec"]["replicas"] == 0


def test_immutable_selector_is_invalid(client: Client, name: str) -> None:
    client.apply(deployment(name, replicas=0))
    changed = deployment(name, replicas=0)
    changed["spec"]["selector"]["matchLabels"]["x"] = "y"
    changed["spec"]["template"]["metadata"]["labels"]["x"] = "y"
    with pytest.raises(Invalid, match="field is immutable"):
        client.apply(changed, dry_run=True)


@pytest.mark.usefixtures("server")  # another one may have KEDA
def test_missing_crd_says_what_to_install(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests install the real one.
    missing = dataclasses.replace(KINDS["ScaledObject"], plural="notinstalled")
    monkeypatch.setitem(KINDS, "ScaledObject", missing)
    with pytest.raises(MissingKind, match=r"ScaledObject \(keda.sh/v1alpha1\). Install KEDA"):
        client.list("ScaledObject")
    with pytest.raises(MissingKind, match="Install KEDA"):
        client.find("ScaledObject", "x")


def test_missing_namespace_is_named(client: Client) -> None:
    obj = config_map("x")
    obj["metadata"]["namespace"] = "nowhere"
    for write in (client.create, client.apply):
        with pytest.raises(NotFound, match="namespace 'nowhere' doesn't exist"):
            write(obj)


def test_missing_permission_names_user_verb_and_resource(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server.kubeconfig(tmp_path / "k", NOBODY_TOKEN)
    monkeypatch.setenv("KUBECONFIG", str(path))
    nobody = Client(Transport(None), "default")
    with pytest.raises(Forbidden, match=r"'nobody' may not list deployments.apps in namespace def"):
        nobody.list("Deployment")
    with pytest.raises(Forbidden, match="'nobody' may not list nodes in the whole cluster"):
        nobody.list("Node")


def test_exceeded_quota_is_no_missing_permission(client: Client, name: str) -> None:
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    client.create(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "q", "namespace": name},
            "spec": {"hard": {"count/secrets": "0"}},
        }
    )
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": name},
    }
    deadline = time.monotonic() + 10
    with pytest.raises(Forbidden, match=r"admission rule refuses it.*exceeded quota: q"):
        while time.monotonic() < deadline:  # until the quota has its status
            try:
                client.create(secret)
                client.delete("Secret", "s", namespace=name)
            except Forbidden as error:
                if "status unknown" not in str(error):
                    raise
            time.sleep(0.2)


# Who we are


def test_wrong_token_is_one_clear_error(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "k", "wrong")))
    with pytest.raises(Unauthorized, match="accept the credentials of context 'test' of /"):
        Client(Transport(None), "default").list("Pod")


def test_token_file_is_read_again_after_its_rotation(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library reads a tokenFile once."""
    token = tmp_path / "token"
    token.write_text("expired\n")
    path = server.kubeconfig(tmp_path / "k")
    path.write_text(path.read_text().replace(f"token: {ADMIN_TOKEN}", f"tokenFile: {token}"))
    monkeypatch.setenv("KUBECONFIG", str(path))
    client = Client(Transport(None), "default")
    with pytest.raises(Unauthorized):
        client.list("ConfigMap")
    token.write_text(ADMIN_TOKEN + "\n")
    client.list("ConfigMap")


def test_the_pods_own_account_sends_its_token(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubernetes 36.0.0 sent none; a rotated one is used after a 401."""
    token = tmp_path / "token"
    token.write_text("expired\n")
    host, port = server.address.removeprefix("https://").split(":")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    where = "kubernetes.config.incluster_config.SERVICE_"
    monkeypatch.setattr(where + "TOKEN_FILENAME", str(token))
    monkeypatch.setattr(where + "CERT_FILENAME", str(server.authority))
    client = Client(Transport(None), "default")
    with pytest.raises(Unauthorized, match="the Pod's own account"):
        client.list("ConfigMap")
    token.write_text(ADMIN_TOKEN + "\n")
    client.list("ConfigMap")


# A server that goes wrong


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_waited_for(
    faulty: Client, faults: FaultyApi, name: str, status: int
) -> None:
    faults.add(Fault(f"POST .*/configmaps|GET .*/{name}|PATCH|DELETE", times=2, status=status))
    faulty.create(config_map(name, a="1"))
    faults.add(Fault(f"GET .*/{name}", times=2, status=status))
    assert faulty.get("ConfigMap", name)["data"] == {"a": "1"}
    faults.add(Fault("DELETE", times=2, status=status))
    faulty.delete("ConfigMap", name)
    assert faulty.find("ConfigMap", name) is None


def test_retry_after_is_honoured(faulty: Client, faults: FaultyApi) -> None:
    faults.add(Fault("GET .*/configmaps", status=429, retry_after_s=1))
    started = time.monotonic()
    faulty.list("ConfigMap")
    assert 1.0 <= time.monotonic() - started < 10


def test_create_whose_answer_is_lost_is_recognised(
    faulty: Client, faults: FaultyApi, name: str
) -> None:
    faults.add(Fault("POST .*/configmaps", lost=True))
    assert faulty.create(config_map(name, a="1"))["metadata"]["uid"]
    assert len(faults.seen("POST")) == 2


def test_lost_answer_and_another_ones_object_is_a_conflict(
    faulty: Client, client: Client, faults: FaultyApi, name: str
) -> None:
    client.create(config_map(name, a="theirs"))
    faults.add(Fault("POST .*/configmaps", lost=True))
    with pytest.raises(AlreadyExists):
        faulty.create(config_map(name, a="ours"))


def test_replace_whose_answer_is_lost_is_recognised(
    faulty: Client, faults: FaultyApi, name: str
) -> None:
    obj = faulty.create(config_map(name, a="1"))
    obj["data"] = {"a": "2"}
    obj["metadata"].pop("managedFields", None)
    faults.add(Fault("PUT", lost=True))
    assert faulty.replace(obj)["data"] == {"a": "2"}


def test_a_write_under_a_lease_is_given_up_in_time(
    faulty: Client, faults: FaultyApi, name: str
) -> None:
    faults.add(Fault("PATCH", times=1000, status=503))
    started = time.monotonic()
    with pytest.raises(Unreachable, match="tried for"):
        faulty.within(1.0).apply(config_map(name))
    assert time.monotonic() - started < 10
    assert len(faults.seen("PATCH")) > 1


@pytest.mark.parametrize(
    ("retry_after_s", "tried"), [(30, "tried once as"), (None, r"tried for \d\.\d s as")]
)
def test_a_server_that_stays_busy_is_described_once(
    faulty: Client, faults: FaultyApi, retry_after_s: int | None, tried: str
) -> None:
    faults.add(Fault("GET", times=100, status=503, retry_after_s=retry_after_s))
    with pytest.raises(Unreachable, match=tried) as error:
        faulty.within(3.0).list("ConfigMap")
    assert str(error.value).count("HTTP status 503") == 1


def test_delete_whose_answer_is_lost_is_done(faulty: Client, faults: FaultyApi, name: str) -> None:
    faulty.create(config_map(name))
    faults.add(Fault("DELETE", lost=True))
    faulty.delete("ConfigMap", name)
    assert faulty.find("ConfigMap", name) is None
    assert len(faults.seen("DELETE")) == 2


def test_delete_that_is_refused_is_not_done(faulty: Client, faults: FaultyApi, name: str) -> None:
    live = faulty.create(config_map(name))
    for uid in (None, live["metadata"]["uid"]):
        faults.add(Fault("DELETE", status=409))
        with pytest.raises(Conflict):
            faulty.delete("ConfigMap", name, uid=uid)


def test_apply_survives_conflicts_of_the_server_with_itself(
    faulty: Client, faults: FaultyApi, name: str
) -> None:
    faults.add(Fault("PATCH", times=3, status=409))
    assert faulty.apply(config_map(name, a="1"))["data"] == {"a": "1"}


def test_cut_in_the_middle_of_an_answer(faulty: Client, faults: FaultyApi, name: str) -> None:
    faulty.create(config_map(name, a="x" * 5000))
    faults.add(Fault(f"GET .*/{name}", cut_after=3000))
    assert len(faulty.get("ConfigMap", name)["data"]["a"]) == 5000


def test_no_server_there_is_said_at_once(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server.kubeconfig(tmp_path / "k", server="https://127.0.0.1:1")
    monkeypatch.setenv("KUBECONFIG", str(path))
    started = time.monotonic()
    with pytest.raises(
        Unreachable, match=r"at https://127.0.0.1:1: no connection \(Connection refused\).*'test'"
    ):
        Client(Transport(None), "default").list("Pod")
    assert time.monotonic() - started < 5


def test_certificate_of_another_cluster(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server.kubeconfig(tmp_path / "k")
    other = tmp_path / "other.crt"
    other.write_text(Path(certifi.where()).read_text())
    path.write_text(path.read_text().replace(str(server.authority), str(other)))
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ConfigError, match=r"certificate isn't accepted.*context 'test'"):
        Client(Transport(None), "default").list("Pod")


def test_an_answer_that_trickles_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read timeout is for each read: it never ends that."""
    over = threading.Event()

    class Trickle(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    self.wfile.write(b" ")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # Without a deadline the answer ends, too late, by a cut; else this test would hang.
    cut = threading.Timer(20, over.set)
    cut.start()
    try:
        kubeconfig = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c"}}],
            "clusters": [
                {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
            ],
        }
        (tmp_path / "k").write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
        with pytest.raises(Unreachable, match="the answer has no end after 1 s"):
            Client(Transport(None), "default", budget_s=1.0).list("ConfigMap")
    finally:
        cut.cancel()
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "headers", "error", "said"),
    [
        (200, b"{}", {}, ConfigError, "'{}'"),
        (200, b"[]", {}, ConfigError, r"'\[\]'"),
        (200, b"<html>Hello</html>", {}, ConfigError, "'<html>Hello</html>'"),
        (302, b"", {"Location": "https://login.example.com/"}, ConfigError, ".* see https://login"),
        (403, b"<html>\nNo\n</html>", {}, ConfigError, "HTTP status 403: <html> No </html>"),
        (404, b"404 page not found\n", {}, ConfigError, "HTTP status 404: 404 page not found"),
        (404, b'{"detail":"Not Found"}', {}, ConfigError, "HTTP status 404: {"),
        (500, b"<html>Oops</html>", {}, Unreachable, "HTTP status 500: <html>Oops</html>"),
    ],
)
def test_what_is_no_api_server_is_called_so_at_once(
    status: int,
    body: bytes,
    headers: dict[str, str],
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "k"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("k8s.transport.FIRST_RETRY_S", 0.5)
    with answering(path, status, body, headers) as address:
        client = Client(Transport(None), "default")
        for ask in (
            lambda: client.find("ConfigMap", "x"),
            lambda: client.list("ConfigMap"),
            lambda: client.apply(config_map("x")),
        ):
            started = time.monotonic()
            with pytest.raises(
                error, match=f"answers at {address} is no Kubernetes API server: .* says {said}"
            ) as refused:
                ask()
            assert time.monotonic() - started < 15, "not tried as long as a server that was there"
            assert f"from context 'lab' of {path}: correct `server`" in str(refused.value)
            assert "\n" not in str(refused.value)


def test_a_load_balancer_may_speak_for_a_server_that_was_there(
    faulty: Client, faults: FaultyApi
) -> None:
    faults.add(Fault("GET", status=503, body=b"<html>no backend</html>"))
    faulty.list("ConfigMap")
    faults.add(Fault("GET", times=100, status=503, body=b"<html>no backend</html>"))
    with pytest.raises(Unreachable, match="HTTP status 503: <html>no backend</html>") as error:
        faulty.within(1.0).list("ConfigMap")
    assert "no Kubernetes API server" not in str(error.value)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_a_server_behind_it_is_called_so(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
    monkeypatch.setattr("k8s.transport.FIRST_RETRY_S", 0.5)
    with answering(tmp_path / "k", status, b"no upstream") as address:
        told = f"{address} is a proxy or load balancer, with no API server behind it .*{status}: no"
        with pytest.raises(Unreachable, match=told) as error:
            Client(Transport(None), "default").list("ConfigMap")
    assert "no Kubernetes API server" not in str(error.value)


def test_https_to_a_server_of_http_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "k"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("k8s.transport.FIRST_RETRY_S", 0.5)
    with answering(path, 200, b"{}"):
        path.write_text(path.read_text().replace("http://", "https://"))
        with pytest.raises(Unreachable, match="the server speaks http at this port, not https"):
            Client(Transport(None), "default").list("ConfigMap")


# An outage


def test_an_outage_is_said_once_and_waited_for_once(
    faulty: Client,
    faults: FaultyApi,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("k8s.transport.RETRY_S", 4.0)
    monkeypatch.setattr("k8s.transport.FIRST_RETRY_S", 0.5)
    monkeypatch.setattr("k8s.transport.SILENT_S", 0.5)
    patient = faulty.within(4.0)
    patient.list("ConfigMap")
    away = Fault("GET", times=1000, status=503, retry_after_s=1)
    faults.add(away)
    with pytest.raises(Unreachable, match="tried for"):
        patient.list("ConfigMap")
    with pytest.raises(Unreachable, match="tried once"):
        patient.list("ConfigMap")
    [said] = caplog.messages
    assert said.startswith(f"the API server at {faults.address} doesn't answer: list ConfigMap")
    assert re.search(r"HTTP status 503: .*; trying for [34] s more$", said)
    away.times = 0
    patient.list("ConfigMap")
    faults.add(Fault("GET", times=1, status=503, retry_after_s=1))
    patient.list("ConfigMap")  # it was there again, so it is waited for again
    assert len(caplog.messages) == 2


def test_an_answer_that_does_not_come_is_said(
    faulty: Client,
    faults: FaultyApi,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("k8s.transport.SILENT_S", 0.3)
    faults.add(Fault("GET", delay_s=2))
    faulty.list("ConfigMap")
    [said] = caplog.messages
    assert "doesn't answer: list ConfigMap" in said
    assert "no whole answer yet; trying for" in said


# Watches


def changes(client: Client, name: str, **options: Any) -> list[str]:
    """The values of data.a that a watch of the ConfigMap shows, until it is "last"."""
    seen: list[str] = []
    for obj in client.watch("ConfigMap", name=name, timeout_s=20, **options):
        value = obj["data"]["a"] if obj else "absent"
        if not seen or seen[-1] != value:
            seen.append(value)
        if value == "last":
            break
    return seen


def later(*steps: Any) -> threading.Thread:
    """Run the steps one after the other, 0.3 s apart, beside the test."""

    def run() -> None:
        for step in steps:
            time.sleep(0.3)
            step()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_watch_shows_creation_change_and_deletion(client: Client, name: str) -> None:
    steps = later(
        lambda: client.create(config_map(name, a="1")),
        lambda: client.patch("ConfigMap", name, {"data": {"a": "2"}}),
        lambda: client.delete("ConfigMap", name),
        lambda: client.create(config_map(name, a="last")),
    )
    assert changes(client, name) == ["absent", "1", "2", "absent", "last"]
    steps.join()


def test_watch_of_several_by_label(client: Client, name: str) -> None:
    def make(i: int) -> None:
        obj = config_map(f"{name}-{i}")
        obj["metadata"]["labels"] = {"t": name}
        client.create(obj)

    steps = later(lambda: make(1), lambda: make(2), lambda: client.delete("ConfigMap", f"{name}-1"))
    seen = []
    for obj in client.watch("ConfigMap", labels={"t": name}, timeout_s=10):
        seen.append(obj["metadata"]["name"] if obj else None)
        if len(seen) == 4:
            break
    assert seen == [None, f"{name}-1", f"{name}-2", None]
    steps.join()


def test_watch_ends_in_time_and_repeats_the_state(client: Client, name: str) -> None:
    client.create(config_map(name, a="1"))
    started = time.monotonic()
    states = list(client.watch("ConfigMap", name=name, timeout_s=1.4, window_s=1))
    assert 1 <= time.monotonic() - started < 5
    assert len(states) >= 2


def test_watch_spares_a_server_that_asks_for_more_time_than_there_is(
    faulty: Client, client: Client, faults: FaultyApi, name: str
) -> None:
    client.create(config_map(name, a="1"))
    faults.add(Fault("GET .*watch=true", times=1000, status=429, retry_after_s=30))
    states = []
    for obj in faulty.watch("ConfigMap", name=name, timeout_s=3.0):
        states.append(obj and obj["data"]["a"])
        client.patch("ConfigMap", name, {"data": {"a": "2"}})
    assert len(faults.seen("watch=true")) == 1
    assert states == ["1", "2"], "the last one is never missed"


def test_watch_says_that_the_server_is_away_at_its_end(faulty: Client, faults: FaultyApi) -> None:
    with faults.away(), pytest.raises(Unreachable):
        list(faulty.watch("ConfigMap", timeout_s=0.5))


@pytest.mark.parametrize("status", [410, 429, 500])
def test_watch_lists_again_after(
    faulty: Client, client: Client, faults: FaultyApi, name: str, status: int
) -> None:
    faults.add(Fault("GET .*watch=true", times=2, status=status))
    steps = later(
        lambda: client.create(config_map(name, a="1")),
        lambda: client.patch("ConfigMap", name, {"data": {"a": "last"}}),
    )
    assert changes(faulty, name)[-1] == "last"
    assert len(faults.seen("GET .*configmaps.*limit")) >= 3
    steps.join()


def test_watch_survives_cuts(faulty: Client, client: Client, faults: FaultyApi, name: str) -> None:
    steps = later(
        lambda: client.create(config_map(name, a="1")),
        faults.cut,
        lambda: client.patch("ConfigMap", name, {"data": {"a": "2"}}),
        faults.cut,
        lambda: client.patch("ConfigMap", name, {"data": {"a": "last"}}),
    )
    assert changes(faulty, name) == ["absent", "1", "2", "last"]
    steps.join()


def test_watch_notices_a_half_open_connection(
    faulty: Client, client: Client, faults: FaultyApi, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes on without us, and never closes."""
    monkeypatch.setattr("k8s.client._GRACE_S", 1.0)
    steps = later(
        lambda: client.create(config_map(name, a="1")),
        faults.freeze,
        lambda: client.patch("ConfigMap", name, {"data": {"a": "last"}}),
    )
    started = time.monotonic()
    assert changes(faulty, name, window_s=1) == ["absent", "1", "last"]
    assert time.monotonic() - started < 8
    steps.join()


def test_watch_survives_a_server_that_is_away(
    faulty: Client, client: Client, faults: FaultyApi, name: str
) -> None:
    client.create(config_map(name, a="1"))

    def outage() -> None:
        with faults.away():
            client.patch("ConfigMap", name, {"data": {"a": "last"}})
            time.sleep(1)

    steps = later(outage)
    assert changes(faulty, name) == ["1", "last"]
    steps.join()
