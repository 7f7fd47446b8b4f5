"""Queries to the Prometheus that KEDA asks too."""

from dataclasses import dataclass

from catalog import ClusterSpec
from k8s.client import Client
from k8s.errors import KubernetesError


class PrometheusError(KubernetesError):
    """Prometheus is away or refuses the query; the message has its address and the query."""


@dataclass(frozen=True)
class Series:
    """One series of an instant query. `at`: Unix seconds of the evaluation."""

    labels: dict[str, str]
    value: float
    at: float


def query(client: Client, cluster: ClusterSpec, promql: str) -> list[Series]:
    """An instant query. In-cluster addresses (*.svc) are reached by port-forward to a Pod."""
    raise NotImplementedError
