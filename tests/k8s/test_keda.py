"""Thresholds, and the proof of the trigger: API server real, Prometheus and KEDA stand-ins."""

import contextlib
import http.server
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog
from k8s import keda, manifests, own_requests, prometheus, slots
from k8s.answers import Asked
from k8s.client import Client
from k8s.manifests import Release, Thresholds
from k8s.transport import Request
from tests.k8s.simulated_engine import comes_up, playing
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.streaming_engine import StreamingEngine, serving
from tests.k8s.test_rollout import cluster as lab_cluster
from tests.k8s.test_rollout import gone, keda_stand_in, live, model

__all__ = ["lab_cluster", "model"]

SMOLLM = catalog().model("smollm2-135m")
LAB = catalog().cluster("lab")


# Thresholds


def growing(growth: float) -> ModelSpec:
    return SMOLLM.model_copy(
        update={"scaling": SMOLLM.scaling.model_copy(update={"growth": growth})}
    )


@pytest.mark.parametrize(
    ("growth", "l_star", "rate", "cold", "in_flight", "headroom"),
    [
        # lead = 2 + 2 + 96 = 100 s; h = 1 - 0.02 * 100 / 10
        (0.02, 50.0, 10.0, 96.0, 40, 0.8),
        (0.0, 50.0, 10.0, 96.0, 47, 0.95),  # never above 0.95
        (1.0, 50.0, 10.0, 96.0, 15, 0.3),  # never below 0.3
        (0.02, 1.0, 10.0, 96.0, 1, 0.8),  # never below 1
        (0.02, 0.2, 10.0, 96.0, 1, 0.8),
    ],
)
def test_thresholds(
    growth: float, l_star: float, rate: float, cold: float, in_flight: int, headroom: float
) -> None:
    found = keda.thresholds(l_star, rate, cold, LAB, growing(growth))
    assert found.in_flight == in_flight
    assert found.headroom == pytest.approx(headroom)
    assert found.lead_seconds == 100
    assert 1 <= found.waiting <= found.in_flight


@pytest.mark.parametrize(("l_star", "rate"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (-1, -1)])
def test_no_thresholds_from_nonsense(l_star: float, rate: float) -> None:
    with pytest.raises(ValueError, match="no thresholds follow"):
        keda.thresholds(l_star, rate, 10, LAB, SMOLLM)


# Reading metrics


def test_samples() -> None:
    text = (
        "# HELP vllm:num_requests_running in flight\n"
        'vllm:num_requests_running{model_name="a}b \\"c"} 3.0\n'
        'vllm:num_requests_running{engine="1"} 1e1 1700000000\n'
        "vllm:num_requests_running 2\n"
        "vllm:num_requests_running_total 99\n"
        "xvllm:num_requests_running 99\n"
    )
    assert prometheus.samples(text, "vllm:num_requests_running") == [3.0, 10.0, 2.0]
    assert prometheus.samples(text, "vllm:num_requests_waiting") == []


# A stand-in for Prometheus


@dataclass
class StubPrometheus:
    """Answers by what stands in the query. `queries`: those it got.

    `in_flight`: None for what the engine has in flight now.
    """

    in_flight: list[float] | None = None
    engine: StreamingEngine = field(default_factory=StreamingEngine)
    series: int = 1
    age: float = 1.0
    broken: int = 0
    breaks_off: bool = False
    queries: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, query: str) -> list[float]:
        self.queries.append(query)
        if query.startswith("max(time()"):
            return [self.age]
        if query.startswith("count("):
            return [float(self.series)] if self.series else []
        if self.in_flight is None:
            return [self.engine.running + self.engine.waiting]
        return self.in_flight


@contextlib.contextmanager
def prometheus_stub(stub: StubPrometheus) -> Iterator[StubPrometheus]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)["query"][0]
            values = stub.answer(query)
            result = [{"metric": {}, "value": [time.time(), str(value)]} for value in values]
            body: dict[str, Any] = {"data": {"resultType": "vector", "result": result}}
            if stub.broken:
                body = {"error": "no such thing"}
            answer = json.dumps(body).encode()
            self.send_response(stub.broken or 200)
            self.send_header("Content-Length", str(len(answer) + stub.breaks_off))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def stub() -> Iterator[StubPrometheus]:
    with prometheus_stub(StubPrometheus()) as stub:
        yield stub


