"""Real vLLM on CPU, in Pods of a lab: promoted when right, refused when it talks nonsense.

With a LoRA adapter, as the engine starts but once for it and the model.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.load import catalog
from lab import lab as labs
from lab import vllm_cpu
from lab.model import ADAPTER
from tests.e2e.conftest import Target, copy_product, edit, served

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not vllm_cpu.is_installed(), reason="the real engine is not installed: `make vllm`"
    ),
]
# Loading, three known answers and the benchmark on two busy cores.
DEADLINE_S = 900
MODEL = "smollm2-135m-cpu"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    checkout = tmp_path_factory.mktemp("checkout")
    copy_product(checkout)
    adapter = f"{{name: sql, repo: {ADAPTER}, revision: v2}}"
    edit(checkout / f"catalog/models/{MODEL}.yaml", "smoke:", f"adapters: [{adapter}]\nsmoke:")
    home = tmp_path_factory.mktemp("dagster_home_vllm")
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    with labs.start("e2e-vllm", engine="vllm") as lab:
        yield Target(
            lab,
            lab.promoter_kubeconfig,
            catalog().cluster("lab-vllm"),
            home,
            model_name=MODEL,
            checkout=checkout,
        )


@pytest.mark.timeout(DEADLINE_S + 120)
def test_the_right_revision_goes_live(target: Target) -> None:
    run = target.promote("v1", deadline_s=DEADLINE_S)
    assert run.status == 0, run.output[-6000:]
    assert run.folder is not None
    assert "simulated: gpu" in (run.folder / "report.html").read_text()
    assert target.answers()
    assert "adapters that answer: sql" in run.stage("gpu_smoke_test")["decided_by"]
    [adapter] = (target.record() or {})["adapters"]
    assert served(target)["sql"] == f"/models/{ADAPTER}/{adapter['commit']}"


@pytest.mark.timeout(DEADLINE_S + 120)
def test_a_healthy_server_that_talks_nonsense_is_refused(target: Target, tmp_path: Path) -> None:
    slot, commit = target.live_slot(), target.live_commit()
    assert slot is not None, "the test before this one promotes a revision"
    run = target.promote("nonsense", deadline_s=DEADLINE_S)
    assert run.status != 0
    stage = run.stage("gpu_smoke_test")
    assert stage["outcome"] == "refused"
    for part in ("What is the capital of France?", "expected 'Paris'", "given"):
        assert part in run.output, run.output[-4000:]
    assert (target.live_slot(), target.live_commit()) == (slot, commit)
    assert target.answers()
    assert not target.lease_holder()
