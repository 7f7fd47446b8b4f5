"""The kinds of objects that this project reads or writes, and their place in the API."""

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Kind:
    """One kind: where its objects live in the API. `needs` is what brings it, for a CRD."""

    name: str
    api_version: str
    plural: str
    namespaced: bool = True
    needs: str | None = None

    def path(self, namespace: str | None, name: str | None = None, subresource: str = "") -> str:
        """The URL path of the collection (None: of all namespaces) or of an object in it."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        path = root + self.api_version
        if self.namespaced and namespace is not None:
            path += "/namespaces/" + quote(namespace, safe="")
        path += "/" + self.plural
        if name is not None:
            path += "/" + quote(name, safe="")
        return path + ("/" + subresource if subresource else "")


_RBAC = "rbac.authorization.k8s.io/v1"
_KEDA = "KEDA (https://keda.sh/docs/latest/deploy/)"
_PROMETHEUS_OPERATOR = "the Prometheus operator (https://prometheus-operator.dev)"

KINDS = {
    kind.name: kind
    for kind in (
        Kind("Namespace", "v1", "namespaces", namespaced=False),
        Kind("Node", "v1", "nodes", namespaced=False),
        Kind("Pod", "v1", "pods"),
        Kind("Service", "v1", "services"),
        Kind("ConfigMap", "v1", "configmaps"),
        Kind("Secret", "v1", "secrets"),
        Kind("PersistentVolumeClaim", "v1", "persistentvolumeclaims"),
        Kind("ServiceAccount", "v1", "serviceaccounts"),
        Kind("Event", "v1", "events"),
        Kind("ResourceQuota", "v1", "resourcequotas"),
        Kind("EndpointSlice", "discovery.k8s.io/v1", "endpointslices"),
        Kind("Deployment", "apps/v1", "deployments"),
        Kind("ReplicaSet", "apps/v1", "replicasets"),
        Kind("Job", "batch/v1", "jobs"),
        Kind("Lease", "coordination.k8s.io/v1", "leases"),
        Kind("Role", _RBAC, "roles"),
        Kind("RoleBinding", _RBAC, "rolebindings"),
        Kind("ClusterRole", _RBAC, "clusterroles", namespaced=False),
        Kind("ClusterRoleBinding", _RBAC, "clusterrolebindings", namespaced=False),
        Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies"),
        Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets"),
        Kind("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers"),
        Kind("ScaledObject", "keda.sh/v1alpha1", "scaledobjects", needs=_KEDA),
        Kind("PodMonitor", "monitoring.coreos.com/v1", "podmonitors", needs=_PROMETHEUS_OPERATOR),
    )
}


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises KeyError with the known ones: that is a programming error."""
    try:
        return KINDS[name]
    except KeyError:
        raise KeyError(f"kind {name!r} is not in k8s/kinds.py; there are {sorted(KINDS)}") from None
