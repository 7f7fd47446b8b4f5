"""What Dagster loads, as a user meets it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from catalog.load import catalog
from pipelines.definitions import defs
from pipelines.jobs import STAGES

ROOT = Path(__file__).parents[2]
PRODUCT = ("assets", "catalog", "k8s", "loadtests", "pipelines", "weights")
REPOSITORY = defs.get_repository_def()


def keys(*names: str) -> set[dg.AssetKey]:
    return {dg.AssetKey(name) for name in names}


def test_the_stages_stand_in_the_order_of_a_promotion() -> None:
    graph = REPOSITORY.asset_graph
    parents = {key.path[-1]: graph.get(key).parent_keys for key in graph.get_all_asset_keys()}
    assert parents["model_revision"] == keys("gpu_nodes")
    assert parents["model_weights"] == keys("model_revision")
    # Not from gpu_nodes' plan: GPUs are counted again just before the rollout.
    assert parents["vllm_deployment"] == keys("model_weights")
    assert parents["gpu_smoke_test"] == keys("vllm_deployment")
    assert parents["ttft_benchmark"] == keys("vllm_deployment", "gpu_smoke_test")
    assert parents["keda_thresholds"] == keys("vllm_deployment", "ttft_benchmark")
    assert keys("keda_thresholds") <= parents["promoted_model"]
    assert len(parents) == 8


def test_every_stage_has_one_partition_a_model() -> None:
    for stage in STAGES:
        assert stage.partitions_def is not None
        assert stage.partitions_def.get_partition_keys() == list(catalog().models)


def test_the_gates_block() -> None:
    checks = {
        (spec.asset_key.path[-1], spec.name): spec.blocking
        for stage in STAGES
        for spec in stage.check_specs
    }
    assert checks == {
        ("gpu_smoke_test", "smoke"): True,
        ("ttft_benchmark", "slo"): True,
        ("keda_thresholds", "trigger"): True,
    }


@pytest.mark.parametrize(
    ("job", "step"),
    [
        *[("promote", stage.key.path[-1]) for stage in STAGES],
        ("rollback", "roll_back"),
        ("rebenchmark", "rebenchmark_live"),
        ("collect", "collect_weights"),
    ],
)
def test_a_config_that_a_step_does_not_take_is_refused(job: str, step: str) -> None:
    """Else the run goes on, and promotes something else than was asked for."""
    config = {"ops": {step: {"config": {"revison": "v3"}}}}
    with pytest.raises(dg.DagsterInvalidConfigError, match="revison"):
        dg.validate_run_config(REPOSITORY.get_job(job), config)


@pytest.mark.parametrize("name", ["promote", "rebenchmark", "rollback"])
def test_no_failed_run_is_tried_again_as_a_whole(name: str) -> None:
    """With Dagster's own decision; without the tag it would be "true"."""
    retries = {"run_retries": {"enabled": True, "max_retries": 2}}
    job = REPOSITORY.get_job(name)
    assert job.executor_def is dg.in_process_executor
    with dg.DagsterInstance.ephemeral(settings=retries) as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        assert not result.success  # no partition
        run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags["dagster/will_retry"] == "false"


@pytest.mark.parametrize("name", ["promote", "__ASSET_JOB"])
def test_a_run_that_is_tried_again_all_the_same_is_refused(name: str) -> None:
    """Runs of single assets, as from the UI, have no job of ours and so not its tag."""
    tags = {"dagster/retry_number": "1", "dagster/partition": "smollm2-135m"}
    with dg.DagsterInstance.ephemeral() as instance:
        result = REPOSITORY.get_job(name).execute_in_process(
            instance=instance, raise_on_error=False, tags=tags
        )
    assert not result.success
    data = result.failure_data_for_node("gpu_nodes")
    assert data is not None
    assert data.error is not None
    assert "Dagster has tried this run again by itself" in data.error.message


def test_a_collection_is_of_no_model_and_not_tried_again() -> None:
    job = REPOSITORY.get_job("collect")
    assert job.partitions_def is None
    assert job.tags["dagster/max_retries"] == "0"


def test_the_schedule_is_off_and_the_sensor_on() -> None:
    schedule = REPOSITORY.get_schedule_def("rebenchmark_nightly")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    sensor = REPOSITORY.get_sensor_def("failed_runs")
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING


def test_loading_takes_along_no_heavy_or_patching_library() -> None:
    """locust patches sockets; matplotlib and pandas take seconds."""
    code = (
        "import sys, pipelines.definitions;"
        "print([m for m in ('locust', 'gevent', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_workspace_names_the_definitions(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dagster"), "definitions", "validate"],
        cwd=ROOT,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Validation successful for code location pipelines.definitions" in done.stdout


def execute(
    home: Path, tags: dict[str, str], variables: dict[str, str], cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    command = [str(Path(sys.executable).parent / "dagster"), "job", "execute"]
    command += ["-m", "pipelines.definitions", "-j", "promote", "--tags", json.dumps(tags)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"DAGSTER_HOME": str(home)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("tags", "variables", "parts"),
    [
        ({"dagster/partition": "gpt-2"}, {}, ("gpt-2", "smollm2-135m", "catalog/models")),
        ({}, {}, ("dagster/partition", "smollm2-135m")),
        (
            {"dagster/partition": "smollm2-135m"},
            {"PROMOTION_CLUSTER": "moon"},
            ("moon", "PROMOTION_CLUSTER", "eks-example"),
        ),
        (
            {"dagster/partition": "smollm2-135m"},
            {"KUBECONFIG": "/no/such/file"},
            ("/no/such/file", "KUBECONFIG"),
        ),
        ({"dagster/partition": "llama-3.1-8b-instruct"}, {}, ("gpu-24g", "cluster lab")),
    ],
    ids=["unknown model", "no model", "unknown cluster", "no kubeconfig", "no node pool"],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, tags: dict[str, str], variables: dict[str, str], parts: tuple[str, ...]
) -> None:
    done = execute(tmp_path, tags, variables)
    assert done.returncode != 0
    for part in parts:
        assert part in done.stdout
    assert "Traceback" not in done.stdout
    assert "Stack Trace" not in done.stdout
    assert not (tmp_path / "reports").exists()


def test_a_broken_catalog_file_is_named_with_its_line(tmp_path: Path) -> None:
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder)
    spoiled = tmp_path / "checkout/catalog/models/smollm2-135m.yaml"
    spoiled.write_text(spoiled.read_text().replace("count: 1", "count: 0.5"))
    done = execute(tmp_path, {"dagster/partition": "smollm2-135m"}, {}, tmp_path / "checkout")
    assert done.returncode != 0
    assert "catalog/models/smollm2-135m.yaml:7: gpus.count" in done.stdout
    assert "Traceback" not in done.stdout
