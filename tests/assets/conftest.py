"""A real API server, and a cluster resource that holds a model in it as a promotion does."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import promotion
from assets.promotion import Promotion
from assets.resources import Admission, Cluster, Context, Reports, begin
from catalog import ClusterSpec
from catalog.load import catalog
from k8s import manifests
from k8s.client import Client
from tests.k8s.conftest import (
    client,
    faults,
    faulty,
    kubeconfig,
    name,
    namespace,
    node,
    own_server,
    server,
)
from tests.k8s.test_rollout import cluster, model

__all__ = [
    "client",
    "cluster",
    "faults",
    "faulty",
    "kubeconfig",
    "model",
    "name",
    "namespace",
    "node",
    "own_server",
    "server",
]

MODEL = "smollm2-135m"
TTL_S = 3.0


class BareCluster(Cluster):
    """The lab's spec, in a namespace of the bare API server."""

    namespace: str
    jobs_image: str = ""

    def promotion(self, context: Context, admit: Admission | None = None) -> Promotion:
        if self._promotion is None:
            lab = catalog().cluster("lab")
            images = lab.images.model_copy(
                update={"jobs": self.jobs_image} if self.jobs_image else {}
            )
            bare = lab.model_copy(update={"namespace": self.namespace, "images": images})
            self._promotion = begin(context, bare, catalog().model(MODEL), admit)
        self._promotion.log = context.log
        return self._promotion


@dataclass
class Ran:
    """A run of a job that has ended, and what it left."""

    result: dg.ExecuteInProcessResult
    client: Client
    folder: Path

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "stages.jsonl").open()]

    @property
    def holder(self) -> str:
        lease = self.client.get("Lease", f"promotion-{MODEL}")
        return str(lease["spec"].get("holderIdentity") or "")

    def replicas(self, slot: str) -> int:
        return int(self.client.get("Deployment", f"{MODEL}-{slot}")["spec"]["replicas"])

    def failure(self, step: str) -> Any:
        """Dagster's error of a failed step."""
        data = self.result.failure_data_for_node(step)
        assert data is not None
        return data.error


@pytest.fixture
def bare(
    client: Client, cluster: ClusterSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Runs a job with the resources that stages have, on a cluster with nothing of ours in it."""
    monkeypatch.setattr(promotion, "LEASE_TTL_S", TTL_S)
    client.delete("Lease", f"promotion-{MODEL}")
    client.delete("Service", MODEL)
    for slot in ("blue", "green"):
        client.delete("Deployment", f"{MODEL}-{slot}")

    def run(job: dg.JobDefinition, instance: dg.DagsterInstance | None = None) -> Ran:
        own = nullcontext(instance) if instance else dg.DagsterInstance.ephemeral()
        with own as kept:
            result = job.execute_in_process(
                instance=kept,
                tags={"dagster/partition": MODEL},
                raise_on_error=False,
                resources={
                    "cluster": BareCluster(name="lab", namespace=cluster.namespace),
                    "reports": Reports(folder=str(tmp_path)),
                },
            )
        return Ran(result, client, tmp_path / MODEL / result.run_id)

    return run


def candidate(promotion: Promotion, slot: manifests.Slot = "green") -> None:
    """A Deployment of this promotion, as the rollout makes it; no node runs it."""
    release = manifests.Release(
        promotion.model, promotion.cluster, "a" * 40, slot, promotion.id, 60
    )
    promotion.client.apply(manifests.deployment(release))
    promotion.client.scale("Deployment", release.name, 1)
