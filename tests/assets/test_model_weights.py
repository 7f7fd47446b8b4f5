"""One writer a commit, whichever model it is for: a real API server, a simulated node."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from assets import model_weights
from assets.model_revision import Revision
from assets.model_weights import fetch, only_writer
from assets.promotion import Promotion
from catalog import ClusterSpec, ModelSpec
from catalog.model import Adapter
from k8s import jobs
from k8s.client import Client, Obj
from k8s.errors import JobFailed
from k8s.lease import Lease
from k8s.manifests import ServedAdapter, adapter_job, download_job
from k8s.manifests.release import WEIGHTS, weights_key
from tests.k8s.simulated_node import SimulatedNode, SimulatedPod

COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_weights, "LEASE_TTL_S", 3.0)
    monkeypatch.setattr(model_weights, "DEADLINE_S", 60.0)


@pytest.fixture
def first(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Promotion:
    return begun(client, cluster, model, "run-1")


@pytest.fixture
def second(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Promotion:
    """Of another model with the same repository."""
    other = model.model_copy(update={"name": f"{model.name}-b"})
    return begun(client, cluster, other, "run-2")


def begun(client: Client, cluster: ClusterSpec, model: ModelSpec, run: str) -> Promotion:
    lease = Lease.acquire(client, f"promotion-{model.name}", run, ttl_s=300)
    log = logging.getLogger(f"test.{model.name}")
    log.setLevel("INFO")
    # No two tests share weights: the Lease is named by them.
    own = model.model_copy(update={"repo": f"org/{model.name.removesuffix('-b')}"})
    return Promotion(client, cluster, own, run, lease, log)


def job_of(promotion: Promotion) -> Obj:
    return download_job(promotion.model, promotion.cluster, COMMIT, promotion.id)


def holder(promotion: Promotion) -> str:
    lease = promotion.client.get("Lease", weights_key(promotion.model.repo, COMMIT))
    return str(lease["spec"].get("holderIdentity") or "")


def running(promotion: Promotion) -> list[str]:
    """The names of the Jobs that fetch these weights."""
    labels = {WEIGHTS: weights_key(promotion.model.repo, COMMIT)}
    return [job["metadata"]["name"] for job in jobs.running(promotion.client, labels)]


def said(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [line for line in caplog.messages if what in line]


def fetches(pod: SimulatedPod) -> None:
    pod.start()
    pod.say(event="result", commit=COMMIT)
    pod.end()


def test_adapters_are_fetched_after_the_model_and_served_by_their_commits(
    first: Promotion, node: SimulatedNode
) -> None:
    adapters = (
        Adapter(name="sql", repo=f"{first.model.repo}-sql", revision="main"),
        Adapter(name="legal", repo=f"{first.model.repo}-legal", revision="v2"),
    )
    first.model = first.model.model_copy(update={"adapters": adapters})
    revision = Revision(first.model.repo, "main", COMMIT, {"sql": "5" * 40, "legal": "6" * 40})
    order: list[str] = []

    def plays(job: Obj, **result: object) -> None:
        def script(pod: SimulatedPod) -> None:
            order.append(job["spec"]["template"]["spec"]["containers"][0]["command"][5])
            pod.start()
            pod.say(event="result", bytes=1000, manifest_digest="sha256:d", **result)
            pod.end()

        node.play(job["metadata"]["name"], script)

    whole = {"path": "/models/x", "files": 3, "read_bytes_per_s": 1e9}
    plays(job_of(first), commit=COMMIT, hit=True, **whole)
    for adapter, rank in zip(adapters, (4, 16), strict=True):
        commit = revision.adapters[adapter.name]
        job = adapter_job(first.model, first.cluster, adapter, commit, first.id, base=COMMIT)
        plays(job, commit=commit, hit=adapter.name == "sql", rank=rank)
    weights = fetch(first, revision, 0)
    assert order == [first.model.repo, adapters[0].repo, adapters[1].repo]
    assert weights.adapters == (
        ServedAdapter("sql", adapters[0].repo, "main", "5" * 40, 4, 1000, "sha256:d"),
        ServedAdapter("legal", adapters[1].repo, "v2", "6" * 40, 16, 1000, "sha256:d"),
    )
    assert not weights.hit, "one of them was fetched"


UNDER_WAY = "90 % of the first"


def first_fetches(pod: SimulatedPod, order: list[str], may_end: threading.Event) -> None:
    pod.start()
    pod.say(event="progress", message=UNDER_WAY)
    assert may_end.wait(30)
    order.append("the first ends")
    pod.say(event="result", commit=COMMIT)
    pod.end()


def then_fetches(pod: SimulatedPod, order: list[str]) -> None:
    order.append("the second begins")
    fetches(pod)


def test_two_models_of_one_commit_fetch_one_after_the_other(
    first: Promotion, second: Promotion, node: SimulatedNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    names = [job_of(promotion)["metadata"]["name"] for promotion in (first, second)]
    waited = threading.Event()
    order: list[str] = []
    node.play(names[0], lambda pod: first_fetches(pod, order, waited))
    node.play(names[1], lambda pod: then_fetches(pod, order))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(only_writer, first, job_of(first))
        while not said(caplog, UNDER_WAY) and not one.done():
            waited.wait(0.1)
        two = pool.submit(only_writer, second, job_of(second))
        line = f"is held by {first.model.name}/run-1 since 20"
        while not said(caplog, line) and not two.done():
            waited.wait(0.1)
        assert running(first) == [names[0]]
        waited.set()
        assert one.result(30).result["commit"] == two.result(30).result["commit"] == COMMIT
    assert order == ["the first ends", "the second begins"]
    assert said(caplog, line)
    assert holder(first) == ""


def test_the_job_of_a_killed_run_is_waited_for(
    first: Promotion, second: Promotion, node: SimulatedNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client = first.client
    orphan = job_of(first)
    seen = threading.Event()
    order: list[str] = []
    node.play(orphan["metadata"]["name"], lambda pod: first_fetches(pod, order, seen))
    node.play(job_of(second)["metadata"]["name"], lambda pod: then_fetches(pod, order))
    # What a run leaves that is killed now: its Job, and a Lease that nobody renews.
    Lease.acquire(client, weights_key(first.model.repo, COMMIT), "killed", ttl_s=1)
    client.create(orphan)
    with ThreadPoolExecutor(1) as pool:
        two = pool.submit(only_writer, second, job_of(second))
        while not said(caplog, UNDER_WAY) and not two.done():
            seen.wait(0.1)
        assert running(second) == [orphan["metadata"]["name"]]
        seen.set()
        assert two.result(30).result["commit"] == COMMIT
    assert order == ["the first ends", "the second begins"]
    assert said(caplog, f"{orphan['metadata']['name']} of run run-1 fetches these weights")
    assert holder(second) == ""


def test_a_killed_runs_job_that_fails_holds_nobody_up(
    first: Promotion, second: Promotion, node: SimulatedNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def fails(pod: SimulatedPod) -> None:
        pod.start()
        pod.say(event="error", error="Stalled", message="the Hub went silent")
        pod.end(1)

    node.play(job_of(first)["metadata"]["name"], fails)
    node.play(job_of(second)["metadata"]["name"], fetches)
    first.client.create(job_of(first))
    assert only_writer(second, job_of(second)).result["commit"] == COMMIT
    assert said(caplog, "the Hub went silent")


def test_the_lease_is_given_back_whatever_ends_the_download(
    first: Promotion, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(pod: SimulatedPod) -> None:
        assert holder(first) == f"{first.model.name}/run-1"
        pod.start()
        pod.say(event="error", error="GatedRepo", message="accept its terms")
        pod.end(1)

    node.play(job_of(first)["metadata"]["name"], fails)
    with pytest.raises(JobFailed, match="accept its terms"):
        only_writer(first, job_of(first))
    assert holder(first) == ""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_weights, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        only_writer(first, job_of(first))
    assert holder(first) == ""
