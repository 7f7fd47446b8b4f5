"""What a cluster needs once, applied by an admin: namespace, claim, accounts, monitor, policy.

`python -m k8s platform --cluster <name> | kubectl apply --server-side -f -`. The pipeline itself
reads these objects but can't change them.
"""

from urllib.parse import urlsplit

from catalog import ClusterSpec
from k8s.manifests.release import (
    CLIENT_NAMESPACE,
    ENGINE,
    ENGINE_ACCOUNT,
    JOBS_ACCOUNT,
    MODEL,
    PIPELINE_ACCOUNT,
    PORT,
    SLOT,
    Obj,
    labels,
)

ENGINES = "vllm-engines"  # the PodMonitor and the NetworkPolicy
_RBAC = "rbac.authorization.k8s.io"
_READ = ["get", "list", "watch"]


def platform(cluster: ClusterSpec) -> list[Obj]:
    """All of it, in an order in which it can be applied."""
    return [
        namespace(cluster),
        claim(cluster),
        *service_accounts(cluster),
        *rbac(cluster),
        network_policy(cluster),
        pod_monitor(cluster),
    ]


def prometheus_namespace(cluster: ClusterSpec) -> str | None:
    """The namespace in an address like http://name.namespace.svc:9090; None for other hosts."""
    host = urlsplit(cluster.prometheus.address).hostname or ""
    parts = host.split(".")
    return parts[1] if len(parts) >= 3 and parts[2] == "svc" else None


def namespace(cluster: ClusterSpec) -> Obj:
    """The namespace; its Pods are held to the `restricted` Pod security level."""
    levels = {f"pod-security.kubernetes.io/{m}": "restricted" for m in ("enforce", "warn")}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": cluster.namespace, "labels": labels("namespace") | levels},
    }


def claim(cluster: ClusterSpec) -> Obj:
    """The volume with the weights: one Job writes, many engines read."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": cluster.storage.claim,
            "namespace": cluster.namespace,
            "labels": labels("weights"),
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            # "" and not absent: absent means the cluster's default class.
            "storageClassName": cluster.storage.storage_class or "",
            "resources": {"requests": {"storage": cluster.storage.size}},
        },
    }


def service_accounts(cluster: ClusterSpec) -> list[Obj]:
    """The pipeline's, and two that may do nothing: the engines' and the Jobs'."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {
                "name": name,
                "namespace": cluster.namespace,
                "labels": labels("account"),
            },
            "automountServiceAccountToken": name == PIPELINE_ACCOUNT,
        }
        for name in (PIPELINE_ACCOUNT, ENGINE_ACCOUNT, JOBS_ACCOUNT)
    ]


def rbac(cluster: ClusterSpec) -> list[Obj]:
    """What the pipeline may do, and no more: no Secrets, no exec, nothing in other namespaces
    but counting GPUs and asking Prometheus.
    """
    rules = [
        # Rollouts. Server-side apply needs `create` too, for an object that isn't there yet.
        _rule("apps", ["deployments"], [*_READ, "create", "patch"]),
        _rule("apps", ["deployments/scale"], ["patch"]),
        _rule("apps", ["replicasets"], ["list"]),
        _rule("", ["services"], ["get", "create", "patch"]),
        _rule("", ["configmaps"], ["get", "list", "create", "patch", "delete"]),
        _rule("policy", ["poddisruptionbudgets"], ["get", "create", "patch"]),
        _rule("keda.sh", ["scaledobjects"], [*_READ, "create", "patch", "delete"]),
        # Watching. `patch` of a Pod: the marks that keep it where it is until it is ready.
        _rule("", ["pods"], [*_READ, "patch"]),
        _rule("", ["pods/log"], ["get"]),
        # `get` up to Kubernetes 1.34, `create` from then on.
        _rule("", ["pods/portforward"], ["get", "create"]),
        _rule("", ["events"], ["list"]),
        _rule("", ["persistentvolumeclaims", "serviceaccounts"], ["get"]),
        _rule("discovery.k8s.io", ["endpointslices"], ["list"]),
        _rule("autoscaling", ["horizontalpodautoscalers"], ["get", "list"]),
        _rule("monitoring.coreos.com", ["podmonitors"], ["get"]),
        # Jobs, and the Lease that lets one promotion a model run at a time.
        _rule("batch", ["jobs"], [*_READ, "create", "delete"]),
        # Where Dagster's daemon has this account too: a run whose Pod is gone has failed.
        _rule("batch", ["jobs/status"], ["get"]),
        _rule("coordination.k8s.io", ["leases"], ["get", "list", "create", "update"]),
    ]
    # Free GPUs can only be counted from all Pods of the nodes, whoever owns them.
    counting = [_rule("", ["nodes", "pods"], ["get", "list"])]
    name = f"{PIPELINE_ACCOUNT}-{cluster.namespace}-gpus"
    out = [
        *_grant(cluster, cluster.namespace, PIPELINE_ACCOUNT, rules),
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": name, "labels": labels("account")},
            "rules": counting,
        },
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name, "labels": labels("account")},
            "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": name},
            "subjects": [_pipeline(cluster)],
        },
    ]
    monitoring = prometheus_namespace(cluster)
    if monitoring is not None and monitoring != cluster.namespace:
        asking = [
            _rule("", ["services"], ["get"]),
            _rule("", ["pods"], ["get", "list"]),
            _rule("", ["pods/portforward"], ["get", "create"]),
        ]
        out += _grant(cluster, monitoring, f"{PIPELINE_ACCOUNT}-{cluster.namespace}", asking)
    return out


