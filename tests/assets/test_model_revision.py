"""The revision of a run's config, before a Job asks the Hub for it."""

from pathlib import Path

import dagster as dg
import pytest

from assets.model_revision import checked, model_revision
from assets.partitions import MODELS
from assets.resources import Reports
from catalog import ClusterSpec
from k8s.client import Client
from k8s.manifests.release import MODEL as MODEL_LABEL
from tests.assets.conftest import MODEL, BareCluster


@dg.asset(partitions_def=MODELS, name="gpu_nodes")
def admitted() -> str:
    return "blue_green"


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("{{ x }}", "'{{ x }}' is no branch, tag or commit, e.g. main"),
        ("", "must not be empty, got ''"),
    ],
)
def test_what_is_no_revision_is_refused_in_the_catalogs_words(
    client: Client, cluster: ClusterSpec, tmp_path: Path, revision: str, said: str
) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ran = dg.materialize(
            [admitted, model_revision],
            instance=instance,
            partition_key=MODEL,
            tags={"dagster/partition": MODEL},
            raise_on_error=False,
            run_config={"ops": {"model_revision": {"config": {"revision": revision}}}},
            resources={
                "cluster": BareCluster(name="lab", namespace=cluster.namespace),
                "reports": Reports(folder=str(tmp_path)),
            },
        )
    failure = ran.failure_data_for_node("model_revision")
    assert failure is not None
    assert failure.error is not None
    assert f"ops: model_revision: config: revision: {said}" in failure.error.message
    assert list(failure.error.stack) == []
    assert client.list("Job", labels={MODEL_LABEL: MODEL}) == []


def test_a_branch_with_slashes_is_one() -> None:
    assert checked("refs/pr/3") == "refs/pr/3"
