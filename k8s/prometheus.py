"""Queries to the Prometheus that KEDA asks too, and reading an engine's own /metrics."""

import http.client
import json
import re
import urllib.error
import urllib.request
from urllib.parse import urlencode, urlsplit

from catalog import ClusterSpec
from k8s import pod_http
from k8s.client import Client, Obj
from k8s.errors import HttpStatus, KubernetesError, PodUnreachable
from k8s.slots import is_ready

TIMEOUT_S = 10.0


class PrometheusError(KubernetesError):
    """Prometheus is away or refuses the query; the message has its address and the query."""


def query(client: Client, cluster: ClusterSpec, promql: str) -> list[float]:
    """The values of an instant query, one a series. In-cluster addresses (*.svc) are reached by
    port-forward to a Pod.
    """
    address = cluster.prometheus.address
    path = "/api/v1/query?" + urlencode({"query": promql})
    where = f"Prometheus at {address} (catalog/clusters/{cluster.name}.yaml)"
    try:
        text = _get(client, address, path)
    except HttpStatus as error:
        raise PrometheusError(f"{where} answers {error.code} to {promql}: {error.body}") from None
    except (PodUnreachable, OSError, http.client.HTTPException) as error:
        raise PrometheusError(f"{where} can't be asked: {error}") from None
    try:
        result = json.loads(text)["data"]["result"]
        return [float(item["value"][1]) for item in result]
    except (ValueError, LookupError, TypeError):
        raise PrometheusError(
            f"{where} gave no instant vector for {promql}: {text[:200]}"
        ) from None


def _get(client: Client, address: str, path: str) -> str:
    url = urlsplit(address)
    parts = (url.hostname or "").split(".")
    if len(parts) < 3 or parts[2] != "svc":
        return _get_directly(address + path)
    name, namespace = parts[:2]
    pod, port = _pod_behind(client, name, namespace, url.port or 80)
    return pod_http.get_text(client, pod, port, path, timeout_s=TIMEOUT_S, namespace=namespace)


def _get_directly(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read(), "utf-8", "replace")
    except urllib.error.HTTPError as error:
        body = str(error.read(), "utf-8", "replace")
        raise HttpStatus(f"{url} answers {error.code}", code=error.code, body=body) from None


def _pod_behind(client: Client, name: str, namespace: str, port: int) -> tuple[str, int]:
    """A ready Pod behind the Service, and the port there."""
    service = client.find("Service", name, namespace=namespace)
    if service is None:
        raise PrometheusError(f"there is no Service {namespace}/{name}; correct prometheus.address")
    selector = service["spec"].get("selector")
    ports = [p for p in service["spec"]["ports"] if p["port"] == port]
    if not selector or not ports:
        raise PrometheusError(
            f"Service {namespace}/{name} has no selector or no port {port}; "
            "correct prometheus.address"
        )
    for pod in client.list("Pod", labels=selector, namespace=namespace):
        if is_ready(pod):
            target = ports[0].get("targetPort", port)
            return pod["metadata"]["name"], _port(pod, target)
    raise PrometheusError(f"no Pod behind Service {namespace}/{name} is ready")


def _port(pod: Obj, target: int | str) -> int:
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if port.get("name") == target:
                return int(port["containerPort"])
    raise PrometheusError(f"Pod {pod['metadata']['name']} has no port named {target}")


def samples(text: str, name: str) -> list[float]:
    """The values of all series of a metric in the text of a /metrics page."""
    labels = r'(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?'
    return [
        float(match[1]) for match in re.finditer(rf"(?m)^{re.escape(name)}{labels}\s+(\S+)", text)
    ]
