"""The move of the traffic: record and traffic agree afterwards, whatever happens."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from assets.promoted_model import go_live
from assets.promotion import Promotion
from catalog import ClusterSpec, ModelSpec
from k8s import records, traffic
from k8s.client import Client
from k8s.errors import KubernetesError
from k8s.lease import Lease
from k8s.manifests import Release, Thresholds
from k8s.records import PromotionRecord
from tests.assets.test_ttft_benchmark import record
from tests.k8s.simulated_engine import comes_up, playing
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.stub_engine import StubEngine, serving
from tests.k8s.test_traffic import pod_of, up, wait_ready, write_endpoints


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LOOK_SECONDS", 0.1)


THRESHOLDS = Thresholds(in_flight=5, waiting=1, headroom=0.8, lead_seconds=30.0)


@pytest.fixture
def promotion(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Iterator[Promotion]:
    with Lease.acquire(client, f"promotion-{model.name}", "run-blue") as lease:
        yield Promotion(client, cluster, model, "run-blue", lease, logging.getLogger("test"))
        lease.release()


@contextmanager
def two_slots(promotion: Promotion, node: SimulatedNode) -> Iterator[tuple[Release, Release]]:
    """green is live and blue a candidate; both are ready, and the endpoints follow the Service."""
    client, model, cluster = promotion.client, promotion.model, promotion.cluster
    old, new = up(client, model, cluster, "green"), up(client, model, cluster, "blue")
    traffic.apply_service(client, model, cluster, "green")
    end = threading.Event()

    def follow() -> None:
        pods = {release.slot: pod_of(client, release) for release in (old, new)}
        while not end.wait(0.2):
            if slot := traffic.live_slot(client, model):
                write_endpoints(client, model, pods[slot])

    with playing(node, old, comes_up), playing(node, new, comes_up):
        wait_ready(client, model, "green")
        wait_ready(client, model, "blue")
        controller = threading.Thread(target=follow)
        controller.start()
        try:
            yield old, new
        finally:
            end.set()
            controller.join()


def record_of(promotion: Promotion) -> PromotionRecord:
    return record({}).model_copy(update={"spec": promotion.model, "promotion": promotion.id})


def test_users_move_the_record_says_so_and_the_old_slot_ends(
    promotion: Promotion, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, model = promotion.client, promotion.model
    with two_slots(promotion, node) as (old, new), serving(StubEngine("m", "/m")) as engine:
        monkeypatch.setattr(traffic, "PORT", engine.port)
        go_live(promotion, new, record_of(promotion), THRESHOLDS)
    assert traffic.live_slot(client, model) == "blue"
    current, _ = records.read(client, model)
    assert current is not None
    assert current.promotion == promotion.id
    assert promotion.finished
    assert client.get("Deployment", old.name)["spec"]["replicas"] == 0
    scaled = client.get("ScaledObject", new.name)
    assert scaled["spec"]["minReplicaCount"] == model.scaling.min_replicas


def test_users_go_back_when_the_record_can_not_be_written(
    promotion: Promotion, node: SimulatedNode
) -> None:
    client, model = promotion.client, promotion.model
    client.create(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": records.name(model)},
            "data": {"current": "not a record"},
        }
    )
    with two_slots(promotion, node) as (old, new):
        with pytest.raises(KubernetesError, match="is no record of this version"):
            go_live(promotion, new, record_of(promotion), THRESHOLDS)
        assert client.get("Deployment", old.name)["spec"]["replicas"] == 1
    assert traffic.live_slot(client, model) == "green"
    assert not promotion.finished
