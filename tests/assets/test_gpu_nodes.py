"""How a candidate comes up, and the outage of `recreate` as it is announced."""

import logging
import time
from pathlib import Path

import dagster as dg
import pytest

from assets.gpu_nodes import PODS_COME_AND_GO_S, gpu_nodes, outage_seconds, plan
from assets.promotion import Promotion, Refused
from assets.rebenchmark import spare_gpus
from assets.resources import Reports
from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog
from k8s import traffic
from k8s.client import Client
from k8s.lease import Lease
from tests.assets.conftest import MODEL, BareCluster
from tests.assets.test_ttft_benchmark import record
from tests.k8s.simulated_engine import comes_up, playing
from tests.k8s.simulated_node import SimulatedNode, _call
from tests.k8s.test_traffic import up, wait_ready


def test_the_outage_is_a_start_like_the_last_one_and_the_whole_load() -> None:
    model = catalog().model("llama-3.1-8b-instruct")
    steps = len({*model.traffic.rates, model.slo.required_rate})
    least = steps * (model.traffic.step_seconds + model.traffic.warmup_seconds)
    current = record({}).model_copy(update={"seconds_to_ready": 100.0})
    known = outage_seconds(model, current)
    assert known >= 100.0 + least + PODS_COME_AND_GO_S
    assert outage_seconds(model, None) - known == model.rollout.start_seconds_min - 100.0


@pytest.fixture
def pool(cluster: ClusterSpec, node: SimulatedNode) -> ClusterSpec:
    """The model's node pool is the simulated node."""
    labels = {"test.local/node": node.name}
    node.client.patch("Node", node.name, {"metadata": {"labels": labels}})
    pool = cluster.node_pools[0].model_copy(update={"labels": labels})
    return cluster.model_copy(update={"node_pools": (pool,)})


@pytest.fixture
def model(model: ModelSpec, node: SimulatedNode) -> ModelSpec:
    """With GPUs that the Pods of other tests don't ask for."""
    gpus = model.gpus.model_copy(update={"resource": f"test.local/gpu-{node.name}"})
    return model.model_copy(update={"gpus": gpus})


def give(node: SimulatedNode, gpus: int, model: ModelSpec) -> None:
    """The node has so many GPUs."""
    status = {
        "allocatable": {model.gpus.resource: str(gpus), "pods": "10"},
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    _call(node.client, "PATCH", node.name, "status", {"status": status}, kind="nodes")


def test_gpus_are_counted_anew_and_an_outage_is_announced(
    client: Client,
    node: SimulatedNode,
    pool: ClusterSpec,
    model: ModelSpec,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lease = Lease.acquire(client, f"promotion-{model.name}", "run-1")
    promotion = Promotion(client, pool, model, "run-1", lease, logging.getLogger("test"))
    live = up(client, model, pool, "green")
    traffic.apply_service(client, model, pool, "green")
    with playing(node, live, comes_up):
        wait_ready(client, model, "green")
        give(node, 2, model)
        assert plan(promotion, model).strategy == "blue_green"
        assert not promotion.outage
        assert "OUTAGE" not in caplog.text
        assert spare_gpus(promotion, model).free == 1
        give(node, 1, model)  # someone else has taken the other one
        assert plan(promotion, model).strategy == "recreate"
        assert promotion.outage
        assert f"OUTAGE AHEAD: no spare GPU, so {live.name} is stopped" in caplog.text
        with pytest.raises(Refused, match="no GPU is spare to measure a copy"):
            spare_gpus(promotion, model)
    lease.release()


def test_one_gpu_does_to_measure_a_copy_of_what_has_two_replicas(
    client: Client, node: SimulatedNode, pool: ClusterSpec, model: ModelSpec
) -> None:
    lease = Lease.acquire(client, f"promotion-{model.name}", "run-1")
    promotion = Promotion(client, pool, model, "run-1", lease, logging.getLogger("test"))
    live = up(client, model, pool, "green")
    client.scale("Deployment", live.name, 2)
    traffic.apply_service(client, model, pool, "green")
    with playing(node, live, comes_up):
        deadline = time.monotonic() + 15
        while traffic.ready_replicas(client, model, "green") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        give(node, 3, model)
        assert spare_gpus(promotion, model).free == 1
    lease.release()


def test_a_placeholder_of_an_image_ends_the_promotion_before_the_cluster_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    example = BareCluster(name="lab", namespace="x", jobs_image=f"jobs@sha256:{64 * '0'}")
    with dg.DagsterInstance.ephemeral() as instance:
        ran = dg.materialize(
            [gpu_nodes],
            instance=instance,
            partition_key=MODEL,
            tags={"dagster/partition": MODEL},
            raise_on_error=False,
            resources={
                "cluster": example,
                "reports": Reports(folder=str(tmp_path)),
            },
        )
    assert not ran.success
    failure = ran.failure_data_for_node("gpu_nodes")
    assert failure is not None
    assert "catalog/clusters/lab.yaml: images.jobs: 'jobs@sha256:000" in str(failure.error)
    assert "is a placeholder; write your image's digest" in str(failure.error)
