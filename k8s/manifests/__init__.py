"""Objects rendered for a model or a cluster: pure functions from specs to dicts."""

from k8s.manifests.engine import deployment, pdb, service
from k8s.manifests.jobs import (
    adapter_job,
    benchmark_job,
    collect_job,
    download_job,
    importer,
    resolve_job,
)
from k8s.manifests.platform import (
    claim,
    namespace,
    network_policy,
    platform,
    pod_monitor,
    rbac,
)
from k8s.manifests.release import (
    Release,
    ServedAdapter,
    Slot,
    slot_name,
    unresolved,
)
from k8s.manifests.scaling import Thresholds, max_replicas, scaled_object

__all__ = [
    "Release",
    "ServedAdapter",
    "Slot",
    "Thresholds",
    "adapter_job",
    "benchmark_job",
    "claim",
    "collect_job",
    "deployment",
    "download_job",
    "importer",
    "max_replicas",
    "namespace",
    "network_policy",
    "pdb",
    "platform",
    "pod_monitor",
    "rbac",
    "resolve_job",
    "scaled_object",
    "service",
    "slot_name",
    "unresolved",
]
