"""Faults of the weights stage, as whole promotions of a model that is live.

Through all of them a client asks what was promoted before, and gets its answers. After each of
them what is published is whole, the run has said what, where and what next, and the next run
succeeds: up to the weights, where these faults end. The last test promotes what runs have fetched
that were killed.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import pytest
from safetensors.numpy import save

from lab import model
from lab.client_pod import TrafficClient
from lab.hub import Fault, Hub
from lab.hub.server import OUTSIDER_TOKEN, TOKEN
from lab.lab import Lab
from tests.e2e.conftest import ROOT, Run, Target, copy_product, edit, with_a_short_benchmark

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(300)]

UP_TO_THE_WEIGHTS = "gpu_nodes,model_revision,model_weights"
IN_THE_STAGE = "model_weights - STEP_START"
GATED = "lab/gated"
NEXT_RUN_S = 180.0
KiB, MiB = 1024, 1024 * 1024


# -- the hub, what it has, and what of it lies on the volume -----------------------------------


@dataclass(frozen=True)
class LabsHub:
    """The lab's hub: the faults that it shows, and what was asked of it."""

    lab: Lab

    @property
    def store(self) -> Hub:
        return Hub(self.lab.state / "hub")

    def show(self, *faults: Fault) -> None:
        self._ask("POST", "faults", [dataclasses.asdict(fault) for fault in faults])

    def clear(self) -> None:
        self._ask("DELETE", "faults")

    def downloads(self, commit: str) -> list[str]:
        """The files of a commit whose content was asked for so far."""
        asked = [r["path"] for r in self._ask("GET", "requests") if r["method"] == "GET"]
        return [path.partition(f"/resolve/{commit}/")[2] for path in asked if f"/{commit}/" in path]

    def _ask(self, method: str, page: str, body: object = None) -> list[dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.lab.hub}/_lab/{page}", data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return list(json.load(answer))


