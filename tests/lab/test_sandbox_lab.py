"""Whole labs: what runs on them works, two stand side by side, and nothing is left of them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import lab as labs
from lab.kubernetes.sandbox import cgroup_of
from tests.lab.traces import Traces

ROOT = Path(__file__).parents[2]
START_SECONDS = 300

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.getuid() != 0, reason="a lab needs root"),
    pytest.mark.timeout(600),
]

WORKLOADS = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: gpu, namespace: default}
spec:
  replicas: 3
  selector: {matchLabels: {app: gpu}}
  template:
    metadata: {labels: {app: gpu}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: c
        image: lab.local/vllm-simulator:1
        imagePullPolicy: Never
        command:
        - sh
        - -c
        - >-
          nvidia-smi --query-gpu=name,uuid,memory.used --format=csv,noheader;
          python -c "import urllib.request as u; print(u.urlopen('http://hub.lab.svc:8880/api/models/lab/tiny').status)";
          exec python -m http.server 8000
        ports: [{name: http, containerPort: 8000}]
        readinessProbe: {tcpSocket: {port: http}, periodSeconds: 1}
        resources: {limits: {nvidia.com/gpu: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: gpu, namespace: default}
spec: {selector: {app: gpu}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: scaled, namespace: default}
spec:
  selector: {matchLabels: {app: scaled}}
  template:
    metadata: {labels: {app: scaled}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: "lab.local/pause:1", imagePullPolicy: Never, ports: [{name: http, containerPort: 80}]}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata: {name: scaled, namespace: default}
spec:
  selector: {matchLabels: {app: scaled}}
  podMetricsEndpoints: [{port: http}]
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {name: scaled, namespace: default}
spec:
  scaleTargetRef: {name: scaled}
  minReplicaCount: 1
  maxReplicaCount: 2
  triggers:
  - type: prometheus
    metadata:
      serverAddress: http://prometheus-operated.monitoring.svc:9090
      query: count(up{container="c", namespace="default"}) * 10
      threshold: "5"
"""  # noqa: E501


@dataclass
class Running:
    """A lab in a process of its own, as `make lab` runs it."""

    name: str
    process: subprocess.Popen[str]
    output: Path

    @property
    def lab(self) -> labs.Lab:
        found = labs.find(self.name)
        assert found is not None, self.output.read_text()
        return found

    def traces(self) -> Traces:
        state = self.lab.state
        (init,) = (
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if self._is_init(path, state)
        )
        return Traces.of(init, state, cgroup_of(self.name))

    @staticmethod
    def _is_init(path: Path, state: Path) -> bool:
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            return False
        return (
            b"lab.kubernetes.init" in words
            and words[0] != b"unshare"
            and (str(state).encode() in words)
        )

    def kubectl(self, *arguments: str, stdin: str | None = None, promoter: bool = False) -> str:
        lab = self.lab
        config = lab.promoter_kubeconfig if promoter else lab.kubeconfig
        argv = [str(lab.kubectl), f"--kubeconfig={config}", *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))


def up(name: str, folder: Path) -> Running:
    output = folder / f"{name}.log"
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lab", "up", "--gpus", "2", "--name", name],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            text=True,
        )
    return Running(name, process, output)


def wait_until_up(running: Running) -> None:
    end = time.monotonic() + START_SECONDS
    while labs.find(running.name) is None:
        assert running.process.poll() is None, running.output.read_text()
        assert time.monotonic() < end, running.output.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    folder = tmp_path_factory.mktemp("labs")
    pair = (up(f"test-a-{os.getpid()}", folder), up(f"test-b-{os.getpid()}", folder))
    try:
        for running in pair:
            wait_until_up(running)
        yield pair
    finally:
        for running in pair:
            running.process.terminate()
            running.process.wait(timeout=60)


