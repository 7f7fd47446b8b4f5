"""Two models of one repository: its weights are fetched once."""

import dataclasses
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k8s.manifests.release import WEIGHTS, weights_key
from lab import model as lab_model
from lab.hub.store import Hub
from tests.e2e.conftest import MODEL, Run, Target

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(300)]


def promote_as_far_as_the_rollout(target: Target, revision: str) -> Run:
    process = target.start(revision=revision)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "vllm_deployment - STEP_START" in line:
            os.kill(process.pid, signal.SIGINT)
            break
    run = target.finish(process, 120)
    return dataclasses.replace(run, output="".join(seen) + run.output)


def test_promoted_at_once_they_fetch_its_weights_once(target: Target, checkout: Path) -> None:
    files: dict[str, Path | bytes] = {
        path.name: path for path in lab_model.checkpoint(lambda _: None).iterdir()
    }
    new = Hub(target.lab.state / "hub").commit(
        lab_model.REPO, {**files, "README.md": b"Nobody has fetched this one yet.\n"}, ref="new"
    )
    models = checkout / "catalog/models"
    shutil.copy(models / f"{MODEL}.yaml", models / "smollm2-twin.yaml")
    both = [
        dataclasses.replace(target, checkout=checkout, model_name=name)
        for name in (MODEL, "smollm2-twin")
    ]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda one: promote_as_far_as_the_rollout(one, "new"), both))
    said = sorted(run.stage("model_weights")["decided_by"] for run in runs)
    assert "fetched and verified" in said[0], said
    assert "were there and verified" in said[1], said

    key = weights_key(lab_model.REPO, new)
    out = target.kubectl("-n", target.cluster.namespace, "get", "job", "-l", f"{WEIGHTS}={key}",
                         "-o", "jsonpath={.items[*].metadata.name}")  # fmt: skip
    spans = []
    for job in out.split():
        pods = target.kubectl("-n", target.cluster.namespace, "get", "pod", "-o", "json",
                              "-l", f"batch.kubernetes.io/job-name={job}")  # fmt: skip
        [pod] = json.loads(pods)["items"]
        end = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        spans.append((end["startedAt"], end["finishedAt"]))
    first, second = sorted(spans)
    assert first[1] <= second[0], "one after the other"
    lease = target.get("lease", key)
    assert lease is not None
    assert not lease["spec"].get("holderIdentity")
