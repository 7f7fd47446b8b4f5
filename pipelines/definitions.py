"""What Dagster loads: `dagster dev`, `dagster job execute -m pipelines.definitions -j promote`."""

import os

import dagster as dg

from assets.resources import Cluster, Reports, reports_folder
from assets.values import RunValues
from pipelines.jobs import STAGES, collect, promote, rebenchmark, rollback
from pipelines.schedules import rebenchmark_nightly
from pipelines.sensors import failed_runs

defs = dg.Definitions(
    assets=STAGES,
    jobs=[promote, rebenchmark, rollback, collect],
    schedules=[rebenchmark_nightly],
    sensors=[failed_runs],
    resources={
        "cluster": Cluster(name=os.environ.get("PROMOTION_CLUSTER", "lab")),
        "reports": Reports(folder=reports_folder()),
        "io_manager": RunValues(folder=reports_folder()),
    },
    # All stages in one process: the lock on the model is held there from the first to the last.
    executor=dg.in_process_executor,
)
