"""Every rendered object is what its API knows: no unknown field, nothing missing, right types."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft4Validator, ValidationError

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.release import Obj
from tests.k8s.manifests import rendered

SCHEMAS = Path(__file__).parents[2] / "schemas"
CRDS = {
    "ScaledObject": "keda.sh_scaledobjects.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
}
GROUPS = {
    "v1": "api.core.v1",
    "apps/v1": "api.apps.v1",
    "batch/v1": "api.batch.v1",
    "policy/v1": "api.policy.v1",
    "networking.k8s.io/v1": "api.networking.v1",
    "rbac.authorization.k8s.io/v1": "api.rbac.v1",
}
# RFC 1123 labels, as most kinds want them for their names.
MAX_NAME = 63


@cache
def kubernetes() -> dict[str, Any]:
    definitions: dict[str, Any] = json.loads((SCHEMAS / "kubernetes-1.34.json").read_text())
    return definitions


@cache
def crd(kind: str) -> dict[str, Any]:
    document = yaml.safe_load((SCHEMAS / CRDS[kind]).read_text())
    schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    closed: dict[str, Any] = close(schema)
    # The API server itself knows metadata.
    closed["properties"]["metadata"] = {"type": "object"}
    return closed


def close(schema: Any) -> Any:
    """Refuse unknown fields, as the API server does with fieldValidation=Strict."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: close(value) for key, value in schema.items() if key != "format"}
    is_schema = isinstance(schema.get("type"), str) and isinstance(schema.get("properties"), dict)
    if is_schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def validate(obj: Obj) -> None:
    if obj["kind"] in CRDS:
        Draft4Validator(crd(obj["kind"])).validate(obj)
        return
    name = f"io.k8s.{GROUPS[obj['apiVersion']]}.{obj['kind']}"
    Draft4Validator({"$ref": f"#/definitions/{name}", **kubernetes()}).validate(obj)


@pytest.mark.parametrize(
    ("model", "cluster"),
    [pytest.param(m, c, id=f"{m.name} on {c.name}") for m, c in rendered.pairs()],
)
def test_every_object_of_every_model_and_cluster(model: ModelSpec, cluster: ClusterSpec) -> None:
    objects = rendered.objects(model, cluster)
    for obj in objects:
        validate(obj)
        assert len(obj["metadata"]["name"]) <= MAX_NAME
        assert obj["metadata"]["labels"]["app.kubernetes.io/managed-by"]
    identities = [
        (o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects
    ]
    assert len(set(identities)) == len(identities)


def test_the_catalog_has_pairs_on_every_cluster() -> None:
    assert {c.name for _, c in rendered.pairs()} == {
        "lab",
        "lab-vllm",
        "eks-example",
        "gke-example",
    }


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "PodMonitor", "Job", "Service"])
def test_the_schemas_refuse_unknown_fields(kind: str) -> None:
    obj = copy.deepcopy(next(o for o in rendered.everything() if o["kind"] == kind))
    obj["spec"]["replicaz"] = 1
    with pytest.raises(ValidationError, match="replicaz"):
        validate(obj)


def test_the_schemas_refuse_wrong_types() -> None:
    obj = copy.deepcopy(next(o for o in rendered.everything() if o["kind"] == "Deployment"))
    obj["spec"]["template"]["spec"]["containers"][0]["args"] = "--model x"
    with pytest.raises(ValidationError):
        validate(obj)