@pytest.fixture
def cluster(lab_cluster: ClusterSpec, stub: StubPrometheus) -> ClusterSpec:
    """The lab's, with the stand-in."""
    spec = lab_cluster.prometheus.model_copy(update={"address": stub.address})
    return lab_cluster.model_copy(update={"prometheus": spec})


def test_a_query(client: Client, cluster: ClusterSpec, stub: StubPrometheus) -> None:
    stub.in_flight = [3.5]
    assert prometheus.query(client, cluster, 'sum(x{a="b c"})') == [3.5]
    assert stub.queries == ['sum(x{a="b c"})']


def test_prometheus_refuses(client: Client, cluster: ClusterSpec, stub: StubPrometheus) -> None:
    stub.broken = 422
    with pytest.raises(prometheus.PrometheusError, match=r"answers 422 to sum\(: .*no such thing"):
        prometheus.query(client, cluster, "sum(")


def test_prometheus_that_restarts_in_the_middle_of_an_answer(
    client: Client, cluster: ClusterSpec, stub: StubPrometheus
) -> None:
    stub.breaks_off = True
    with pytest.raises(prometheus.PrometheusError, match="can't be asked: IncompleteRead"):
        prometheus.query(client, cluster, "up")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:1", "can't be asked"),
        ("http://nothing.default.svc:9090", "there is no Service default/nothing"),
        ("http://kubernetes.default.svc:9090", "no selector or no port 9090"),
    ],
)
def test_prometheus_is_not_there(client: Client, address: str, why: str) -> None:
    spec = LAB.prometheus.model_copy(update={"address": address})
    with pytest.raises(prometheus.PrometheusError, match=why):
        prometheus.query(client, LAB.model_copy(update={"prometheus": spec}), "up")


# The proof


@dataclass
class Setting:
    """A slot with one ready Pod whose every link is right, until a test breaks one."""

    client: Client
    release: Release
    prometheus: StubPrometheus
    engine: StreamingEngine

    def status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        group = {"ScaledObject": "keda.sh/v1alpha1/namespaces/{}/scaledobjects"}.get(
            kind, "autoscaling/v2/namespaces/{}/horizontalpodautoscalers"
        )
        path = f"/apis/{group.format(self.client.namespace)}/{name}/status"
        asked = Asked("PATCH", None, None, path, "the test's API server", "the test")
        merge = "application/merge-patch+json"
        self.client.transport.call(Request(asked, "PATCH", path, {}, {"status": status}, merge))

    def conditions(self, **changed: str) -> None:
        """Of the ScaledObject."""
        states = {"Ready": "True", "Fallback": "False", "Paused": "False"} | changed
        conditions = [{"type": k, "status": v, "message": f"is {v}"} for k, v in states.items()]
        self.status("ScaledObject", self.release.name, {"conditions": conditions})

    def hpa(self, metrics: int = 2, active: str = "True") -> None:
        """Status of the HPA."""
        names = [f"s{i}" for i in range(metrics)]
        external = [
            {
                "type": "External",
                "external": {"metric": {"name": name}, "current": {"averageValue": "0"}},
            }
            for name in names
        ]
        conditions = [
            {"type": "AbleToScale", "status": "True"},
            {"type": "ScalingActive", "status": active, "message": "unable to get metric"},
        ]
        status = {
            "conditions": conditions,
            "currentMetrics": external,
            "currentReplicas": 1,
            "desiredReplicas": 1,
        }
        self.status("HorizontalPodAutoscaler", f"keda-hpa-{self.release.name}", status)

    def prove(self, deadline_s: float = 10) -> keda.TriggerProof:
        return keda.prove_trigger(self.client, self.release, deadline_s=deadline_s)


def comes_to_rest(engine: StreamingEngine) -> bool:
    """Within 10 s."""
    deadline = time.monotonic() + 10
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.05)
    return engine.running == 0


