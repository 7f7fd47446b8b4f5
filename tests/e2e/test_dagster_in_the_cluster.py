"""The dagster.yaml of docs/own-cluster.md on a real cluster, with the pipeline's own account."""

import copy
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.storage.dagster_run import DagsterRun
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from tests.e2e.conftest import ROOT, Target

pytestmark = pytest.mark.cluster

SLEEP = ["python", "-c", "import time; time.sleep(600)"]


@pytest.fixture
def instance(target: Target, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """As documented, but for where the cluster is, and for a Pod that sleeps in place of a run."""
    text = (ROOT / "docs" / "own-cluster.md").read_text()
    block = re.search(r"^    storage:\n(?:     .*\n|    \w.*\n)+", text, re.MULTILINE)
    assert block
    config: dict[str, Any] = yaml.safe_load(textwrap.dedent(block[0]))
    del config["storage"]  # SQLite in tmp_path: nobody else reads it here
    launcher = copy.deepcopy(config["run_launcher"]["config"])
    assert launcher.pop("load_incluster_config")
    launcher |= {
        "load_incluster_config": False,
        "kubeconfig_file": str(target.kubeconfig),
        "job_namespace": target.cluster.namespace,
        "job_image": target.cluster.images.jobs,
        "image_pull_policy": target.cluster.images.pull_policy,
    }
    launcher["run_k8s_config"]["container_config"]["command"] = SLEEP
    config["run_launcher"]["config"] = launcher
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(config))
    n = ("-n", target.cluster.namespace)
    target.kubectl(*n, "create", "configmap", "dagster-instance", "--from-literal=dagster.yaml=")
    target.kubectl(*n, "create", "secret", "generic", "dagster-postgres", "--from-literal=A=b")
    try:
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            yield instance
    finally:
        target.kubectl(*n, "delete", "configmap/dagster-instance", "secret/dagster-postgres")


def test_a_run_whose_pod_is_killed_is_marked_failed(
    target: Target, instance: dg.DagsterInstance
) -> None:
    pointer = ModuleCodePointer("pipelines.definitions", "defs", None)
    origin = JobPythonOrigin("promote", RepositoryPythonOrigin("python", pointer))
    run = create_run_for_test(
        instance, job_name="promote", status=dg.DagsterRunStatus.STARTED, job_code_origin=origin
    )
    n = ("-n", target.cluster.namespace)
    label = f"dagster/run-id={run.run_id}"
    instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    try:
        target.kubectl(*n, "wait", "pod", "-l", label, "--for=create", "--timeout=60s")
        target.kubectl(*n, "wait", "pod", "-l", label, "--for=condition=Ready", "--timeout=60s")
        assert look(instance, run) is dg.DagsterRunStatus.STARTED
        target.kubectl(*n, "delete", "pod", "-l", label, "--force", "--grace-period=0")
        target.kubectl(*n, "wait", "job", "-l", label, "--for=condition=Failed", "--timeout=60s")
        assert look(instance, run) is dg.DagsterRunStatus.FAILURE
    finally:
        target.kubectl(*n, "delete", "job", "-l", label)


def look(instance: dg.DagsterInstance, run: DagsterRun) -> dg.DagsterRunStatus:
    """What the daemon does every two minutes; the run's status after it."""
    record = instance.get_run_record_by_id(run.run_id)
    assert record
    assert instance.run_monitoring_enabled
    monitor_started_run(instance, None, record, logging.getLogger())  # type: ignore[arg-type]
    after = instance.get_run_by_id(run.run_id)
    assert after
    return after.status
