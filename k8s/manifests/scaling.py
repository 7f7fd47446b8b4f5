"""The ScaledObject: what KEDA scales a slot by."""

import math
from dataclasses import dataclass

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.release import ENGINE, SLOT, Obj, Release, labels

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
IN_FLIGHT = "in-flight"  # name of the trigger
# KEDA turns to its fallback when more than this many polls in a row have failed.
FAILURES_BEFORE_FALLBACK = 3
SCALE_DOWN_SECONDS = 300  # at least: the window in which a lower load must last


@dataclass(frozen=True)
class Thresholds:
    """Per replica. `in_flight`: running + waiting requests; `waiting`: waiting ones alone.

    `headroom` (h, 0.3 to 0.95: the share of L* that is used, so less is more room) and
    `lead_seconds` say how they came about, see keda.thresholds.
    """

    in_flight: int
    waiting: int
    headroom: float
    lead_seconds: float


# To render or to try, where no benchmark has measured the real ones.
EXAMPLE_THRESHOLDS = Thresholds(in_flight=1, waiting=1, headroom=1.0, lead_seconds=60.0)


def max_replicas(model: ModelSpec, cluster: ClusterSpec) -> int:
    """The catalog's max_replicas, capped by the GPUs that the node pool can ever give."""
    pool = cluster.pool(model)
    return min(model.scaling.max_replicas, pool.max_nodes * (pool.gpus // model.gpus.count))


def selector(release: Release) -> str:
    """The PromQL selector of the slot's series; the PodMonitor sets these labels."""
    return (
        f'namespace="{release.cluster.namespace}",'
        f'model="{release.model.name}",slot="{release.slot}"'
    )


def in_flight_query(release: Release) -> str:
    """Requests in flight over all Pods of the slot: exactly one series.

    A sum of two sums, so that it has no value when either metric is missing.
    """
    where = selector(release)
    return f"sum({RUNNING}{{{where}}}) + sum({WAITING}{{{where}}})"


def waiting_query(release: Release) -> str:
    """Waiting requests over all Pods of the slot: exactly one series."""
    return f"sum({WAITING}{{{selector(release)}}})"


def scaled_object(release: Release, thresholds: Thresholds, min_replicas: int) -> Obj:
    """The ScaledObject of the slot.

    Both triggers have AverageValue targets: KEDA asks for ceil(sum / threshold) replicas. Queue
    depth alone is 0 while a GPU is saturated, and then unbounded; so running + waiting leads.
    """
    # At most half as many again in the time that a replica takes to help, else one cold start is
    # enough to reach the maximum. 1800 s and 3600 s are the API's own limits.
    lead = min(1800, max(15, math.ceil(thresholds.lead_seconds)))
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {
            "name": release.name,
            "namespace": release.cluster.namespace,
            "labels": labels(ENGINE, release.model, **{SLOT: release.slot}),
        },
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": release.name,
            },
            "pollingInterval": release.cluster.keda.polling_seconds,
            "minReplicaCount": min_replicas,
            "maxReplicaCount": max(min_replicas, max_replicas(release.model, release.cluster)),
            # Prometheus away at peak: keep what there is.
            "fallback": {
                "failureThreshold": FAILURES_BEFORE_FALLBACK,
                "replicas": min_replicas,
                "behavior": "currentReplicasIfHigher",
            },
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {
                        "scaleUp": {
                            "stabilizationWindowSeconds": 0,
                            "selectPolicy": "Max",
                            "policies": [
                                {"type": "Pods", "value": 1, "periodSeconds": lead},
                                {"type": "Percent", "value": 50, "periodSeconds": lead},
                            ],
                        },
                        "scaleDown": {
                            "stabilizationWindowSeconds": max(SCALE_DOWN_SECONDS, lead),
                            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                        },
                    }
                }
            },
            "triggers": [
                _trigger(release, IN_FLIGHT, in_flight_query(release), thresholds.in_flight),
                _trigger(release, "waiting", waiting_query(release), thresholds.waiting),
            ],
        },
    }


def _trigger(release: Release, name: str, query: str, threshold: int) -> Obj:
    return {
        "type": "prometheus",
        "name": name,
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": release.cluster.prometheus.address,
            "query": query,
            "threshold": str(threshold),
            # No value is an error (and leads to the fallback), not a load of 0.
            "ignoreNullValues": "false",
        },
    }
