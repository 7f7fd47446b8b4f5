"""What is in use, as a real API server has it; and who waits for whom."""

import threading
from collections.abc import Iterator

import pytest

from catalog import ClusterSpec
from catalog.load import catalog
from k8s import collection, jobs, manifests, records
from k8s.client import Client, Obj
from k8s.errors import KubernetesError, LeaseHeld
from k8s.lease import Lease
from k8s.manifests import Release, ServedAdapter
from k8s.manifests.release import PROMOTION, weights_key
from tests.k8s.simulated_node import SimulatedNode, patch_status
from tests.k8s.test_rollout import record

LIVE, BEFORE, NEXT, ADAPTER, OTHER = ("1" * 40, "2" * 40, "3" * 40, "4" * 40, "5" * 40)


@pytest.fixture
def client(client: Client, server: object, name: str) -> Iterator[Client]:
    """With a namespace of its own: all of it is looked at."""
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield Client(client.transport, name)
    client.delete("Namespace", name)


@pytest.fixture
def cluster(client: Client) -> ClusterSpec:
    return catalog().cluster("lab").model_copy(update={"namespace": client.namespace})


@pytest.fixture
def release(cluster: ClusterSpec) -> Release:
    """Of a model that the catalog no longer has."""
    retired = catalog().model("smollm2-135m").model_copy(update={"name": "retired.1"})
    return Release(retired, cluster, LIVE, "blue", "run-1", startup_seconds=60)


def of(release: Release, commit: str, run: str, **more: object) -> records.PromotionRecord:
    return record(release, "t", run).model_copy(update={"commit": commit, **more})


def pod(name: str, client: Client, *arguments: str) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": client.namespace},
        "spec": {"containers": [{"name": "c", "image": "i", "args": list(arguments)}]},
    }


def test_nothing_is_in_use_where_nothing_was_promoted(client: Client) -> None:
    assert collection.in_use(client) == {}


def test_all_records_count_also_of_models_that_are_gone(client: Client, release: Release) -> None:
    adapter = ServedAdapter("sql", "lab/lora", "main", ADAPTER, 4, 1, "sha256:d")
    records.write(client, of(release, BEFORE, "run-0", adapters=(adapter,)))
    records.write(client, of(release, LIVE, "run-1"))
    records.announce(client, of(release, NEXT, "run-2"))
    assert collection.in_use(client) == {
        BEFORE: "rollback of retired.1",
        ADAPTER: "rollback of retired.1",
        LIVE: "live as retired.1",
        NEXT: "announced for retired.1",
    }


@pytest.mark.parametrize("text", ["{not json", "{}", '{"format": 99}'])
@pytest.mark.parametrize("key", ["current", "previous", "next"])
def test_a_record_that_can_not_be_read_is_an_error(
    client: Client, release: Release, key: str, text: str
) -> None:
    records.write(client, of(release, LIVE, "run-1"))
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "promotion-record-other"},
        "data": {key: text},
    }
    client.create(config)
    with pytest.raises(KubernetesError, match=f"promotion-record-other, key {key}"):
        collection.in_use(client)


def test_both_slots_count_and_whatever_else_names_a_commit(
    client: Client, release: Release
) -> None:
    client.apply(manifests.deployment(release))
    green = Release(release.model, release.cluster, BEFORE, "green", "run-0", 60)
    client.apply(manifests.deployment(green))
    client.create(pod("by-hand", client, f"--model=/models/org/repo/{OTHER}/"))
    client.create(pod("ended", client, f"/models/org/repo/{NEXT}"))
    client.create(pod("digest", client, "i@sha256:" + "9" * 64))
    patch_status(client, "ended", {"phase": "Succeeded"})
    uses = collection.in_use(client)
    assert set(uses) == {LIVE, BEFORE, OTHER}
    assert "Deployment retired-1-blue" in uses[LIVE]
    assert "Deployment retired-1-green" in uses[BEFORE]
    assert uses[OTHER] == "Pod by-hand"


def test_a_promotion_under_way_counts_from_its_fetch_on(client: Client, release: Release) -> None:
    model, cluster = release.model, release.cluster
    lease = Lease.acquire(client, weights_key(model.repo, LIVE), "retired.1/run-1")
    assert collection.in_use(client) == {LIVE: "fetched by retired.1/run-1"}
    job = manifests.download_job(model, cluster, LIVE, "run-1")
    client.create(job)
    lease.release()
    assert "promotion run-1 is under way" in collection.in_use(client)[LIVE]
    _end(client, job)
    assert collection.in_use(client) == {}, "its run has ended"
    run = Lease.acquire(client, "promotion-retired-1", "run-1")
    assert collection.in_use(client) == {LIVE: "promotion run-1 is under way"}
    run.release()
    assert collection.in_use(client) == {}


def _end(client: Client, job: Obj) -> None:
    """As its controller says when it has failed: then it runs no longer, and has no Pod."""
    name = job["metadata"]["name"]
    client.patch("Job", name, {"spec": {"activeDeadlineSeconds": 1}})
    done = threading.Event()
    for _ in range(300):
        pods = client.list("Pod", labels={"batch.kubernetes.io/job-name": name})
        for pod in pods:
            client.delete("Pod", pod["metadata"]["name"])
        if not pods and not jobs.running(client, {collection.COMPONENT: "weights"}):
            return
        done.wait(0.1)
    pytest.fail(f"Job {name} doesn't end")


def test_who_fetches_waits_for_a_collection(client: Client) -> None:
    lease = collection.lock(client, "collector", print, wait_s=0)
    said: list[str] = []
    waiting = threading.Thread(target=collection.await_none, args=(client, "m/run-1", said.append))
    waiting.start()
    for _ in range(300):
        if said:
            break
        waiting.join(0.1)
    assert waiting.is_alive()
    assert "Lease weights-collection is held by collector" in said[0]
    lease.release()
    waiting.join(30)
    assert not waiting.is_alive()


def test_two_collections_do_not_run_at_once(client: Client) -> None:
    collection.lock(client, "one", print, wait_s=0)
    with pytest.raises(LeaseHeld, match="held by one"):
        collection.lock(client, "two", print, wait_s=0)


def test_the_job_of_a_killed_collection_is_ended_first(
    client: Client, cluster: ClusterSpec, own_node: SimulatedNode
) -> None:
    job = manifests.collect_job(
        cluster, "run-1", {LIVE}, older_than_days=30, free=None, dry_run=False
    )
    client.create(job)
    said: list[str] = []
    collection.await_none(client, "m/run-2", said.append)
    name = job["metadata"]["name"]
    assert said == [f"Job {name} of an earlier collection: deleted"]
    assert client.find("Job", name) is None
    assert not client.list("Pod", labels={PROMOTION: "run-1"})


@pytest.fixture
def own_node(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedNode]:
    from tests.k8s import simulated_node

    with simulated_node.start(client, tmp_path_factory.mktemp("node")) as node:
        yield node


def test_the_job_says_what_to_keep_and_has_no_token(cluster: ClusterSpec) -> None:
    job = manifests.collect_job(
        cluster, "run-1", {LIVE, BEFORE}, older_than_days=1.5, free="50GiB", dry_run=True
    )
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == [
        *("python", "-m", "weights", "collect", "--root", "/models"),
        *("--keep", LIVE, BEFORE, "--older-than=1.5", "--free=50GiB", "--dry-run"),
    ]
    assert not [variable for variable in container["env"] if variable["name"].startswith("HF_")]
    assert pod["automountServiceAccountToken"] is False
    assert container["volumeMounts"][0] == {"name": "models", "mountPath": "/models"}