@pytest.fixture
def setting(
    client: Client,
    node: SimulatedNode,
    model: ModelSpec,
    cluster: ClusterSpec,
    stub: StubPrometheus,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Setting]:
    monkeypatch.setattr(keda, "LOOK_SECONDS", 0.1)
    release = Release(model, cluster, "a" * 40, "blue", "run-1", 60)
    client.apply(manifests.deployment(release))
    keda.apply_scaled_object(client, release, Thresholds(8, 1, 0.9, 60.0), min_replicas=1)
    with (
        playing(node, release, comes_up),
        serving(stub.engine) as engine,
        keda_stand_in(client, release.name),
    ):
        monkeypatch.setattr(keda, "PORT", engine.port)
        monkeypatch.setattr(own_requests, "PORT", engine.port)
        setting = Setting(client, release, stub, engine)
        setting.conditions()
        setting.hpa()
        setting.prove(deadline_s=15)
        # The engine notices a cut request at its next token.
        assert comes_to_rest(engine)
        engine.posts.clear()
        yield setting


def test_a_proof(setting: Setting) -> None:
    setting.engine.waiting = 1
    proof = setting.prove()
    assert proof.requests == 2
    assert proof.value == proof.pods_value
    assert 1 <= proof.value <= 3, "its own requests and the one that waits"
    assert (proof.series, proof.replicas) == (1, 1)
    assert proof.hpa == f"keda-hpa-{setting.release.name}"
    scaled = setting.client.get("ScaledObject", setting.release.name)
    assert proof.query == scaled["spec"]["triggers"][0]["metadata"]["query"]
    assert proof.query in setting.prometheus.queries, "exactly KEDA's query was asked"


def test_the_proof_makes_its_own_load_and_takes_it_away(setting: Setting) -> None:
    setting.prove()
    assert 1 <= len(setting.engine.posts) <= 2
    for body in setting.engine.posts:
        assert body["model"] == setting.release.model.served_name
        assert (body["temperature"], body["ignore_eos"]) == (0, True)
        # 20 s of tokens: ended by the proof, not by themselves.
        assert body["max_tokens"] == own_requests.MAX_TOKENS
    assert comes_to_rest(setting.engine)


def test_short_requests_are_sent_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_requests, "MAX_TOKENS", 5)
    setting.prometheus.in_flight = [0.0]
    with pytest.raises(keda.AutoscalingNotProven):
        setting.prove(deadline_s=2)
    assert len(setting.engine.posts) > 4
    setting.prometheus.in_flight = None
    assert setting.prove().value > 0


@pytest.mark.parametrize(
    ("length", "tokens"), [(200, 136), (None, SMOLLM.traffic.output_tokens.most)]
)
def test_requests_fit_the_context(setting: Setting, length: int | None, tokens: int) -> None:
    setting.engine.max_model_len = length
    setting.prove()
    assert setting.engine.posts[0]["max_tokens"] == tokens


@pytest.mark.parametrize(
    ("in_flight", "replicas", "requests"), [(1, 1, 1), (1, 2, 2), (2, 1, 2), (40, 3, 2)]
)
def test_the_proof_alone_scales_nothing_up(
    cluster: ClusterSpec, model: ModelSpec, in_flight: int, replicas: int, requests: int
) -> None:
    release = Release(model, cluster, "a" * 40, "blue", "run-1", 60)
    thresholds = Thresholds(in_flight, 1, 0.9, 60.0)
    assert keda._bearable(manifests.scaled_object(release, thresholds, replicas)) == requests


def test_at_rest_nothing_is_proven(setting: Setting) -> None:
    setting.engine.refuses = True
    with pytest.raises(keda.AutoscalingNotProven) as error:
        setting.prove(deadline_s=1.5)
    assert "gives 0, the Pods' own /metrics 0 to 0" in str(error.value)
    assert "own requests fail: POST /v1/completions of Pod" in str(error.value)
    assert "no such model" in str(error.value)


def scaled_patch(setting: Setting, patch: dict[str, Any]) -> None:
    setting.client.patch("ScaledObject", setting.release.name, patch)


