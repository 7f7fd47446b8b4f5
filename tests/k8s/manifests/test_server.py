"""Every rendered object is taken by a real API server, by server-side dry run."""

from collections.abc import Iterator

import pytest

from catalog import ClusterSpec, ModelSpec
from k8s import manifests
from k8s.client import Client
from k8s.errors import Invalid
from k8s.manifests.platform import prometheus_namespace
from tests.k8s.manifests import rendered
from tests.k8s.test_rollout import install_crds

PAIRS = [pytest.param(m, c, id=f"{m.name} on {c.name}") for m, c in rendered.pairs()]


@pytest.fixture
def server(server: object, client: Client, name: str) -> Iterator[Client]:
    """With an empty namespace: other tests leave objects that can't be changed into these."""
    install_crds(client)
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield Client(client.transport, name)
    client.delete("Namespace", name)


def here(cluster: ClusterSpec, client: Client) -> ClusterSpec:
    """The cluster with the test's namespace, also as that of its Prometheus if it has one: a dry
    run, too, wants the namespaces to exist.
    """
    changed: dict[str, object] = {"namespace": client.namespace}
    if prometheus_namespace(cluster):
        address = "http://prometheus.default.svc:9090"
        changed["prometheus"] = cluster.prometheus.model_copy(update={"address": address})
    return cluster.model_copy(update=changed)


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_it_takes_every_object(server: Client, model: ModelSpec, cluster: ClusterSpec) -> None:
    objects = rendered.objects(model, here(cluster, server))
    for obj in objects:
        taken = server.apply(obj, dry_run=True)
        assert taken["metadata"]["name"] == obj["metadata"]["name"]
    kinds = {obj["kind"] for obj in objects}
    assert {"Namespace", "Role", "Deployment", "ScaledObject", "PodMonitor", "Job"} <= kinds


def test_it_refuses_what_no_schema_does(server: Client) -> None:
    model, cluster = rendered.pairs()[0]
    obj = manifests.deployment(rendered.release(model, here(cluster, server)))
    [engine] = obj["spec"]["template"]["spec"]["containers"]
    engine["resources"]["limits"]["memory"] = "plenty"
    with pytest.raises(Invalid, match="quantities must match"):
        server.apply(obj, dry_run=True)
