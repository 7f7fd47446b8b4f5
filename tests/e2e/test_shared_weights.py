"""Two models of one repository: its weights are fetched once."""

import dataclasses
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k8s.manifests.release import MODEL as LABEL
from k8s.manifests.release import WEIGHTS, weights_key
from lab import model as lab_model
from lab.hub.store import Hub
from tests.e2e.conftest import MODEL, Run, Target

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(300)]


Span = tuple[str, str]


def promote_as_far_as_the_rollout(target: Target, commit: str) -> tuple[Run, Span]:
    """Also when its download began and ended: an interrupted run may delete its last Job."""
    process = target.start(revision=commit)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "vllm_deployment - STEP_START" in line:
            break
    assert "vllm_deployment - STEP_START" in seen[-1], "".join(seen)[-4000:]
    span = download(target, commit)
    os.kill(process.pid, signal.SIGINT)
    run = target.finish(process, 120)
    return dataclasses.replace(run, output="".join(seen) + run.output), span


def download(target: Target, commit: str) -> Span:
    """When the program in the model's download Job was started, and when it ended."""
    mark = f"{WEIGHTS}={weights_key(lab_model.REPO, commit)},{LABEL}={target.model_name}"
    in_namespace = ("-n", target.cluster.namespace, "get", "-o", "json")
    [job] = json.loads(target.kubectl(*in_namespace, "job", "-l", mark))["items"]
    of_job = f"batch.kubernetes.io/job-name={job['metadata']['name']}"
    [pod] = json.loads(target.kubectl(*in_namespace, "pod", "-l", of_job))["items"]
    end = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return end["startedAt"], end["finishedAt"]


def test_promoted_at_once_they_fetch_its_weights_once(
    target: Target, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files: dict[str, Path | bytes] = {
        path.name: path for path in lab_model.checkpoint(lambda _: None).iterdir()
    }
    new = Hub(target.lab.state / "hub").commit(
        lab_model.REPO, {**files, "README.md": b"Nobody has fetched this one yet.\n"}, ref="new"
    )
    models = checkout / "catalog/models"
    shutil.copy(models / f"{MODEL}.yaml", models / "smollm2-twin.yaml")
    both = []
    for name in (MODEL, "smollm2-twin"):
        # Of their own: two processes that make Dagster's tables at once spoil them.
        home = tmp_path_factory.mktemp(name)
        shutil.copy(target.home / "dagster.yaml", home)
        both.append(dataclasses.replace(target, checkout=checkout, model_name=name, home=home))
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda one: promote_as_far_as_the_rollout(one, new), both))
    said = sorted(run.stage("model_weights")["decided_by"] for run, _ in ran)
    assert "fetched and verified" in said[0], said
    assert "were there and verified" in said[1], said
    first, second = sorted(span for _, span in ran)
    assert first[1] <= second[0], "one after the other"
    lease = target.get("lease", weights_key(lab_model.REPO, new))
    assert lease is not None
    assert not lease["spec"].get("holderIdentity")