@dataclass(frozen=True)
class Revision:
    """A commit on the hub, and where it is to be published."""

    hub: LabsHub
    repo: str
    commit: str
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.repo / self.commit

    def assert_nothing_half(self) -> None:
        """Nothing is published of it, or all of it."""
        if self.folder.exists():
            self.assert_whole()

    def assert_whole(self) -> None:
        """All of it is published and right, by the hub's own hashes and by `weights verify`."""
        files = self.hub.store.files(self.repo, self.commit)
        published = {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != "MANIFEST.json"
        }
        assert published == {path: file.sha256 for path, file in files.items()}
        where = ["--repo", self.repo, "--commit", self.commit, "--root", str(self.root)]
        verified = subprocess.run(
            [sys.executable, "-m", "weights", "verify", *where],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert verified.returncode == 0, verified.stdout + verified.stderr

    def remove(self) -> None:
        """From the volume, with what unfinished fetches have left of it."""
        for path in (self.root / self.repo).glob(f"*{self.commit}*"):
            shutil.rmtree(path)


class Commits(Protocol):
    """Makes a revision of the live model's repository with these weights, for one test."""

    def __call__(self, **weights: int) -> Revision: ...


def tensors(size: int, seed: str) -> bytes:
    """A safetensors file of about `size` bytes, of noise."""
    noise = np.random.default_rng(list(seed.encode())).bytes(size)
    return save({f"layer.{seed}": np.frombuffer(noise, np.uint8)})


def small_files(name: str) -> dict[str, Path | bytes]:
    """What a revision has beside its weights, different for each `name`."""
    good = model.checkpoint(lambda _: None)
    files = {path: good / path for path in ("config.json", "tokenizer_config.json")}
    return {**files, "README.md": f"made for {name}\n".encode()}


@pytest.fixture
def hub(target: Target) -> Iterator[LabsHub]:
    """No fault is shown before a test, and none after it."""
    found = LabsHub(target.lab)
    found.clear()
    yield found
    found.clear()


@pytest.fixture
def commits(target: Target, hub: LabsHub, request: pytest.FixtureRequest) -> Iterator[Commits]:
    """Revisions of this test; nothing of them is left on the volume."""
    made: list[Revision] = []

    def commit(**weights: int) -> Revision:
        name = f"{request.node.name} {len(made)}"
        files = small_files(name) | {
            f"{file}.safetensors": tensors(size, f"{name} {file}") for file, size in weights.items()
        }
        ref = re.sub(r"\W+", "-", name)
        commit = hub.store.commit(target.model.repo, files, ref=ref)
        made.append(Revision(hub, target.model.repo, commit, target.lab.models()))
        return made[-1]

    yield commit
    for revision in made:
        if revision.commit != target.live_commit():
            revision.remove()


# -- the model that is live, and runs ----------------------------------------------------------


@pytest.fixture(scope="module")
def target(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """With a short benchmark, which isn't these tests' matter."""
    if not target.lab.hub:
        pytest.skip("only the hub and the node of a lab that runs here show these faults")
    return with_a_short_benchmark(target, tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def client(target: Target) -> Iterator[TrafficClient]:
    """Asks the live model from the first test to the last, and is never refused."""
    if not target.answers():
        promote(target, "v1")
    client = TrafficClient.start(target.lab, target.cluster.namespace, target.model)
    try:
        yield client
    finally:
        summary = client.stop()
    assert summary["failures"] == 0, json.dumps(summary)
    assert summary["requests"] >= summary["seconds"], json.dumps(summary)


@pytest.fixture
def untouched(target: Target, client: TrafficClient) -> Iterator[None]:
    """What is live is the same after a test as before it, and has answered all the time."""
    before = target.live_slot(), target.live_commit()
    assert all(before)
    yield
    assert_no_failure(client)
    assert (target.live_slot(), target.live_commit()) == before
    assert not target.lease_holder()


def assert_no_failure(client: TrafficClient) -> None:
    """In the last 100 s."""
    client.check_alive()
    assert [line for line in client.lines() if line.get("failures")] == []


def promote(target: Target, revision: str) -> Run:
    """A whole promotion, which must succeed. The benchmark says so when the machine was too busy
    to measure anything; it is no matter of these tests, and tried again."""
    for _ in range(3):
        run = target.promote(revision)
        if run.status == 0 or "could not be measured" not in run.output:
            break
    assert run.status == 0, run.output[-6000:]
    return run


def start(target: Target, revision: str) -> "subprocess.Popen[str]":
    """Only the stages up to the weights."""
    config = {"ops": {"model_revision": {"config": {"revision": revision}}}}
    command = [str(Path(sys.executable).parent / "dagster"), "asset", "materialize"]
    command += ["-m", "pipelines.definitions", "--select", UP_TO_THE_WEIGHTS]
    command += ["--partition", target.model_name, "--config-json", json.dumps(config)]
    return target.spawn(command)


def fetch(target: Target, revision: str) -> Run:
    """A run of the stages up to the weights, which must succeed."""
    run = target.finish(start(target, revision), NEXT_RUN_S)
    assert run.status == 0, run.output[-6000:]
    return run


def assert_refused(run: Run, *parts: str) -> None:
    """By the weights stage, in one message with these parts."""
    assert run.status != 0, run.output[-6000:]
    assert run.stage("model_weights")["outcome"] == "failed", run.output[-6000:]
    assert "Traceback (most recent call last)" not in run.output, run.output[-6000:]
    told = [line for line in run.output.splitlines() if "Next: " in line]
    assert told, run.output[-6000:]
    for part in parts:
        assert part in told[-1], told[-1]


def wait_until(true: Callable[[], bool], what: str, deadline_s: float = 120.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.1)


# -- a hub that refuses -------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """The Secret with the token for the hub, and a target whose model uses it."""

    target: Target

    def set(self, token: str) -> None:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "hub-token", "namespace": self.target.cluster.namespace},
            "stringData": {"HF_TOKEN": token},
        }
        self.target.kubectl("apply", "-f", "-", stdin=json.dumps(secret))


@pytest.fixture
def token(target: Target, checkout: Path) -> Iterator[Token]:
    """A model that asks the hub with a token."""
    file = checkout / f"catalog/models/{target.model_name}.yaml"
    edit(file, "gpus:\n", "weights:\n  token_secret: hub-token\ngpus:\n")
    yield Token(dataclasses.replace(target, checkout=checkout))
    namespace = target.cluster.namespace
    target.kubectl("-n", namespace, "delete", "secret", "hub-token", "--ignore-not-found")


@pytest.mark.usefixtures("untouched")
def test_a_token_that_is_wrong_and_one_of_nobody_on_the_list(token: Token, hub: LabsHub) -> None:
    """401, and 403: the list of a gated repository's files is for everybody, the files are not."""
    target = token.target
    edit(target.checkout / f"catalog/models/{target.model_name}.yaml", target.model.repo, GATED)
    commit = hub.store.resolve(GATED, "main")
    revision = Revision(hub, GATED, commit, target.lab.models())
    wrong = "hf_ThisTokenIsNotOneOfTheHubs"
    token.set(wrong)
    run = target.promote(commit)
    assert_refused(run, "Unauthorized", f"{GATED}@{commit}", "401", "check the repository's name")
    assert wrong not in run.output
    token.set(OUTSIDER_TOKEN)
    run = target.promote("main")
    assert_refused(run, "GatedRepo", f"of {GATED}@{commit}", "403", "accept the terms")
    assert OUTSIDER_TOKEN not in run.output
    assert not revision.folder.exists()
    token.set(TOKEN)
    try:
        fetch(target, "main")
        revision.assert_whole()
    finally:
        revision.remove()


@pytest.mark.usefixtures("untouched")
def test_a_commit_that_is_gone(target: Target, hub: LabsHub, commits: Commits) -> None:
    """404, of a branch that still points at it. (test_bad_input.py has one that isn't there.)"""
    revision = commits(model=64 * KiB)
    gone = hashlib.sha1(revision.commit.encode()).hexdigest()
    hub.store.tag(revision.repo, "moved-away", gone)
    run = target.promote("moved-away")
    assert_refused(run, "CommitGone", gone, revision.repo, "404", "resolve the revision anew")
    hub.store.tag(revision.repo, "moved-away", revision.commit)
    fetch(target, "moved-away")
    revision.assert_whole()


# -- a hub, or what lies before it, that fails --------------------------------------------------


@pytest.mark.usefixtures("untouched")
def test_a_hub_that_goes_silent(
    target: Target, hub: LabsHub, commits: Commits, checkout: Path
) -> None:
    """For ever: it is waited for in vain; once: the same run goes on. (With less patience than
    120 s without a byte.)"""
    jobs, asset = checkout / "k8s/manifests/jobs.py", checkout / "assets/model_weights.py"
    patience = '"--stall-seconds", "4", "--attempts", "2"'
    edit(jobs, '"--root", MODELS', f'"--root", MODELS, {patience}')
    edit(asset, "RETRY_AFTER_S = 15", "RETRY_AFTER_S = 1")
    edit(asset, "RETRIES = 2", "RETRIES = 1")
    impatient = dataclasses.replace(target, checkout=checkout)
    revision = commits(model=256 * KiB)
    stall = Fault(path="model.safetensors", where="get", stall_after=64 * KiB)
    hub.show(stall)
    run = impatient.promote(revision.commit)
    place = f"model.safetensors of {revision.repo}@{revision.commit}"
    assert_refused(run, "Stalled", place, "network between the Job and HF_ENDPOINT")
    assert not revision.folder.exists()
    hub.clear()
    hub.show(dataclasses.replace(stall, times=1))
    run = fetch(impatient, revision.commit)
    assert "no byte from the Hub for" in run.output
    assert "Tries again in 1 s." in run.output
    revision.assert_whole()


@pytest.mark.usefixtures("untouched")
def test_wrong_bytes_of_the_right_length(target: Target, hub: LabsHub, commits: Commits) -> None:
    revision = commits(model=256 * KiB, other=64 * KiB)
    hub.show(Fault(path="model.safetensors", where="get", flip_byte=100 * KiB))
    run = target.promote(revision.commit)
    place = f"model.safetensors of {revision.repo}@{revision.commit}"
    assert_refused(run, "WrongBytes", place, "sha256", "a proxy, a mirror, memory")
    assert not revision.folder.exists()
    hub.clear()
    fetch(target, revision.commit)
    revision.assert_whole()
    assert hub.downloads(revision.commit).count("other.safetensors") == 1


# -- the volume ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
def test_a_file_that_is_replaced_on_the_volume(
    target: Target, hub: LabsHub, commits: Commits
) -> None:
    """By other bytes of the same size. It alone is fetched again."""
    revision = commits(one=64 * KiB, two=64 * KiB)
    fetch(target, revision.commit)
    revision.assert_whole()
    file = revision.folder / "one.safetensors"
    aside = revision.folder.parent / "other-bytes"
    aside.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    aside.chmod(0o644)
    aside.replace(file)
    before = hub.downloads(revision.commit)
    fetch(target, revision.commit)
    revision.assert_whole()
    assert hub.downloads(revision.commit)[len(before) :] == ["one.safetensors"]


SMALL_VOLUME = """\
apiVersion: v1
kind: PersistentVolume
metadata: {name: small-weights}
spec:
  capacity: {storage: 100Mi}
  accessModes: [ReadWriteMany]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: %(namespace)s, name: small-weights}
  hostPath: {path: "%(path)s", type: Directory}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: small-weights, namespace: %(namespace)s}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  resources: {requests: {storage: 100Mi}}
"""


@pytest.fixture
def small_volume(target: Target) -> Iterator[Path]:
    """A file system of 100 MiB on the node, with a claim. Yields how it is seen from here."""
    folder = target.lab.state / "small-weights"
    folder.mkdir(exist_ok=True)
    node = first_process(target.lab)
    on_the_node = ["nsenter", "-t", str(node), "-m", "--wd=/", "--"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m,mode=777", "small-weights", str(folder)]
    subprocess.run([*on_the_node, *mount], check=True, timeout=30)
    objects = SMALL_VOLUME % {"namespace": target.cluster.namespace, "path": folder}
    target.kubectl("apply", "-f", "-", stdin=objects)
    yield Path(f"/proc/{node}/root{folder}")
    # A claim is kept as long as there is a Pod with it, also one that has ended.
    downloads = ["jobs", "-l", "app.kubernetes.io/component=weights"]
    target.kubectl("-n", target.cluster.namespace, "delete", *downloads, "--cascade=foreground")
    target.kubectl("delete", "--wait", "--timeout=60s", "-f", "-", stdin=objects)
    subprocess.run([*on_the_node, "umount", str(folder)], check=True, timeout=30)
    folder.rmdir()


def first_process(lab: Lab) -> int:
    """The pid of the node's first process."""
    [pid] = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if (words := read(path).split("\0"))[0] != "unshare"
        and "lab.kubernetes.init" in words
        and str(lab.state) in words
    ]
    return pid


def read(path: Path) -> str:
    """The file, or nothing if it is gone."""
    with suppress(OSError):
        return path.read_text()
    return ""


@pytest.mark.usefixtures("untouched")
def test_a_volume_that_another_writer_fills(
    target: Target, hub: LabsHub, commits: Commits, checkout: Path, small_volume: Path
) -> None:
    """There was room enough when the download began; in the middle of a file there is none."""
    edit(
        checkout / f"catalog/clusters/{target.cluster.name}.yaml",
        f"claim: {target.cluster.storage.claim}",
        "claim: small-weights",
    )
    cramped = dataclasses.replace(target, checkout=checkout)
    revision = dataclasses.replace(commits(model=24 * MiB, small=64 * KiB), root=small_volume)
    hub.show(Fault(path="model.safetensors", where="get", bytes_per_s=6 * MiB))
    process = cramped.start(revision=revision.commit)

    def arriving() -> bool:
        with suppress(FileNotFoundError):  # moved meanwhile
            return any(MiB < p.stat().st_size < 24 * MiB for p in small_volume.rglob("*"))
        return False

    wait_until(arriving, "a part of model.safetensors on the volume")
    filler = small_volume / "of-another-writer"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(64 * KiB))
    run = cramped.finish(process)
    place = f"model.safetensors of {revision.repo}@{revision.commit}"
    assert_refused(run, "DiskFull", place, "ran full", "make room or enlarge the claim")
    assert not revision.folder.exists()
    filler.unlink()
    hub.clear()
    fetch(cramped, revision.commit)
    revision.assert_whole()
    assert hub.downloads(revision.commit).count("small.safetensors") == 1


