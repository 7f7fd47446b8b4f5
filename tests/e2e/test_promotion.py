"""The story of a promotion, in order: live, refused, moved, measured again, rolled back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.client_pod import TrafficClient
from tests.e2e.conftest import MODEL, Target

pytestmark = pytest.mark.cluster


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


def test_a_lone_downstream_materialization_can_not_skip_a_gate(target: Target, first: str) -> None:
    slot, commit = target.live_slot(), target.live_commit()
    for asset in ("promoted_model", "keda_thresholds", "ttft_benchmark"):
        dagster = str(Path(sys.executable).parent / "dagster")
        run = target.finish(
            target.spawn(
                [
                    *(dagster, "asset", "materialize", "-m", "pipelines.definitions"),
                    *("--select", asset, "--partition", MODEL),
                ]
            )
        )
        assert run.status != 0, asset
        assert "promote" in run.output
    assert (target.live_slot(), target.live_commit()) == (slot, commit)
    assert not target.lease_holder()


def test_a_good_revision_moves_the_traffic_without_a_failed_request(
    target: Target, first: str
) -> None:
    slot = target.live_slot()
    client = TrafficClient.start(target.lab, target.cluster.namespace, target.model)
    try:
        run = target.promote("v3")
    finally:
        summary = client.stop()
    assert run.status == 0, run.output[-6000:]
    assert target.live_slot() != slot
    assert target.live_commit() != first
    assert summary["requests"] > 50
    assert summary["failures"] == 0, summary
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
