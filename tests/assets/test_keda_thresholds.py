"""The candidate's replicas before the proof of its trigger."""

import logging
import threading

import pytest

from assets.keda_thresholds import scale
from assets.promotion import Promotion
from catalog import ClusterSpec, ModelSpec
from k8s import traffic
from k8s.client import Client
from k8s.errors import WaitTimeout
from k8s.lease import Lease
from k8s.manifests import Thresholds
from tests.k8s.simulated_engine import EnginePod, comes_up, playing
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.test_traffic import up

THRESHOLDS = Thresholds(in_flight=5, waiting=1, headroom=0.8, lead_seconds=30.0)


def test_all_replicas_are_ready_before_the_trigger_is_proven(
    client: Client,
    node: SimulatedNode,
    cluster: ClusterSpec,
    model: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lease = Lease.acquire(client, f"promotion-{model.name}", "run-blue")
    promotion = Promotion(client, cluster, model, "run-blue", lease, logging.getLogger("test"))
    release = up(client, model, cluster, "blue")
    slow = threading.Event()

    def second_is_slow(engine: EnginePod) -> None:
        if len(pods) > 1:
            slow.wait(10)
        comes_up(engine)

    with playing(node, release, second_is_slow) as pods:
        # As KEDA does.
        threading.Timer(0.5, client.scale, ("Deployment", release.name, 2)).start()
        threading.Timer(2.0, slow.set).start()
        scale(promotion, release, THRESHOLDS, 2)
        assert slow.is_set()
        assert traffic.ready_replicas(client, model, "blue") == 2
        assert client.get("ScaledObject", release.name)["spec"]["minReplicaCount"] == 2
        # A new replica may need a node, and the image on it, before its start begins.
        patience = "assets.keda_thresholds.NODE_AND_IMAGE_SECONDS"
        monkeypatch.setattr(patience, 1 - release.startup_seconds)
        with pytest.raises(WaitTimeout, match="2 of 3 replicas ready"):
            scale(promotion, release, THRESHOLDS, 3)
    lease.release()