def test_what_runs_on_a_lab_works(two: tuple[Running, Running]) -> None:
    """Pods, Services, DNS, GPUs, the hub, Prometheus by PodMonitor, KEDA and HPA, in one go."""
    lab, _ = two
    lab.kubectl("apply", "--server-side", "-f", "-", stdin=WORKLOADS)
    wait_for(lambda: lab.get("deploy", "gpu", "-n", "default")["status"].get("readyReplicas") == 2)
    pods = lab.get("pods", "-n", "default", "-l", "app=gpu")["items"]
    logs = [
        lab.kubectl("logs", "-n", "default", pod["metadata"]["name"]).splitlines()
        for pod in pods
        if pod["status"]["phase"] == "Running"
    ]
    assert {line.split(", ")[0] for line, *_ in logs} == {"NVIDIA L4 SIMULATED"}
    assert len({line.split(", ")[1] for line, *_ in logs}) == 2, "both Pods see the same GPU"
    assert [lines[1] for lines in logs] == ["200", "200"], "the hub does not answer in a Pod"
    (waiting,) = (pod for pod in pods if pod["status"]["phase"] == "Pending")
    assert "Insufficient nvidia.com/gpu" in waiting["status"]["conditions"][0]["message"]
    # One Pod of the scaled Deployment is scraped and counts 10 against a threshold of 5 each.
    wait_for(lambda: lab.get("deploy", "scaled", "-n", "default")["status"]["replicas"] == 2)
    scaler = lab.get("hpa", "-n", "default")["items"][0]
    assert scaler["status"]["currentMetrics"], "the HPA has no external metric"
    found = query(lab.lab.prometheus, 'count(up{namespace="default"})')
    assert found["data"]["result"], "Prometheus does not scrape by PodMonitor"


def test_the_pipelines_account_has_its_rights_alone(two: tuple[Running, Running]) -> None:
    lab, _ = two

    def may(*what: str) -> bool:
        config = f"--kubeconfig={lab.lab.promoter_kubeconfig}"
        argv = [str(lab.lab.kubectl), config, "auth", "can-i", *what]
        return subprocess.run(argv, capture_output=True, timeout=60).returncode == 0

    assert may("patch", "deployments.apps", "-n", "llm")
    assert not may("get", "secrets", "-n", "kube-system")
    assert not may("delete", "nodes")


def test_the_claim_of_the_weights_is_bound(two: tuple[Running, Running]) -> None:
    claim = two[0].get("pvc", "model-weights", "-n", "llm")
    assert claim["status"]["phase"] == "Bound"


def test_the_hub_answers_on_loopback(two: tuple[Running, Running]) -> None:
    with urllib.request.urlopen(f"{two[0].lab.hub}/api/models/lab/tiny", timeout=10) as answer:
        assert json.load(answer)["id"] == "lab/tiny"


def test_the_same_name_twice_is_refused(two: tuple[Running, Running]) -> None:
    done = command("up", "--name", two[0].name)
    assert done.returncode == 1
    assert f"a lab named '{two[0].name}' is running already" in done.stderr
    assert "make lab LAB=" in done.stderr and "--name" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_and_env_name_the_running_labs(two: tuple[Running, Running]) -> None:
    said = command("status").stdout
    assert all(f"lab '{running.name}'" in said for running in two)
    assert str(two[0].lab.promoter_kubeconfig) in command("env", "--name", two[0].name).stdout


def test_sigkill_of_one_leaves_nothing_and_the_other_alone(two: tuple[Running, Running]) -> None:
    killed, other = two
    traces = killed.traces()
    assert traces.left()
    killed.process.kill()
    killed.process.wait(timeout=10)
    traces.wait_until_gone(30)
    assert labs.find(killed.name) is None
    assert len(other.get("nodes")["items"]) == 1


def test_sigterm_leaves_nothing(two: tuple[Running, Running]) -> None:
    _, lab = two
    traces = lab.traces()
    lab.process.terminate()
    assert lab.process.wait(timeout=60) == 0, lab.output.read_text()
    assert traces.left() == []
    assert "Traceback" not in lab.output.read_text()


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = command("up", "--name", "test-port", "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 can't be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (labs.states() / "test-port").exists()


def test_a_component_that_fails_is_named_and_everything_ends(tmp_path: Path) -> None:
    """Its own words are quoted."""
    code = (
        "from lab.kubernetes import components\n"
        "from lab import lab as labs\n"
        "whole = components.api_server\n"
        "components.api_server = lambda node: [*whole(node), '--no-such-flag']\n"
        "with labs.start('test-broken'):\n"
        "    pass\n"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "kube-apiserver ended with status" in done.stderr
    assert "unknown flag: --no-such-flag" in done.stderr
    assert not (labs.states() / "test-broken").exists()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "lab", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


def wait_for(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.3)


def query(prometheus: str, promql: str) -> Any:
    url = f"{prometheus}/api/v1/query?query={urllib.parse.quote(promql)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)