# -- several runs, and runs that are killed -----------------------------------------------------


def lane(target: Target, number: int, folder: Path) -> Target:
    """A copy of the model under another name, to be promoted beside the others; 0 is the model."""
    if number == 0:
        return target
    name = f"{target.model_name}-{number}"
    copy_product(folder / "checkout")
    models = folder / "checkout/catalog/models"
    text = (models / f"{target.model_name}.yaml").read_text()
    (models / f"{name}.yaml").write_text(
        text.replace(f"served_name: {target.model_name}", f"served_name: {name}")
    )
    # As many as these don't fit onto a node of 2 CPUs else.
    edit(folder / "checkout/k8s/manifests/jobs.py", 'cpu="250m"', 'cpu="50m"')
    home = folder / "dagster_home"
    home.mkdir()
    shutil.copy(target.home / "dagster.yaml", home)
    return dataclasses.replace(target, model_name=name, checkout=folder / "checkout", home=home)


@pytest.mark.usefixtures("untouched")
def test_two_models_of_the_same_commit_at_once(
    target: Target, hub: LabsHub, commits: Commits, tmp_path: Path
) -> None:
    revision = commits(**{f"model_{n}": 128 * KiB for n in range(12)})
    hub.show(Fault(path="*.safetensors", where="get", bytes_per_s=32 * KiB))
    both = [target, lane(target, 1, tmp_path)]
    processes = [start(one, revision.commit) for one in both]
    for one, process in zip(both, processes, strict=True):
        one.read_until(process, IN_THE_STAGE)
    assert [process.poll() for process in processes] == [None, None]
    hub.clear()
    for one, process in zip(both, processes, strict=True):
        run = one.finish(process, NEXT_RUN_S)
        assert run.status == 0, run.output[-6000:]
    revision.assert_whole()
    assert [path.name for path in revision.folder.parent.glob(f".*{revision.commit}*")] == []


