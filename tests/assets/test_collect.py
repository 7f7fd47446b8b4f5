"""The job `collect` against a real API server; the node that runs its Job is simulated."""

import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import dagster as dg
import pytest

from assets import collect as module
from assets.collect import CollectConfig, summary
from assets.resources import Cluster
from catalog import ClusterSpec, ModelSpec
from k8s import collection, jobs, records
from k8s.client import Client
from k8s.errors import Unreachable
from k8s.jobs import JobResult
from k8s.lease import Lease
from k8s.manifests import Release
from k8s.manifests.jobs import COLLECT
from pipelines.jobs import collect
from tests.k8s.simulated_node import SimulatedNode, SimulatedPod
from tests.k8s.test_rollout import record

LIVE, OLD = "a" * 40, "b" * 40
RESULT = {
    "dry_run": True, "removed": 1, "bytes": 5_000_000, "kept": 1, "foreign": 1, "left": 0,
    "free_bytes": 7_000_000_000, "short_bytes": 0,
}  # fmt: skip


def row(commit: str, *, removed: bool, why: str) -> dict[str, object]:
    return {
        "event": "progress", "message": f"{commit}: {why}", "repo": "org/model",
        "commit": commit, "size_bytes": 5_000_000, "last_used": "2026-11-25T02:00:00+00:00",
        "removed": removed, "why": why,
    }  # fmt: skip


def works(pod: SimulatedPod) -> None:
    pod.start()
    pod.say(**row(OLD, removed=True, why="unused for 40.0 days"))
    pod.say(**row(LIVE, removed=False, why="to be kept"))
    pod.say(event="progress", message="not touched", not_ours="/models/x", why="is no folder")
    pod.say(event="result", **RESULT)
    pod.end()


@pytest.fixture
def execute(
    client: Client, cluster: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dg.ExecuteInProcessResult]:
    """Runs the job in the test's namespace, without what other tests left there."""
    here = SimpleNamespace(cluster=lambda _: cluster)
    monkeypatch.setattr(module, "catalog", lambda: here)
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    for lease in client.list("Lease"):
        client.delete("Lease", lease["metadata"]["name"])

    def run(**config: object) -> dg.ExecuteInProcessResult:
        return collect.execute_in_process(
            run_config={"ops": {"collect_weights": {"config": config}}},
            resources={"cluster": Cluster(name="lab")},
            raise_on_error=False,
        )

    return run


@pytest.fixture
def live(client: Client, cluster: ClusterSpec, model: ModelSpec) -> Iterator[str]:
    """A model's record. Returns the model's name."""
    release = Release(model, cluster, LIVE, "blue", "run-1", 60)
    records.write(client, record(release, "t"))
    yield model.name
    client.delete("ConfigMap", records.name(model))


def play(node: SimulatedNode, client: Client, script: Callable[[SimulatedPod], None]) -> None:
    """Play the next Job of a collection."""
    before = {job["metadata"]["uid"] for job in client.list("Job")}
    stop = threading.Event()

    def look() -> None:
        for _ in range(300):
            for job in jobs.running(client, {collection.COMPONENT: COLLECT}):
                if job["metadata"]["uid"] not in before:
                    node.play(job["metadata"]["name"], script)
                    return
            stop.wait(0.1)

    threading.Thread(target=look, daemon=True).start()


def message(result: dg.ExecuteInProcessResult) -> str:
    data = result.failure_data_for_node("collect_weights")
    assert data is not None and data.error is not None
    return data.error.message


