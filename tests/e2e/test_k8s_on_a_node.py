"""k8s/ with a real kubelet and containers, as the pipeline's own account."""

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from k8s import logs
from k8s.client import Client
from k8s.errors import JobFailed, PodUnreachable
from k8s.jobs import run_job
from k8s.manifests.pod import container_security, pod_security
from k8s.manifests.release import JOBS_ACCOUNT
from k8s.pod_http import get_text, pod_connection
from k8s.transport import Transport
from k8s.wait import wait
from tests.e2e.conftest import Target
from tests.k8s import api_faults

pytestmark = pytest.mark.cluster

Obj = dict[str, Any]
MARK = {"test": "k8s-on-a-node"}


@pytest.fixture
def client(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("KUBECONFIG", str(target.kubeconfig))
    client = Client(Transport(None), target.cluster.namespace)
    yield client
    for job in client.list("Job", labels=MARK):
        client.delete("Job", job["metadata"]["name"])


def pod_spec(target: Target, code: str, memory: str = "256Mi", restart: str = "Never") -> Obj:
    return {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 1,
        "serviceAccountName": JOBS_ACCOUNT,
        "automountServiceAccountToken": False,
        "securityContext": pod_security(),
        "containers": [
            {
                "name": "main",
                "image": target.cluster.images.jobs,
                "imagePullPolicy": target.cluster.images.pull_policy,
                "command": ["python", "-u", "-c", code],
                "resources": {"limits": {"memory": memory}},
                "securityContext": container_security(),
            }
        ],
    }


def job(target: Target, code: str, **options: str) -> Obj:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"test-{uuid.uuid4().hex[:8]}", "labels": MARK},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": 120,
            "template": {"metadata": {"labels": MARK}, "spec": pod_spec(target, code, **options)},
        },
    }


@pytest.fixture
def pod(target: Target) -> Iterator[Any]:
    """Makes Pods as the administrator: the pipeline's account may not."""
    made: list[str] = []

    def make(code: str, restart: str = "Never") -> str:
        name = f"test-{uuid.uuid4().hex[:8]}"
        spec = pod_spec(target, code, restart=restart)
        obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        target.kubectl("-n", target.cluster.namespace, "create", "-f", "-", stdin=json.dumps(obj))
        made.append(name)
        return name

    yield make
    for name in made:
        target.kubectl("-n", target.cluster.namespace, "delete", "pod", name, "--wait=false")


def test_every_line_of_a_real_log(target: Target, client: Client) -> None:
    """Also lines that the container runtime splits, and a last one without its end."""
    code = """if 1:
        import json
        for i in range(3000):
            print(json.dumps({"event": "progress", "i": i}))
        print(json.dumps({"event": "progress", "i": 3000, "long": "x" * 50000}))
        print(json.dumps({"event": "result"}), end="")
    """
    wanted = job(target, code)
    events: list[Obj] = []
    result = run_job(client, wanted, deadline_s=60, on_event=events.append)
    assert [event.get("i") for event in result.events] == [*range(3001), None]
    again = run_job(client, wanted, deadline_s=60, on_event=events.append)
    assert again.pod == result.pod, "adopted"
    assert again.events == result.events


def test_out_of_memory(target: Target, client: Client) -> None:
    code = "x = []\nwhile True: x.append(bytearray(10**7))"
    with pytest.raises(JobFailed, match=r"out of memory \(OOMKilled\); the memory limit .* 128Mi"):
        run_job(client, job(target, code, memory="128Mi"), deadline_s=60, on_event=print)


def test_bad_network_to_the_api(target: Target, tmp_path: Path, client: Client) -> None:
    """Cut and half-open connections, 429, 500, a lost answer: one Job, all its events."""
    code = """if 1:
        import json, time
        for i in range(60):
            print(json.dumps({"event": "progress", "i": i}))
            time.sleep(0.1)
        print(json.dumps({"event": "result"}))
    """
    wanted = job(target, code)
    with (
        api_faults.before(target.kubeconfig) as faults,
        pytest.MonkeyPatch.context() as patch,
    ):
        path = api_faults.kubeconfig_through(faults, target.kubeconfig, tmp_path / "proxied")
        patch.setenv("KUBECONFIG", str(path))
        patch.setattr("k8s.logs._SILENCE_S", 2.0)
        through = Client(Transport(None), client.namespace)
        through.list("Job")
        faults.add(
            api_faults.Fault("POST .*/jobs", lost=True),
            api_faults.Fault("GET .*/pods", status=429, retry_after_s=1),
            api_faults.Fault("GET .*/jobs/", times=2, status=500),
        )

        def disturb(event: Obj) -> None:
            if event.get("i") in (10, 30):
                faults.cut()
            if event.get("i") == 20:
                faults.freeze()

        result = run_job(through, wanted, deadline_s=90, on_event=disturb)
        assert [event.get("i") for event in result.events] == [*range(60), None]
        assert len(faults.seen("/log.*follow")) >= 4
    assert len(client.list("Job", labels=MARK)) == 1


def test_http_through_the_port_forward(client: Client, pod: Any) -> None:
    code = """if 1:
        import http.server
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self):
                body = (self.headers["Authorization"] or "").encode() + b"x" * int(self.path[1:])
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
        http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
    """
    name = pod(code)
    deadline = time.monotonic() + 30
    while True:
        try:
            get_text(client, name, 8000, "/0", timeout_s=2)
            break
        except PodUnreachable:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    with pod_connection(client, name, 8000, timeout_s=10) as connection:
        connection.request("GET", "/1000000", headers={"Authorization": "Bearer key"})
        text = connection.getresponse().read().decode()
    assert text == "Bearer key" + "x" * 1_000_000
    with ThreadPoolExecutor(8) as pool:
        sizes = [1000 * i for i in range(24)]
        answers = pool.map(lambda n: get_text(client, name, 8000, f"/{n}", timeout_s=20), sizes)
        assert [len(answer) for answer in answers] == sizes
    with pytest.raises(PodUnreachable, match=f"{name} port 9: .*connection refused"):
        get_text(client, name, 9, "/", timeout_s=5)


def test_log_of_the_run_before_the_restart(client: Client, pod: Any) -> None:
    name = pod("import time; print('why it died', flush=True); time.sleep(1); exit(3)", "Always")
    assert list(logs.follow(client, name, "main", deadline_s=30)) == ["why it died"]

    def restarted(obj: Obj | None) -> bool:
        status = logs.container_status(obj or {}, "main")
        return bool(status.get("restartCount"))

    wait(client, "Pod", name, until=restarted, deadline_s=60, state=lambda obj: str(bool(obj)))
    assert logs.tail(client, name, "main", 5, previous=True) == ["why it died"]
