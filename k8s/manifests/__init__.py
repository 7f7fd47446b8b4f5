"""Objects rendered for a model or a cluster: pure functions from specs to dicts."""

from k8s.manifests.engine import deployment, pdb, service
from k8s.manifests.jobs import benchmark_job, download_job, resolve_job
from k8s.manifests.platform import (
    claim,
    namespace,
    network_policy,
    platform,
    pod_monitor,
    rbac,
    service_accounts,
)
from k8s.manifests.release import (
    Release,
    Slot,
    content_hash,
    engine_selector,
    labels,
    other_slot,
    slot_name,
)
from k8s.manifests.scaling import Thresholds, max_replicas, scaled_object

__all__ = [
    "Release",
    "Slot",
    "Thresholds",
    "benchmark_job",
    "claim",
    "content_hash",
    "deployment",
    "download_job",
    "engine_selector",
    "labels",
    "max_replicas",
    "namespace",
    "network_policy",
    "other_slot",
    "pdb",
    "platform",
    "pod_monitor",
    "rbac",
    "resolve_job",
    "scaled_object",
    "service",
    "service_accounts",
    "slot_name",
]
