"""The manifests of KEDA and of prometheus-operator's kinds, taken from their Go modules.

What is applied on the lab is what the projects publish with the version that is built, but for
images, start-up probes (the published ones wait up to 25 s) and resource requests.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Obj = dict[str, Any]

IMAGE = "lab.local/keda:1"
USER = 1000
KEDA_FILES = (  # in the order of KEDA's own kustomization
    "general/namespace.yaml",
    "crd/bases/*.yaml",
    "service_account/service_account.yaml",
    "rbac/role.yaml",
    "rbac/role_binding.yaml",
    "metrics-server/role.yaml",
    "metrics-server/role_binding.yaml",
    "metrics-server/service.yaml",
    "metrics-server/api_service.yaml",
    "manager/service.yaml",
    "webhooks/service.yaml",
    "webhooks/validation_webhooks.yaml",
    "manager/manager.yaml",
    "metrics-server/deployment.yaml",
    "webhooks/webhooks.yaml",
)
MONITORING_KINDS = ("prometheuses", "podmonitors", "servicemonitors", "probes", "prometheusrules")
"""The kinds of prometheus-operator without which it doesn't run a Prometheus."""

# Two kinds hold a whole Pod's schema, whose descriptions are most of a megabyte that the API server
# would read at each start of the lab.
_WITHOUT_DESCRIPTIONS = {"prometheuses.monitoring.coreos.com", "scaledjobs.keda.sh"}


def keda(module: Path) -> list[Obj]:
    """All objects of KEDA, in the order to apply them, from its module's folder."""
    config = module / "config"
    files = [path for pattern in KEDA_FILES for path in sorted(config.glob(pattern))]
    objects = [_lean(obj) for path in files for obj in _read(path)]
    for obj in objects:
        if obj["kind"] == "Deployment":
            _adapt(obj)
    return objects


def monitoring(module: Path) -> list[Obj]:
    """The CustomResourceDefinitions that prometheus-operator needs, from its module's folder."""
    folder = module / "example" / "prometheus-operator-crd"
    return [
        _lean(obj)
        for kind in MONITORING_KINDS
        for obj in _read(folder / f"monitoring.coreos.com_{kind}.yaml")
    ]


def _read(path: Path) -> Iterator[Obj]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for obj in yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader):
        if obj:
            yield obj


def _adapt(deployment: Obj) -> None:
    pod = deployment["spec"]["template"]["spec"]
    pod["securityContext"]["runAsUser"] = USER
    pod["terminationGracePeriodSeconds"] = 1
    for container in pod["containers"]:
        container["image"] = IMAGE
        container["imagePullPolicy"] = "Never"
        container["resources"] = {"requests": {"cpu": "10m", "memory": "50Mi"}}
        container["readinessProbe"] |= {
            "initialDelaySeconds": 0,
            "periodSeconds": 1,
            "failureThreshold": 60,
        }
        container["livenessProbe"] |= {"periodSeconds": 10, "failureThreshold": 6}


def _lean(obj: Obj) -> Obj:
    if obj["metadata"]["name"] in _WITHOUT_DESCRIPTIONS:
        for version in obj["spec"]["versions"]:
            _drop_descriptions(version["schema"]["openAPIV3Schema"])
    return obj


def _drop_descriptions(schema: Obj) -> None:
    """Removes `description` from a schema, but not a property of that name."""
    schema.pop("description", None)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            _drop_descriptions(schema[key])
    for inner in schema.get("properties", {}).values():
        _drop_descriptions(inner)