BREAKS: dict[str, tuple[Callable[[Setting], Any], str]] = {
    "no series": (lambda s: setattr(s.prometheus, "in_flight", []), "gives 0 series"),
    "two series": (lambda s: setattr(s.prometheus, "in_flight", [1.0, 1.0]), "gives 2 series"),
    "no number": (lambda s: setattr(s.prometheus, "in_flight", [math.nan]), "it must be one"),
    "stale": (lambda s: setattr(s.prometheus, "age", 60.0), "the newest sample is 60 s old"),
    "two monitors": (lambda s: setattr(s.prometheus, "series", 2), "a second monitor"),
    "wrong sum": (lambda s: setattr(s.prometheus, "in_flight", [9.0]), "gives 9, the Pods' own"),
    "away": (lambda s: setattr(s.prometheus, "broken", 503), "answers 503"),
    "not ready": (lambda s: s.conditions(Ready="False"), "has Ready=False: is False"),
    "fallback": (lambda s: s.conditions(Fallback="True"), "has Fallback=True"),
    "paused": (lambda s: s.conditions(Paused="True"), "has Paused=True"),
    "inactive": (lambda s: s.hpa(active="False"), "not ScalingActive: unable to get metric"),
    "one of two metrics": (lambda s: s.hpa(metrics=1), "has got 1 of its 2 metrics"),
    "other limits": (
        lambda s: scaled_patch(s, {"spec": {"maxReplicaCount": 9}}),
        "has the limits",
    ),
    "too few replicas": (
        lambda s: scaled_patch(s, {"spec": {"minReplicaCount": 2}}),
        "has 1 of 2 replicas ready",
    ),
    "no HPA": (
        lambda s: s.client.delete("HorizontalPodAutoscaler", f"keda-hpa-{s.release.name}"),
        "KEDA has made no HorizontalPodAutoscaler",
    ),
    "no ScaledObject": (
        lambda s: s.client.delete("ScaledObject", s.release.name),
        "there is no ScaledObject",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_link_is_named(setting: Setting, what: str) -> None:
    break_it, why = BREAKS[what]
    break_it(setting)
    with pytest.raises(keda.AutoscalingNotProven, match="autoscaling not proven") as error:
        setting.prove(deadline_s=0.5)
    assert why in str(error.value)


def test_a_link_that_comes_late_is_waited_for(setting: Setting) -> None:
    setting.conditions(Ready="Unknown")
    later = threading.Timer(0.5, setting.conditions)
    later.start()
    assert setting.prove(deadline_s=10).value > 0
    later.join()


def test_resumed_only_when_keda_says_so(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keda, "RESUME_SECONDS", 0.5)
    client, spec = setting.client, setting.release
    keda.pause(client, spec.model, "blue", 1)
    assert slots.annotations(client.get("ScaledObject", spec.name))[keda.PAUSED] == "1"
    setting.conditions(Paused="True")
    with pytest.raises(keda.AutoscalingNotProven, match=r"not resumed: .* has Paused=True"):
        keda.resume(client, spec.model, "blue")
    setting.conditions()
    keda.resume(client, spec.model, "blue")


def test_a_slot_without_scaler(client: Client, lab_cluster: ClusterSpec, model: ModelSpec) -> None:
    keda.pause(client, model, "blue", 0)
    keda.resume(client, model, "blue")
    keda.remove(client, model, "blue")


def test_removal_goes_on_without_keda(
    client: Client,
    lab_cluster: ClusterSpec,
    model: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keda, "REMOVE_SECONDS", 1.0)
    name = live(client, Release(model, lab_cluster, "a" * 40, "blue", "r", 60), "blue", "r")
    finalizer = {"metadata": {"finalizers": ["finalizer.keda.sh/test"]}}
    client.patch("ScaledObject", name, finalizer)
    said: list[str] = []
    keda.remove(client, model, "blue", progress=said.append)
    assert "has not removed its finalizer" in said[-1]
    client.patch("ScaledObject", name, {"metadata": {"finalizers": None}})
    assert gone(client, "ScaledObject", name)


def test_how_many_replicas_take_over(
    client: Client, lab_cluster: ClusterSpec, model: ModelSpec
) -> None:
    assert keda.candidate_min_replicas(client, model, lab_cluster) == 1
