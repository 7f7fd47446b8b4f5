"""A model with a LoRA adapter: promoted with it, changed by it, rolled back with it."""

import dataclasses
import subprocess
import sys

import pytest

from lab import model as lab_model
from lab.hub.store import Hub
from tests.e2e.conftest import MODEL, Target, copy_product, edit, served

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def target(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """With an adapter, and a shorter benchmark: what it measures is not these tests' matter."""
    checkout = tmp_path_factory.mktemp("checkout")
    copy_product(checkout)
    model = checkout / f"catalog/models/{MODEL}.yaml"
    edit(model, "rates: [6, 10, 16]", "rates: [6]")
    edit(model, "required_rate: 6", "required_rate: 6\n  attainment: 0.9")
    adapter = f"{{name: sql, repo: {lab_model.ADAPTER}, revision: main}}"
    edit(model, "smoke:", f"adapters: [{adapter}]\nsmoke:")
    return dataclasses.replace(target, checkout=checkout)


def hub(target: Target) -> Hub:
    return Hub(target.lab.state / "hub")


def root(commit: str) -> str:
    return f"/models/{lab_model.ADAPTER}/{commit}"


@pytest.fixture(scope="module")
def first(target: Target) -> str:
    """Live with the adapter's first revision. Returns its commit."""
    run = target.promote("v1")
    assert run.status == 0, run.output[-6000:]
    assert "adapters that answer: sql" in run.stage("gpu_smoke_test")["decided_by"]
    assert "adapter sql (rank 4, " in run.stage("model_weights")["decided_by"]
    commit = hub(target).resolve(lab_model.ADAPTER, "main")
    assert run.folder is not None
    assert commit in (run.folder / "report.html").read_text()
    return commit


def test_it_is_served_and_recorded_by_its_commit(target: Target, first: str) -> None:
    assert served(target)["sql"] == root(first)
    record = target.record()
    assert record is not None
    [adapter] = record["adapters"]
    assert (adapter["name"], adapter["commit"], adapter["rank"]) == ("sql", first, 4)
    assert adapter["manifest_digest"].startswith("sha256:")
    done = subprocess.run(
        [sys.executable, "-m", "k8s", "diff", MODEL, "--kind", "Deployment"],
        cwd=target.checkout, env=target.environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_one_of_another_model_is_refused_before_the_rollout(target: Target, first: str) -> None:
    wrong = lab_model.adapter_files()
    from safetensors.numpy import load, save

    tensors = load(wrong["adapter_model.safetensors"])
    narrow = {n: t[:, :64].copy() if "lora_A" in n else t for n, t in tensors.items()}
    hub(target).commit(
        lab_model.ADAPTER, {**wrong, "adapter_model.safetensors": save(narrow)}, ref="wrong"
    )
    model = target.checkout / f"catalog/models/{MODEL}.yaml"
    slot = target.live_slot()
    edit(model, "revision: main}", "revision: wrong}")
    try:
        run = target.promote("v1")
    finally:
        edit(model, "revision: wrong}", "revision: main}")
    assert run.status != 0
    assert "q_proj has shape [576, 576] there, [576, 64] for the adapter" in run.output
    assert "Traceback" not in run.output
    assert target.live_slot() == slot
    assert served(target)["sql"] == root(first)


def test_another_revision_of_the_adapter_alone_is_a_promotion(target: Target, first: str) -> None:
    slot, before = target.live_slot(), target.record()
    model = target.checkout / f"catalog/models/{MODEL}.yaml"
    edit(model, "revision: main}", "revision: v2}")
    run = target.promote("v1")
    assert run.status == 0, run.output[-6000:]
    assert target.live_slot() != slot
    second = hub(target).resolve(lab_model.ADAPTER, "v2")
    assert served(target)["sql"] == root(second) != root(first)
    after = target.record()
    assert before is not None
    assert after is not None
    assert after["commit"] == before["commit"]
    assert after["template_hash"] != before["template_hash"]


def test_a_rollback_brings_the_adapter_back(target: Target, first: str) -> None:
    run = target.promote(job="rollback")
    assert run.status == 0, run.output[-6000:]
    assert served(target)["sql"] == root(first)
    record = target.record()
    assert record is not None
    assert [adapter["commit"] for adapter in record["adapters"]] == [first]
