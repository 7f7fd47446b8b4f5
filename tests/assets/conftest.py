"""A real API server, and a cluster resource that holds a model in it as a promotion does."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.promotion import Promotion
from assets.resources import Cluster, Context, Reports
from catalog import ClusterSpec, ModelSpec
from catalog.load import catalog
from k8s import manifests
from k8s.client import Client, connect
from k8s.errors import AlreadyExists
from k8s.lease import Lease
from tests.k8s.conftest import client, kubeconfig, namespace, own_server

__all__ = ["client", "kubeconfig", "namespace", "own_server"]

MODEL = "smollm2-135m"
TTL_S = 3.0
SCALED_OBJECTS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "scaledobjects.keda.sh"},
    "spec": {
        "group": "keda.sh",
        "scope": "Namespaced",
        "names": {"kind": "ScaledObject", "plural": "scaledobjects", "singular": "scaledobject"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


class BareCluster(Cluster):
    """The lab's spec in a namespace of the bare API server. Holds the Lease; no preflight, since
    there is no platform to look at."""

    namespace: str

    def promotion(self, context: Context) -> Promotion:
        if self._promotion is None:
            cluster = spec(self.namespace)
            client = connect(cluster)
            lease = Lease.acquire(client, f"promotion-{MODEL}", context.run_id, ttl_s=TTL_S)
            lease.__enter__()
            self._promotion = Promotion(
                client, cluster, model(), context.run_id, lease, context.log
            )
        self._promotion.log = context.log
        return self._promotion


def model() -> ModelSpec:
    return catalog().model(MODEL)


def spec(namespace: str) -> ClusterSpec:
    return catalog().cluster("lab").model_copy(update={"namespace": namespace})


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
def bare(client: Client, namespace: str, tmp_path: Path) -> Callable[[dg.JobDefinition], Ran]:
    """Runs a job with the resources that stages have."""
    with contextlib.suppress(AlreadyExists):
        client.create(SCALED_OBJECTS)
    client.delete("Lease", f"promotion-{MODEL}")

    def run(job: dg.JobDefinition) -> Ran:
        with dg.DagsterInstance.ephemeral() as instance:
            result = job.execute_in_process(
                instance=instance,
                tags={"dagster/partition": MODEL},
                raise_on_error=False,
                resources={
                    "cluster": BareCluster(name="lab", namespace=namespace),
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
