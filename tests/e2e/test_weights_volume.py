"""The volume of a cluster without a way out: weights are brought in, promoted, and collected."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import model as lab_model
from tests.e2e.conftest import MODEL, ROOT, Run, Target, copy_product, edit

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(400)]

TINY = "lab/tiny"
POD = "weights-importer"
NOWHERE = "http://127.0.0.1:1"


def weights(target: Target, *arguments: str) -> dict[str, Any]:
    """The result of `python -m weights …` on this machine, which reaches the hub."""
    done = subprocess.run(
        [sys.executable, "-m", "weights", *arguments],
        cwd=ROOT, env=os.environ | {"HF_ENDPOINT": target.lab.hub},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def importer(target: Target) -> Iterator[str]:
    """The Pod of `python -m k8s importer`, as an administrator makes it."""
    manifest = subprocess.run(
        [sys.executable, "-m", "k8s", "importer", "--cluster", target.cluster.name],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    namespace = target.cluster.namespace
    target.kubectl("apply", "-f", "-", stdin=manifest)
    target.kubectl("-n", namespace, "wait", "--for=condition=Ready", f"pod/{POD}", "--timeout=60s")
    yield POD
    target.kubectl("-n", namespace, "delete", "pod", POD, "--ignore-not-found")


def brought(target: Target, repo: str, revision: str, here: Path) -> str:
    """Fetch a commit here and bring it into the cluster as the docs say. Returns the commit."""
    commit = str(weights(target, "resolve", "--repo", repo, "--revision", revision)["commit"])
    forget(target, commit)  # else there is nothing to bring
    here.chmod(0o755)  # open to the server's user, as a volume must be
    place = ("--repo", repo, "--commit", commit, "--root", str(here))
    fetched = weights(target, "fetch", *place)
    kubectl = [str(target.lab.kubectl), "--kubeconfig", str(target.lab.kubeconfig)]
    kubectl += ["-n", target.cluster.namespace, "exec", "-i", POD, "--"]
    program = ["python", "-m", "weights", "import", "--root", "/models", "--from", "-"]
    with subprocess.Popen(
        [sys.executable, "-m", "weights", "pack", *place, "--out", "-"],
        cwd=ROOT, stdout=subprocess.PIPE,
    ) as packing:  # fmt: skip
        done = subprocess.run(
            [*kubectl, *program],
            stdin=packing.stdout, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert packing.returncode == 0
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["manifest_digest"] == fetched["manifest_digest"]
    assert not result["hit"]
    return commit


def forget(target: Target, commit: str) -> None:
    """What other tests have put on the volume of it. An engine keeps the files it has open."""
    nothing = "0" * 40  # at least one must be kept
    others = [f"--keep={other}" for other in (published(target) | {nothing}) - {commit}]
    target.kubectl(
        "-n", target.cluster.namespace, "exec", POD, "--",
        "python", "-m", "weights", "collect", "--root", "/models", "--older-than=0", *others,
    )  # fmt: skip
    assert commit not in published(target)


def published(target: Target) -> set[str]:
    """The commits on the volume, as a Pod that mounts it sees them."""
    out = target.kubectl(
        "-n", target.cluster.namespace, "exec", POD, "--",
        "python", "-m", "weights", "list", "--root", "/models",
    )  # fmt: skip
    return {str(row["commit"]) for row in json.loads(out.splitlines()[-1])["published"]}


def collect(target: Target, **config: Any) -> Run:
    ops = {"ops": {"collect_weights": {"config": config}}}
    return target.promote(job="collect", partition=None, config=ops)


@pytest.fixture(scope="module")
def first(target: Target, importer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first revision, live: brought in by a tar, promoted where no hub is to be reached."""
    commit = brought(target, lab_model.REPO, "v1", tmp_path_factory.mktemp("models"))
    checkout = tmp_path_factory.mktemp("checkout")
    copy_product(checkout)
    edit(checkout / "catalog/clusters/lab.yaml", "http://hub.lab.svc:8880", NOWHERE)
    edit(checkout / f"catalog/models/{MODEL}.yaml", "revision: main", f"revision: {commit}")
    run = dataclasses.replace(target, checkout=checkout).promote()
    assert run.status == 0, run.output[-6000:]
    assert "were there and verified" in run.stage("model_weights")["decided_by"]
    assert target.live_commit() == commit
    return commit


@pytest.fixture(scope="module")
def second(target: Target, first: str) -> str:
    """Another one, live: then `first` is what a rollback needs."""
    run = target.promote("v3")
    assert run.status == 0, run.output[-6000:]
    commit = target.live_commit()
    assert commit is not None
    return commit


def test_what_nothing_needs_is_collected_and_the_rollback_still_works(
    target: Target, first: str, second: str, tmp_path: Path
) -> None:
    third = brought(target, TINY, "main", tmp_path)
    assert published(target) >= {first, second, third}

    dry = collect(target, older_than_days=0)
    assert dry.status == 0, dry.output[-6000:]
    assert f"remove {TINY}@{third}" in dry.output
    assert f"keep   {lab_model.REPO}@{first}" in dry.output
    assert f"keeps {second}: live as {MODEL}" in dry.output
    assert f"keeps {first}: rollback of {MODEL}" in dry.output
    assert re.search(r"[1-9]\d* would be removed", dry.output)
    assert published(target) >= {first, second, third}, "a dry run removes nothing"

    real = collect(target, older_than_days=0, dry_run=False)
    assert real.status == 0, real.output[-6000:]
    assert re.search(r"[1-9]\d* removed", real.output)
    left = published(target)
    assert third not in left
    assert left >= {first, second}
    assert target.get("lease", "weights-collection")

    back = target.promote(job="rollback")
    assert back.status == 0, back.output[-6000:]
    assert target.live_commit() == first
    assert target.answers()


def test_a_record_that_can_not_be_read_stops_it(target: Target, second: str) -> None:
    """Also one of a model that the catalog doesn't have."""
    namespace, before = target.cluster.namespace, published(target)
    name = "promotion-record-retired"
    target.kubectl(
        "-n", namespace, "create", "configmap", name, "--from-literal=current={not json",
    )  # fmt: skip
    try:
        run = collect(target, older_than_days=0, dry_run=False)
    finally:
        target.kubectl("-n", namespace, "delete", "configmap", name)
    assert run.status != 0
    assert f"ConfigMap {name}, key current" in run.output
    assert "Traceback" not in run.output
    assert published(target) == before
