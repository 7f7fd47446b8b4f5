"""The nightly schedule asks for a run for each model that is live, and for no other."""

import contextlib
import datetime
from pathlib import Path

import dagster as dg
import pytest

from assets.resources import Cluster
from catalog.load import catalog
from k8s import records
from k8s.client import connect
from k8s.errors import AlreadyExists
from pipelines.definitions import defs
from pipelines.schedules import rebenchmark_nightly
from tests.assets.test_ttft_benchmark import record

NIGHT = datetime.datetime(2026, 11, 25, 3, tzinfo=datetime.UTC)


def tick() -> list[dg.RunRequest] | str | None:
    """Run requests, or why there are none."""
    with dg.build_schedule_context(
        scheduled_execution_time=NIGHT,
        repository_def=defs.get_repository_def(),
        resources={"cluster": Cluster(name="lab")},
    ) as context:
        data = rebenchmark_nightly.evaluate_tick(context)
    return list(data.run_requests or []) or data.skip_message


@pytest.mark.usefixtures("server")
def test_one_run_for_each_model_that_is_live(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    client = connect(catalog().cluster("lab"))
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": client.namespace}}
    with contextlib.suppress(AlreadyExists):
        client.create(namespace)
    said = tick()
    assert isinstance(said, str)
    assert "nothing has been promoted to cluster lab" in said

    records.write(client, record({}))
    asked = tick()
    assert isinstance(asked, list)
    assert [(run.partition_key, run.run_key) for run in asked] == [
        ("smollm2-135m", "smollm2-135m 2026-11-25")
    ]

    # One record that nobody can read is no reason to leave out the others.
    broken = records.name(catalog().model("llama-3.1-8b-instruct"))
    client.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": broken, "namespace": client.namespace},
            "data": {"current": "{"},
        }
    )
    asked = tick()
    assert isinstance(asked, list)
    assert [run.partition_key for run in asked] == ["smollm2-135m"]
    client.delete("ConfigMap", records.name(catalog().model("smollm2-135m")))
    said = tick()
    assert isinstance(said, str)
    assert f"ConfigMap {broken}, key current: is no record" in said
    client.delete("ConfigMap", broken)
