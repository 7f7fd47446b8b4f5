"""Make kubernetes-1.34.json: the definitions of Kubernetes' OpenAPI that our objects need.

    python tests/schemas/extract.py <k8s.io/kubernetes@v1.34.4>/api/openapi-spec/swagger.json

Unknown fields are refused there, as the API server does with fieldValidation=Strict.
"""

import json
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("kubernetes-1.34.json")
KINDS = (
    "api.core.v1.Namespace",
    "api.core.v1.PersistentVolumeClaim",
    "api.core.v1.ServiceAccount",
    "api.core.v1.Service",
    "api.core.v1.ConfigMap",
    "api.core.v1.Pod",
    "api.apps.v1.Deployment",
    "api.batch.v1.Job",
    "api.policy.v1.PodDisruptionBudget",
    "api.networking.v1.NetworkPolicy",
    "api.rbac.v1.Role",
    "api.rbac.v1.RoleBinding",
    "api.rbac.v1.ClusterRole",
    "api.rbac.v1.ClusterRoleBinding",
)
KEPT = ("type", "properties", "items", "required", "additionalProperties", "enum", "$ref")


def main(swagger: str) -> None:
    definitions = json.loads(Path(swagger).read_text())["definitions"]
    wanted = [f"io.k8s.{kind}" for kind in KINDS]
    out: dict[str, Any] = {}
    while wanted:
        name = wanted.pop()
        if name not in out:
            out[name] = strict(definitions[name])
            wanted += references(out[name])
    OUT.write_text(json.dumps({"definitions": dict(sorted(out.items()))}, indent=1) + "\n")


def strict(schema: Any) -> Any:
    """Without prose, and closed."""
    if schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    kept = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in kept:
        kept["properties"] = {name: strict(sub) for name, sub in kept["properties"].items()}
        kept.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = strict(kept[key])
    return kept


def references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for item in schema for name in references(item)]
    if not isinstance(schema, dict):
        return []
    here = schema.get("$ref")
    found = [here.rpartition("/")[2]] if isinstance(here, str) else []
    return found + [name for value in schema.values() for name in references(value)]


if __name__ == "__main__":
    main(sys.argv[1])