Victim: TypeAlias = Literal["run", "job"]


@dataclass(frozen=True)
class Kill:
    """`victim`: the run, or the program in its Job; so long after the start of that program."""

    victim: Victim
    number: signal.Signals
    after_s: float


# Files that take 6 s at their rate, and last a small one that outlasts every kill.
FILES = {f"model_{n:02}": 128 * KiB for n in range(24)}
SLOWNESS = (
    Fault(path="model_last.safetensors", where="get", bytes_per_s=KiB),
    Fault(path="*.safetensors", where="get", bytes_per_s=128 * KiB),
)
SPREAD_S = 8.0
IN_A_ROW: tuple[tuple[Victim, signal.Signals], ...] = (
    ("run", signal.SIGTERM), ("job", signal.SIGTERM), ("job", signal.SIGKILL),
)  # fmt: skip
EACH = 5


def kills(seed: int) -> tuple[list[list[Kill]], list[Kill]]:
    """EACH of each kind, at moments that are random, one in each 20th of SPREAD_S: rows of kills
    of the same download, and single ones, after which the next run waits for the dead one's Lease.
    """
    chance = random.Random(seed)
    number = EACH * (len(IN_A_ROW) + 1)
    moments = [(n + chance.random()) * SPREAD_S / number for n in range(number)]
    chance.shuffle(moments)
    rest = [Kill(victim, number, moments.pop()) for victim, number in IN_A_ROW * EACH]
    chance.shuffle(rest)
    return (
        [rest[n : n + EACH] for n in range(0, len(rest), EACH)],
        [Kill("run", signal.SIGKILL, moment) for moment in moments],
    )


