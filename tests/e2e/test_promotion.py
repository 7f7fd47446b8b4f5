"""The story of a promotion, in order: live, refused, moved, measured again, rolled back."""

import dataclasses
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lab.client_pod import TrafficClient
from tests.e2e.conftest import MODEL, Target, edit

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted")]

# Requests a second, of one token each: about a third of what a simulated replica carries of them.
RATE = 50
# The simulator takes at least 25.5 ms for a token, so this is a stream of 30 s or more.
STREAM_TOKENS = 1200


@pytest.fixture(scope="module")
def first(target: Target) -> str:
    """The first revision, live. Returns its commit."""
    run = target.promote("v1")
    assert run.status == 0, run.output[-6000:]
    assert run.folder is not None
    for stage in ("gpu_smoke_test", "ttft_benchmark", "keda_thresholds", "promoted_model"):
        assert run.stage(stage)["outcome"] == "passed"
    html = (run.folder / "report.html").read_text()
    assert "simulated" in html
    assert 'src="http' not in html  # self-contained
    assert (run.folder / "rows.jsonl.gz").stat().st_size > 0
    commit = target.live_commit()
    assert commit is not None
    return commit


def test_the_record_says_what_is_live_and_why(target: Target, first: str) -> None:
    config = target.get("configmap", f"promotion-record-{target.model.object_name}")
    assert config is not None
    record = json.loads(config["data"]["current"])
    assert record["commit"] == first
    assert record["simulated"] == ["gpu", "engine"]
    assert record["benchmark"]["verdict"] == "pass"
    assert record["image_digest"].startswith("sha256:") or "@sha256:" in record["image_digest"]
    scaled = target.get("scaledobject", f"{target.model.object_name}-{target.live_slot()}")
    assert scaled is not None
    conditions = {c["type"]: c["status"] for c in scaled["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    assert conditions.get("Fallback") != "True"
    assert not target.lease_holder()


def test_a_revision_that_misses_its_slo_is_refused(target: Target, first: str) -> None:
    slot = target.live_slot()
    before = target.state()
    run = target.promote("v2-slow")
    assert run.status != 0
    assert run.stage("ttft_benchmark")["outcome"] == "refused"
    assert "TTFT" in run.output
    assert "Traceback" not in run.output
    assert target.live_slot() == slot
    assert target.live_commit() == first
    assert target.answers()
    assert not target.lease_holder()
    after = target.state()
    assert {k: v for k, v in after.items() if k in before and slot and k.endswith(slot)} == {
        k: v for k, v in before.items() if slot and k.endswith(slot)
    }
    idle = "green" if slot == "blue" else "blue"
    candidate = target.get("deployment", f"{target.model.object_name}-{idle}")
    assert candidate is None or candidate["spec"]["replicas"] == 0


@pytest.mark.parametrize("home", [True, False], ids=["", "without DAGSTER_HOME"])
def test_a_lone_downstream_materialization_can_not_skip_a_gate(
    target: Target, first: str, checkout: Path, home: bool
) -> None:
    slot, commit = target.live_slot(), target.live_commit()
    aside = dataclasses.replace(target, checkout=checkout)
    for asset in ("promoted_model", "keda_thresholds", "ttft_benchmark"):
        dagster = str(Path(sys.executable).parent / "dagster")
        run = aside.finish(
            aside.spawn(
                [
                    *(dagster, "asset", "materialize", "-m", "pipelines.definitions"),
                    *("--select", asset, "--partition", MODEL),
                ],
                None if home else target.without_home(),
            )
        )
        assert run.status != 0, asset
        assert "promote" in run.output
    assert (target.live_slot(), target.live_commit()) == (slot, commit)
    assert not target.lease_holder()


def test_the_gates_and_the_baseline_are_the_clusters_also_without_dagster_home(
    target: Target, first: str, checkout: Path
) -> None:
    """Dagster then keeps nothing, and nothing of what decides was its to keep."""
    slot = target.live_slot()
    aside = dataclasses.replace(target, checkout=checkout)
    run = aside.promote("v2-slow", environment=target.without_home())
    assert run.status != 0
    assert "TTFT" in run.output
    assert "Traceback" not in run.output
    assert (target.live_slot(), target.live_commit()) == (slot, first)
    assert not target.lease_holder()
    [folder] = (checkout / ".promotions/reports" / MODEL).iterdir()
    last = json.loads((folder / "stages.jsonl").read_text().splitlines()[-1])
    assert (last["stage"], last["outcome"]) == ("ttft_benchmark", "refused")


@pytest.mark.timeout(500)
def test_a_good_revision_moves_the_traffic_without_a_failed_request(
    target: Target, first: str, checkout: Path
) -> None:
    """50 req/s on kept-alive and new connections, and a long stream across the move."""
    # The old slot may finish what it has for longer than the stream takes.
    file = checkout / f"catalog/models/{MODEL}.yaml"
    edit(file, "drain_seconds: 10", "drain_seconds: 90")
    # The load may have scaled the live one to 2; the third of the lab's GPUs is the candidate's.
    edit(file, "max_replicas: 2", "max_replicas: 1")
    patient = dataclasses.replace(target, checkout=checkout)
    slot = target.live_slot()
    moved: list[float] = []
    process = patient.start(revision="v3")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "keda_thresholds - STEP_START" in line:
            break  # the benchmark has ended: this load on two cores would spoil it
    client = TrafficClient.start(
        target.lab, target.cluster.namespace, target.model,
        "--rate", str(RATE), "--max-tokens", "1",
    )  # fmt: skip
    try:
        with target.when_moved(lambda: moved.append(time.time())):
            stream = client.stream(STREAM_TOKENS)
            run = target.finish(process)
        told, _ = stream.communicate(timeout=60)
    finally:
        summary = client.stop()
    assert run.status == 0, "".join(seen)[-3000:] + run.output[-6000:]
    assert target.live_slot() != slot
    assert target.live_commit() != first
    assert summary["failures"] == 0, summary
    assert summary["requests"] >= 0.9 * RATE * summary["seconds"], summary
    assert set(summary["revisions"]) >= {first, target.live_commit()}, summary
    with urllib.request.urlopen(f"{target.lab.hub}/_lab/requests", timeout=30) as answer:
        asked = [request["path"] for request in json.load(answer)]
    assert any(path.startswith("/xorbs/") for path in asked), "v3 comes from Xet storage"
    arrived = json.loads(told)
    assert arrived["whole"], arrived
    assert moved
    assert arrived["began"] < moved[0] < arrived["ended"], (arrived, moved)
    assert arrived["ended"] - arrived["began"] >= 20
    old = target.get("deployment", f"{target.model.object_name}-{slot}")
    assert old is not None
    assert old["spec"]["replicas"] == 0


def test_rebenchmark_measures_a_copy_and_leaves_the_live_one_alone(target: Target) -> None:
    slot, commit = target.live_slot(), target.live_commit()
    run = target.promote(job="rebenchmark")
    assert run.status == 0, run.output[-6000:]
    assert (target.live_slot(), target.live_commit()) == (slot, commit)
    assert target.answers()
    assert not target.lease_holder()


def test_rollback_brings_the_previous_one_back(target: Target, first: str) -> None:
    run = target.promote(job="rollback")
    assert run.status == 0, run.output[-6000:]
    assert target.live_commit() == first
    assert target.answers()
    assert not target.lease_holder()


def test_diff_shows_what_would_change_and_changes_nothing(target: Target, first: str) -> None:
    before = target.state()
    done = subprocess.run(
        [sys.executable, "-m", "k8s", "diff", MODEL, "--commit", "f" * 40],
        cwd=target.checkout, env=target.environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "f" * 40 in done.stdout
    assert target.state() == before