def holder(client: Client) -> str:
    lease = client.find("Lease", collection.LEASE) or {}
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def test_the_table_says_what_becomes_of_everything_and_why(
    execute: Callable[..., dg.ExecuteInProcessResult],
    client: Client,
    node: SimulatedNode,
    live: str,
) -> None:
    play(node, client, works)
    result = execute()
    assert result.success
    [output] = [event for event in result.all_events if event.is_successful_output]
    metadata = output.step_output_data.metadata
    table, not_touched = metadata["weights"], metadata["not touched"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = [record.data for record in table.records]
    assert [(row["commit"], row["what"]) for row in rows] == [
        (OLD, "would be removed"),
        (LIVE, "kept"),
    ]
    assert rows[0]["why"] == "unused for 40.0 days"
    assert f"live as {live}" in str(rows[1]["why"])
    assert rows[0]["MB"] == 5.0
    assert not_touched.value == {"/models/x": "is no folder"}
    [job] = client.list("Job", labels={"vllm-promotion.io/promotion": result.run_id})
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert LIVE in command
    assert {"--dry-run", "--older-than=30.0"} < set(command)
    assert holder(client) == ""


def test_an_error_of_the_program_is_one_message(
    execute: Callable[..., dg.ExecuteInProcessResult],
    client: Client,
    node: SimulatedNode,
    live: str,
) -> None:
    def fails(pod: SimulatedPod) -> None:
        pod.start()
        pod.say(event="error", error="Damaged", message="the volume is on fire", next="x")
        pod.end(1)

    play(node, client, fails)
    result = execute(dry_run=False)
    assert not result.success
    assert "the volume is on fire" in message(result)
    assert holder(client) == ""


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"older_than_days": -1}, "older_than_days -1 is no age; give days, 0 or more"),
        ({"older_than_days": math.nan}, "older_than_days nan is no age"),
        ({"free": "lots"}, "free lots is no size; give bytes, or say 50GiB or 50GB"),
        ({"free": "-5GB"}, "free -5GB is no size"),
        (
            {"older_than_days": None},
            "nothing says what to remove; give older_than_days DAYS, free SIZE, or both",
        ),
    ],
)
def test_what_can_not_be_is_refused_before_the_cluster_is_asked(
    execute: Callable[..., dg.ExecuteInProcessResult],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, object],
    why: str,
) -> None:
    monkeypatch.setattr(module, "connect", lambda _: pytest.fail("it asks the cluster"))
    result = execute(**config)
    assert not result.success
    assert f"ops: collect_weights: config: {why}" in message(result)


def test_a_record_that_can_not_be_read_starts_no_job(
    execute: Callable[..., dg.ExecuteInProcessResult], client: Client, live: str, name: str
) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"promotion-record-x{name}"},
        "data": {"previous": "?"},
    }
    client.create(config)
    before = len(client.list("Job", labels={collection.COMPONENT: COLLECT}))
    try:
        result = execute(dry_run=False)
    finally:
        client.delete("ConfigMap", f"promotion-record-x{name}")
    assert not result.success
    assert f"promotion-record-x{name}, key previous" in message(result)
    assert len(client.list("Job", labels={collection.COMPONENT: COLLECT})) == before
    assert holder(client) == ""


def test_where_nothing_is_in_use_nothing_is_removed(
    execute: Callable[..., dg.ExecuteInProcessResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "in_use", lambda _: {})
    result = execute(dry_run=False)
    assert not result.success
    assert "nothing was promoted there" in message(result)


def test_a_second_collection_is_refused(
    execute: Callable[..., dg.ExecuteInProcessResult], client: Client, live: str
) -> None:
    Lease.acquire(client, collection.LEASE, "another")
    result = execute()
    assert not result.success
    assert "held by another" in message(result)
    assert holder(client) == "another"


def test_a_lease_that_can_not_be_given_back_fails_no_collection(
    execute: Callable[..., dg.ExecuteInProcessResult],
    client: Client,
    node: SimulatedNode,
    live: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(_: Lease) -> None:
        raise Unreachable("the API server is away")

    monkeypatch.setattr(Lease, "release", away)
    play(node, client, works)
    assert execute().success


def test_what_ends_the_run_ends_its_job(
    execute: Callable[..., dg.ExecuteInProcessResult],
    client: Client,
    live: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(client: Client, job: dict[str, object], **_: object) -> None:
        client.create(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_job", interrupted)
    with pytest.raises(BaseException):  # noqa: B017
        assert not execute(dry_run=False).success
        raise RuntimeError
    assert jobs.running(client, {collection.COMPONENT: COLLECT}) == []
    assert holder(client) == ""


def test_the_line_says_when_so_much_can_not_be_freed() -> None:
    assert summary(RESULT) == ("1 would be removed (5 MB), 1 kept, 1 not touched; 7.0 GB free")
    short = {**RESULT, "dry_run": False, "short_bytes": 2_500_000_000}
    assert summary(short).endswith("7.0 GB free, 2.5 GB less than asked: the rest is in use")


@pytest.mark.parametrize(("short_bytes", "level"), [(0, "INFO"), (2_500_000_000, "WARNING")])
def test_space_that_can_not_be_made_is_a_warning(
    execute: Callable[..., dg.ExecuteInProcessResult],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    short_bytes: int,
    level: str,
) -> None:
    ended = JobResult({**RESULT, "short_bytes": short_bytes}, (), "pod", "node", 1.0)
    monkeypatch.setattr(module, "run", lambda *_: (ended, {}))
    assert execute(dry_run=False).success
    [line] = [line for line in capfd.readouterr().err.splitlines() if "GB free" in line]
    assert level in line


def test_by_default_nothing_is_removed() -> None:
    assert CollectConfig().dry_run