def killed(target: Target, revision: Revision, kill: Kill) -> Run:
    """A run up to the weights that is killed in that stage."""
    process = start(target, revision.commit)
    seen = target.read_until(process, IN_THE_STAGE)
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", seen)
    assert found, seen
    pod, container = running_download(target, found[0])
    time.sleep(kill.after_s)
    if kill.victim == "run":
        os.kill(process.pid, kill.number)
    elif kill.number == signal.SIGTERM:  # as by a drain of the node
        target.kubectl("-n", target.cluster.namespace, "delete", "pod", pod, "--wait=false")
    else:  # as by the kernel when memory is short
        for path in Path("/proc").glob("[0-9]*/cgroup"):
            if container in read(path):
                os.kill(int(path.parent.name), kill.number)
    run = target.finish(process, NEXT_RUN_S)
    return dataclasses.replace(run, output=seen + run.output)


def running_download(target: Target, promotion: str) -> tuple[str, str]:
    """The Pod of the promotion's download Job and the id of its container, once it runs."""
    chosen = f"vllm-promotion.io/promotion={promotion},app.kubernetes.io/component=weights"
    found: list[tuple[str, str]] = []

    def runs() -> bool:
        out = target.kubectl(
            "-n", target.cluster.namespace, "get", "pods", "-l", chosen, "-o", "json"
        )
        for pod in json.loads(out)["items"]:
            for status in pod["status"].get("containerStatuses") or []:
                if "running" in status["state"]:
                    container = status["containerID"].rpartition("/")[2]
                    found.append((pod["metadata"]["name"], container))
        return bool(found)

    wait_until(runs, f"a running Pod of the download Job of {promotion}")
    return found[0]


