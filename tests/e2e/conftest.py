"""A real cluster for the end-to-end tests: a lab of its own, or the one that KUBECONFIG names."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog, load_catalog
from lab import lab as labs
from lab.lab import Lab

ROOT = Path(__file__).parents[2]
PRODUCT = ("assets", "catalog", "k8s", "loadtests", "pipelines", "weights")
MODEL = "smollm2-135m"
DEADLINE_S = 240


@dataclass
class Run:
    """A finished `dagster` command."""

    status: int
    output: str
    seconds: float
    folder: Path | None

    @property
    def id(self) -> str:
        assert self.folder is not None, self.output[-4000:]
        return self.folder.name

    def stage(self, name: str) -> dict[str, Any]:
        assert self.folder is not None, self.output[-4000:]
        lines = (self.folder / "stages.jsonl").read_text().splitlines()
        found = [s for s in map(json.loads, lines) if s["stage"] == name]
        assert len(found) == 1, lines
        return dict(found[0])


@dataclass
class Target:
    """A cluster, and a shell that is set up to promote to it."""

    lab: Lab
    kubeconfig: Path
    cluster: ClusterSpec
    home: Path
    model_name: str = MODEL
    checkout: Path = ROOT
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> ModelSpec:
        return load_catalog(self.checkout / "catalog").model(self.model_name)

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "KUBECONFIG": str(self.kubeconfig),
            "PROMOTION_CLUSTER": self.cluster.name,
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_DISABLE_TELEMETRY": "1",
        } | self.extra  # fmt: skip

    def without_home(self) -> dict[str, str]:
        return {k: v for k, v in self.environment().items() if k != "DAGSTER_HOME"}

    def kubectl(self, *args: str, check: bool = True, stdin: str | None = None) -> str:
        """kubectl as the cluster's administrator."""
        done = subprocess.run(
            [str(self.lab.kubectl), "--kubeconfig", str(self.lab.kubeconfig), *args],
            capture_output=True, text=True, timeout=90, check=False, input=stdin,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        out = self.kubectl(
            "-n", self.cluster.namespace, "get", kind, name, "-o", "json", "--ignore-not-found"
        )
        return dict(json.loads(out)) if out else None

    def start(
        self,
        job: str = "promote",
        *,
        revision: str | None = None,
        partition: str | None = "",
        config: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).parent / "dagster"), "job", "execute"]
        command += ["-m", "pipelines.definitions", "-j", job]
        if partition is not None:
            tags = {"dagster/partition": partition or self.model_name}
            command += ["--tags", json.dumps(tags)]
        if revision is not None:
            chosen = {"model_revision": {"config": {"revision": revision}}}
            config = {**(config or {}), "ops": {**(config or {}).get("ops", {}), **chosen}}
        if config is not None:
            file = self.home / f"config-{len(list(self.home.glob('config-*')))}.yaml"
            file.write_text(json.dumps(config))
            command += ["--config", str(file)]
        return self.spawn(command, environment)

    def spawn(
        self, command: list[str], environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=self.checkout, env=environment or self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def finish(self, process: "subprocess.Popen[str]", deadline_s: float = DEADLINE_S) -> Run:
        started = time.monotonic()
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"no end after {deadline_s} s:\n{output[-6000:]}")
        ids = re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", output)
        folders = [f for i in dict.fromkeys(ids) for f in (self.home / "reports").glob(f"*/{i}")]
        folder = folders[0] if folders else None
        return Run(process.returncode, output, time.monotonic() - started, folder)

    def read_until(self, process: "subprocess.Popen[str]", text: str) -> str:
        """What the command prints up to the first line with `text`."""
        assert process.stdout is not None
        deadline = time.monotonic() + 150
        seen = []
        for line in process.stdout:
            seen.append(line)
            if text in line or time.monotonic() > deadline:
                break
        assert seen and text in seen[-1], "".join(seen[-30:])
        return "".join(seen)

    def promote(
        self, revision: str | None = None, deadline_s: float = DEADLINE_S, **options: Any
    ) -> Run:
        return self.finish(self.start(revision=revision, **options), deadline_s)

    def live_slot(self) -> str | None:
        service = self.get("service", self.model.object_name)
        slot = service["spec"]["selector"].get("vllm-promotion.io/slot") if service else None
        return None if slot is None else str(slot)

    def live_commit(self) -> str | None:
        slot = self.live_slot()
        deployment = self.get("deployment", f"{self.model.object_name}-{slot}") if slot else None
        if deployment is None:
            return None
        return str(deployment["metadata"]["annotations"]["vllm-promotion.io/commit"])

    def lease_holder(self) -> str:
        lease = self.get("lease", f"promotion-{self.model.object_name}")
        return str((lease or {}).get("spec", {}).get("holderIdentity") or "")

    def record(self, key: str = "current") -> dict[str, Any] | None:
        """The record of what is live ("current") or was ("previous")."""
        config = self.get("configmap", f"promotion-record-{self.model.object_name}")
        text = ((config or {}).get("data") or {}).get(key)
        return None if text is None else dict(json.loads(text))

    @contextmanager
    def when_moved(self, act: Callable[[], object]) -> Iterator[None]:
        """Calls `act`, from another thread, as soon as the Service selects another slot."""
        argv = [str(self.lab.kubectl), "--kubeconfig", str(self.lab.kubeconfig)]
        argv += ["-n", self.cluster.namespace, "get", "service", self.model.object_name, "--watch"]
        argv += ["-o", r'jsonpath={.spec.selector.vllm-promotion\.io/slot}{"\n"}']
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines = watching.stdout
            before = lines.readline()

            def look() -> None:
                if any(line != before for line in lines):
                    act()

            looking = threading.Thread(target=look)
            looking.start()
            try:
                yield
            finally:
                watching.terminate()
                looking.join(10)

    def answers(self) -> bool:
        """Whether the live Service has a ready Pod behind it."""
        out = self.kubectl(
            "-n", self.cluster.namespace, "get", "endpointslices", "-o", "json",
            "-l", f"kubernetes.io/service-name={self.model.object_name}",
        )  # fmt: skip
        endpoints = [e for s in json.loads(out)["items"] for e in s.get("endpoints") or []]
        return any(e.get("conditions", {}).get("ready") for e in endpoints)

    def state(self) -> dict[str, str]:
        """What a promotion could have changed, as hashes of specs by kind and name."""
        kinds = "deploy,service,scaledobject,pdb,job,configmap,networkpolicy,podmonitor"
        out = self.kubectl("-n", self.cluster.namespace, "get", kinds, "-o", "json")
        return {
            f"{o['kind']}/{o['metadata']['name']}": hashlib.sha256(
                json.dumps([o.get("spec"), o.get("data")], sort_keys=True).encode()
            ).hexdigest()
            for o in json.loads(out)["items"]
        }


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The lab, with the simulator; KUBECONFIG and PROMOTION_CLUSTER name another cluster."""
    home = tmp_path_factory.mktemp("dagster_home")
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    given = os.environ.get("KUBECONFIG")
    if given:
        cluster = catalog().cluster(os.environ.get("PROMOTION_CLUSTER", "lab"))
        yield Target(somewhere(Path(given)), Path(given), cluster, home)
        return
    with labs.start("e2e") as lab:
        yield Target(lab, lab.promoter_kubeconfig, catalog().cluster("lab"), home)


@pytest.fixture(scope="module")
def planted(target: Target) -> None:
    """For tests of the revisions and faults that only the lab's hub and simulator have."""
    if "engine" not in target.cluster.simulated:
        pytest.skip(f"only the lab has what this test promotes, and this is {target.cluster.name}")


