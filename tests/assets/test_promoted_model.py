"""The move of the traffic: record and traffic agree afterwards, whatever happens."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from assets import promoted_model
from assets.promoted_model import go_live
from assets.promotion import Promotion, Refused
from assets.rebenchmark import live_record
from assets.rollback import previous_record
from assets.unfinished import finish_move
from catalog import ClusterSpec, ModelSpec
from k8s import keda, records, traffic
from k8s.client import Client
from k8s.errors import KubernetesError, LeaseLost, NotFound, Unreachable
from k8s.fence import FenceError
from k8s.lease import Lease
from k8s.manifests import Release, Thresholds
from k8s.records import PromotionRecord
from tests.assets.conftest import TTL_S
from tests.assets.test_ttft_benchmark import record
from tests.k8s.api_faults import Fault, FaultyApi
from tests.k8s.simulated_engine import comes_up, playing
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.stub_engine import StubEngine, serving
from tests.k8s.test_traffic import pod_of, up, wait_ready, write_endpoints


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(promoted_model, "LEASE_TTL_S", TTL_S)


THRESHOLDS = Thresholds(in_flight=5, waiting=1, headroom=0.8, lead_seconds=30.0)


@pytest.fixture
def promotion(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Iterator[Promotion]:
    with Lease.acquire(client, f"promotion-{model.name}", "run-blue", ttl_s=TTL_S) as lease:
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
    update = {
        "spec": promotion.model,
        "promotion": promotion.id,
        "thresholds": THRESHOLDS,
    }
    return record({}).model_copy(update=update)


def move(promotion: Promotion, new: Release, *gates: str) -> None:
    go_live(promotion, new, record_of(promotion), THRESHOLDS, gates)


def recorded(promotion: Promotion) -> str | None:
    """The promotion that the present record is of."""
    current, _ = records.read(promotion.client, promotion.model)
    return current.promotion if current else None


def test_users_move_the_record_says_so_and_the_old_slot_ends(
    promotion: Promotion, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, model = promotion.client, promotion.model
    with two_slots(promotion, node) as (old, new), serving(StubEngine("m", "/m")) as engine:
        monkeypatch.setattr(traffic, "PORT", engine.port)
        move(promotion, new)
    assert traffic.live_slot(client, model) == "blue"
    assert recorded(promotion) == promotion.id
    assert records.announced(client, model) is None
    assert promotion.live == new.name
    assert client.get("Deployment", old.name)["spec"]["replicas"] == 0
    scaled = client.get("ScaledObject", new.name)
    assert scaled["spec"]["minReplicaCount"] == model.scaling.min_replicas


# Before the move: nobody moves


def test_nobody_moves_when_the_record_can_not_be_announced(
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
            move(promotion, new)
        assert client.get("Deployment", old.name)["spec"]["replicas"] == 1
    assert traffic.live_slot(client, model) == "green"
    assert not promotion.live


def test_the_gates_are_looked_at_just_before_the_move(
    promotion: Promotion, node: SimulatedNode
) -> None:
    with (
        two_slots(promotion, node) as (_, new),
        pytest.raises(FenceError, match="has not passed gate smoke"),
    ):
        move(promotion, new, "smoke")
    assert traffic.live_slot(promotion.client, promotion.model) == "green"


def test_nobody_moves_once_the_lease_is_lost(promotion: Promotion, node: SimulatedNode) -> None:
    with two_slots(promotion, node) as (_, new):
        other = {"spec": {"holderIdentity": "another-run"}}
        promotion.client.patch("Lease", f"promotion-{promotion.model.name}", other)
        deadline = time.monotonic() + 20
        while promotion.lease.lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(LeaseLost, match="another-run"):
            move(promotion, new)
    assert traffic.live_slot(promotion.client, promotion.model) == "green"


def test_a_write_is_not_tried_for_longer_than_the_lease_lasts(
    promotion: Promotion, node: SimulatedNode, faults: FaultyApi, faulty: Client
) -> None:
    with two_slots(promotion, node) as (_, new):
        promotion.client = faulty
        faults.add(Fault("PATCH .*/services/", times=1000, status=500))
        started = time.monotonic()
        with pytest.raises(Unreachable):
            move(promotion, new)
        assert time.monotonic() - started < TTL_S
    assert traffic.live_slot(promotion.client, promotion.model) == "green"


# After the move: nothing is taken back


def test_what_goes_wrong_after_the_move_only_warns(
    promotion: Promotion,
    node: SimulatedNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, model = promotion.client, promotion.model

    def fails(*_: object, **__: object) -> None:
        raise NotFound("the Pod is gone")

    monkeypatch.setattr(traffic, "drain", fails)
    monkeypatch.setattr(records, "write", fails)
    with two_slots(promotion, node) as (_, new):
        move(promotion, new)
    monkeypatch.undo()
    assert traffic.live_slot(client, model) == "blue"
    assert f"{new.name} is live. Its record is left to the next run: the Pod" in caplog.text
    assert f"{new.name} is live. Ending green is left to the next run: the Pod" in caplog.text
    assert client.get("ScaledObject", new.name)["spec"]["minReplicaCount"] == 1
    assert recorded(promotion) is None


class Killed(BaseException):
    """SIGKILL: nothing of the run's own code runs after it."""