def kill_in_turn(target: Target, revision: Revision, turns: list[Kill]) -> None:
    place = f"{revision.repo}@{revision.commit}"
    for kill in turns:
        run = killed(target, revision, kill)
        assert "Traceback (most recent call last)" not in run.output, run.output[-6000:]
        if kill.number == signal.SIGKILL and kill.victim == "run":
            assert run.status == -signal.SIGKILL, (kill, run.output[-6000:])
        else:
            assert run.status != 0, (kill, run.output[-6000:])
            said = place if kill.victim == "job" else "model_weights was interrupted"
            assert said in run.output, (kill, run.output[-6000:])
            assert not target.lease_holder()
        revision.assert_nothing_half()


def kill_and_fetch(target: Target, revision: Revision, kill: Kill) -> None:
    kill_in_turn(target, revision, [kill])
    fetch(target, revision.commit)
    revision.assert_whole()


@pytest.mark.timeout(600)
def test_killed_at_any_moment_the_next_run_goes_on_and_is_promoted(
    target: Target, client: TrafficClient, hub: LabsHub, commits: Commits, tmp_path: Path
) -> None:
    live = target.live_slot(), target.live_commit()
    in_rows, single = kills(seed=4)
    lanes = [
        lane(target, number, tmp_path / str(number)) for number in range(len(in_rows) + len(single))
    ]
    long = [commits(**FILES, model_last=48 * KiB) for _ in in_rows]
    short = [commits(**FILES, model_last=16 * KiB) for _ in single]
    hub.show(*SLOWNESS)
    with ThreadPoolExecutor(len(lanes)) as pool:
        rows = [
            pool.submit(kill_in_turn, *each) for each in zip(lanes, long, in_rows, strict=False)
        ]
        others = [
            pool.submit(kill_and_fetch, *each)
            for each in zip(lanes[len(rows) :], short, single, strict=True)
        ]
        for row in rows:
            row.result()
        hub.clear()
        list(pool.map(fetch, lanes, [revision.commit for revision in long]))
        for other in others:
            other.result()
    for revision in long:
        revision.assert_whole()
    assert [one.lease_holder() for one in lanes] == [""] * len(lanes)
    assert (target.live_slot(), target.live_commit()) == live
    assert_no_failure(client)
    run = promote(target, long[0].commit)
    assert "were there" in run.stage("model_weights")["decided_by"]
    assert target.live_commit() == long[0].commit