def served(target: Target) -> dict[str, str]:
    """What the live Service says of its models and adapters: name -> where it was loaded from."""
    path = f"/api/v1/namespaces/{target.cluster.namespace}/services/{target.model.object_name}"
    answer = json.loads(target.kubectl("get", "--raw", f"{path}:8000/proxy/v1/models"))
    return {model["id"]: model["root"] for model in answer["data"]}


def edit(path: Path, old: str, new: str) -> None:
    """In a checkout's file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def somewhere(kubeconfig: Path) -> Lab:
    """The cluster of a kubeconfig: a lab that runs, or kubectl as its administrator and no more."""
    for lab in labs.running():
        if kubeconfig in (lab.kubeconfig, lab.promoter_kubeconfig):
            return lab
    admin = Path(os.environ.get("ADMIN_KUBECONFIG", kubeconfig))
    kubectl = shutil.which("kubectl")
    assert kubectl, "KUBECONFIG is set: these tests need kubectl on PATH"
    return Lab(
        name="given", engine="", gpus=0, state=Path(), kubeconfig=admin,
        promoter_kubeconfig=kubeconfig, kubectl=Path(kubectl), prometheus="", hub="", pid=0,
    )  # fmt: skip


def with_a_short_benchmark(target: Target, checkout: Path) -> Target:
    """Promoting from a checkout whose benchmark measures as little as it can."""
    copy_product(checkout)
    model = checkout / f"catalog/models/{target.model_name}.yaml"
    edit(model, "rates: [6, 10, 16]", "rates: [6]")
    edit(model, "required_rate: 6", "required_rate: 6\n  attainment: 0.9")
    return dataclasses.replace(target, checkout=checkout)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the product whose catalog a test may spoil, as a user would."""
    copy_product(tmp_path)
    return tmp_path


def copy_product(to: Path) -> None:
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
