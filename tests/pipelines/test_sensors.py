"""A failed run is reported with its reason."""

import json
from pathlib import Path

import dagster as dg

from assets.resources import Reports
from pipelines.definitions import defs
from pipelines.sensors import failed_runs


def test_a_failed_run_is_reported_with_the_message_of_its_stage(tmp_path: Path) -> None:
    job = defs.get_repository_def().get_job("promote")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        context = dg.build_run_status_sensor_context(
            sensor_name="failed_runs",
            dagster_event=result.get_run_failure_event(),
            dagster_instance=instance,
            dagster_run=run,
            resources={"reports": Reports(folder=str(tmp_path))},
        ).for_run_failure()
        failed_runs(context)
    [line] = (tmp_path / "failures.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["run"], told["job"]) == (result.run_id, "promote")
    assert "dagster/partition" in told["why"]