def _rule(group: str, resources: list[str], verbs: list[str]) -> Obj:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


def _grant(cluster: ClusterSpec, where: str, name: str, rules: list[Obj]) -> list[Obj]:
    meta = {"name": name, "namespace": where, "labels": labels("account")}
    return [
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": dict(meta),
            "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": name},
            "subjects": [_pipeline(cluster)],
        },
    ]


def _pipeline(cluster: ClusterSpec) -> Obj:
    return {
        "kind": "ServiceAccount",
        "name": PIPELINE_ACCOUNT,
        "namespace": cluster.namespace,
    }


def network_policy(cluster: ClusterSpec) -> Obj:
    """Who may call the engines: this namespace (benchmark included), Prometheus, and namespaces
    with the label vllm-promotion.io/client=true (applications, a gateway). The engines themselves
    have the weights on a volume and need to reach nothing but DNS.
    """
    callers: list[Obj] = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {CLIENT_NAMESPACE: "true"}}},
    ]
    monitoring = prometheus_namespace(cluster)
    if monitoring is not None and monitoring != cluster.namespace:
        callers.append(
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": monitoring}}}
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": ENGINES,
            "namespace": cluster.namespace,
            "labels": labels("network"),
        },
        "spec": {
            "podSelector": {"matchLabels": {"app.kubernetes.io/component": ENGINE}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": callers, "ports": [{"protocol": "TCP", "port": PORT}]}],
            # Not only to kube-system: a DNS cache of the node has the node's address.
            "egress": [
                {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
            ],
        },
    }


def pod_monitor(cluster: ClusterSpec) -> Obj:
    """Scrapes every engine, and says of each series whose it is: vLLM's own labels are only
    model_name and engine, alike in both slots.
    """
    prometheus = cluster.prometheus
    sources = {
        "namespace": "__meta_kubernetes_namespace",
        "pod": "__meta_kubernetes_pod_name",
        "model": _meta_label(MODEL),
        "slot": _meta_label(SLOT),
    }
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": ENGINES,
            "namespace": cluster.namespace,
            # kube-prometheus-stack ignores monitors without its `release` label.
            "labels": labels("monitoring") | prometheus.monitor_labels,
        },
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/component": ENGINE}},
            "podMetricsEndpoints": [
                {
                    "port": "http",
                    "path": "/metrics",
                    "interval": f"{round(prometheus.scrape_seconds * 1000)}ms",
                    "relabelings": [
                        {"action": "replace", "sourceLabels": [source], "targetLabel": target}
                        for target, source in sources.items()
                    ],
                }
            ],
        },
    }


def _meta_label(label: str) -> str:
    """Prometheus' name for a label of the Pod."""
    return "__meta_kubernetes_pod_label_" + label.replace(".", "_").replace("/", "_").replace(
        "-", "_"
    )
