"""Failed runs are reported, whoever started them."""

import dagster as dg

from assets.resources import Reports
from assets.stage import PromotionFailed

PREFIX = f"{PromotionFailed.__module__}.{PromotionFailed.__qualname__}: "


# Runs of `dagster job execute` belong to no code location, so only a sensor of all of them sees
# them (dagster/_core/definitions/run_status_sensor_definition.py).
@dg.run_failure_sensor(
    monitor_all_code_locations=True,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Logs each failed run, and adds it to failures.jsonl beside the reports.",
)
def failed_runs(context: dg.RunFailureSensorContext, reports: Reports) -> None:
    """Which run, which model, why."""
    run = context.dagster_run
    failure = {
        "run": run.run_id,
        "job": run.job_name,
        "model": run.tags.get("dagster/partition"),
        "why": _why(context),
    }
    context.log.error("{job} of {model} failed (run {run}): {why}".format(**failure))
    reports.add_failure(failure)


def _why(context: dg.RunFailureSensorContext) -> str:
    """The stages' own messages; without any (a crash, a kill) the run's."""
    messages = [
        event.step_failure_data.error.message.strip().removeprefix(PREFIX)
        for event in context.get_step_failure_events()
        if event.step_failure_data.error is not None
    ]
    return "; ".join(messages) or context.failure_event.message or "no reason was recorded"