def test_the_next_run_writes_the_record_of_one_that_was_killed_after_the_move(
    promotion: Promotion, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, model = promotion.client, promotion.model
    update = {"promotion": "run-green", "slot": "green", "commit": "e" * 40}
    first = record_of(promotion).model_copy(update=update)
    records.write(client, first)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with two_slots(promotion, node) as (_, new):
        keda.apply_scaled_object(client, new, THRESHOLDS, min_replicas=3)
        with monkeypatch.context() as patch:
            patch.setattr(records, "write", killed)
            with pytest.raises(Killed):
                move(promotion, new)
        assert recorded(promotion) == "run-green"
        with pytest.raises(Refused, match="promotion run-blue brought it up, but its record is"):
            live_record(promotion)
        with pytest.raises(Refused, match="promotion run-blue brought it up, but its record is"):
            previous_record(promotion)
        said: list[str] = []
        finish_move(client, promotion.cluster, model, said.append)
        current, previous = records.read(client, model)
        assert live_record(promotion) == current == record_of(promotion)
        assert previous == first
        assert previous_record(promotion) == first
    assert records.announced(client, model) is None
    assert client.get("ScaledObject", new.name)["spec"]["minReplicaCount"] == 1
    assert len(said) == 2
    finish_move(client, promotion.cluster, model, said.append)
    assert len(said) == 2, "nothing is left to do"


def test_a_rollback_to_what_is_live_is_refused(promotion: Promotion) -> None:
    """As a version left it that took every promotion for another model."""
    client, model = promotion.client, promotion.model
    live = record_of(promotion).model_dump_json()
    config = {
        "metadata": {"name": records.name(model)},
        "data": {"current": live, "previous": live},
    }
    client.apply({"apiVersion": "v1", "kind": "ConfigMap", **config}, force=True)
    with pytest.raises(Refused, match=r"is of what is live now \(cccccccccccc\)"):
        previous_record(promotion)


def test_what_was_announced_and_did_not_come_is_no_record(
    promotion: Promotion, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    with two_slots(promotion, node) as (_, new):
        monkeypatch.setattr(traffic, "switch", killed)
        with pytest.raises(Killed):
            move(promotion, new)
        finish_move(promotion.client, promotion.cluster, promotion.model, print)
    assert recorded(promotion) is None


def test_a_minimum_that_someone_set_by_hand_stays(
    promotion: Promotion, node: SimulatedNode
) -> None:
    client, model = promotion.client, promotion.model
    release = up(client, model, promotion.cluster, "blue")
    traffic.apply_service(client, model, promotion.cluster, "blue")
    records.write(client, record_of(promotion))
    keda.apply_scaled_object(client, release, THRESHOLDS, min_replicas=1)
    by_hand = {"spec": {"minReplicaCount": 2}}
    client.patch("ScaledObject", release.name, by_hand, manager="kubectl-edit")
    said: list[str] = []
    finish_move(client, promotion.cluster, model, said.append)
    assert client.get("ScaledObject", release.name)["spec"]["minReplicaCount"] == 2
    assert "kubectl-edit" in said[0]
