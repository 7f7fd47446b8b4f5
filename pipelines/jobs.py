"""The four jobs."""

import dagster as dg

from assets.collect import collect_weights
from assets.gpu_nodes import gpu_nodes
from assets.gpu_smoke_test import gpu_smoke_test
from assets.keda_thresholds import keda_thresholds
from assets.model_revision import model_revision
from assets.model_weights import model_weights
from assets.partitions import MODELS
from assets.promoted_model import promoted_model
from assets.rebenchmark import rebenchmark_live
from assets.rollback import roll_back
from assets.ttft_benchmark import ttft_benchmark
from assets.vllm_deployment import vllm_deployment

STAGES = [
    gpu_nodes,
    model_revision,
    model_weights,
    vllm_deployment,
    gpu_smoke_test,
    ttft_benchmark,
    keda_thresholds,
    promoted_model,
]

# Dagster's retries of whole runs don't heed Failure(allow_retries=False), and an interrupted run
# is a failed run to them (dagster#23406): a refused promotion would be tried again.
ONCE = {"dagster/max_retries": "0"}

promote = dg.define_asset_job(
    "promote",
    selection=STAGES,
    tags=ONCE,
    description="Promote a model: fetch, roll out, test, measure, switch. All or nothing.",
)


@dg.job(
    partitions_def=MODELS,
    tags=ONCE,
    description="Measure a copy of what is live against its SLO and its own promotion.",
)
def rebenchmark() -> None:
    """See assets/rebenchmark.py."""
    rebenchmark_live()


@dg.job(partitions_def=MODELS, tags=ONCE, description="Bring back what was live before.")
def rollback() -> None:
    """See assets/rollback.py."""
    roll_back()


@dg.job(tags=ONCE, description="Remove weights that nothing needs any more; by default say which.")
def collect() -> None:
    """See assets/collect.py."""
    collect_weights()
