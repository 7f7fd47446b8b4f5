"""What runs on the lab's Kubernetes beside its components: DNS, Prometheus, KEDA, hub, storage.

Each function applies its objects and returns when they do their work. They run beside each other.
No Pod is made before its image is on the node: with imagePullPolicy Never it would fail first.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.kubernetes import certificates
from lab.kubernetes.addresses import DOMAIN, NODE
from lab.kubernetes.api import Api, Obj, available, condition, explain_pods, load

HERE = Path(__file__).parent
READY_SECONDS = 240.0
DEPLOYMENT = "/apis/apps/v1/namespaces/{}/deployments/{}"


@dataclass(frozen=True)
class Bringup:
    """What every add-on needs. `check` raises when the lab can't come up any more."""

    api: Api
    images: Callable[[str], None]
    check: Callable[[], None]
    ready: Callable[[str], None]  # for the timeline

    def apply(self, objects: list[Obj]) -> None:
        for obj in objects:
            self.check()
            self.api.apply(obj)

    def wait_for_deployment(self, namespace: str, name: str) -> None:
        self.api.wait(
            f"Deployment {namespace}/{name}",
            DEPLOYMENT.format(namespace, name),
            available,
            deadline_s=READY_SECONDS,
            check=self.check,
            why=lambda: explain_pods(self.api, namespace),
        )


def read(name: str) -> list[Obj]:
    """The objects of a YAML file of this folder."""
    return load((HERE / name).read_text())


def namespace(name: str) -> Obj:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def node(up: Bringup, gpus: int) -> None:
    """Waits for the node and its GPUs."""
    path = f"/api/v1/nodes/{NODE}"
    up.api.wait(
        "the node", path, lambda n: condition(n, "Ready"), deadline_s=READY_SECONDS, check=up.check
    )
    up.ready("node Ready")

    def has_gpus(found: Obj) -> bool:
        return int(found["status"]["allocatable"].get("nvidia.com/gpu", 0)) == gpus

    up.api.wait("the GPU plugin", path, has_gpus, deadline_s=READY_SECONDS, check=up.check)
    up.ready(f"{gpus} simulated GPUs")


def dns(up: Bringup) -> None:
    """CoreDNS."""
    up.images("coredns")
    up.apply(read("coredns.yaml"))
    up.wait_for_deployment("kube-system", "coredns")
    up.ready("DNS")


def hub(up: Bringup) -> None:
    """The Service of the model hub, which is a process of the node."""
    up.apply(read("hub.yaml"))


def storage(up: Bringup, models: Path) -> None:
    """The volume for the weights, in a folder of the node that every user may write to."""
    objects = read("storage.yaml")
    for volume in objects:
        volume["spec"]["hostPath"]["path"] = str(models)
    up.apply(objects)


def prometheus(up: Bringup, crds: list[Obj]) -> None:
    """prometheus-operator and its Prometheus. `crds`: the operator's."""
    up.apply(crds)
    objects = read("prometheus.yaml")
    (instance,) = (o for o in objects if o["kind"] == "Prometheus")
    up.images("prometheus-operator")
    up.apply([o for o in objects if o is not instance])
    up.images("prometheus")
    up.apply([instance])

    def is_up(found: Obj) -> bool:
        return condition(found, "Available") and condition(found, "Reconciled")

    up.api.wait(
        "Prometheus",
        "/apis/monitoring.coreos.com/v1/namespaces/monitoring/prometheuses/lab",
        is_up,
        deadline_s=READY_SECONDS,
        check=up.check,
        why=lambda: explain_pods(up.api, "monitoring"),
    )
    up.ready("Prometheus")


def keda(up: Bringup, objects: list[Obj]) -> None:
    """KEDA, until the HPA can ask it for external metrics. `objects`: its manifests."""
    objects = _with_certificates(objects)
    workloads = [o for o in objects if o["kind"] == "Deployment"]
    up.apply([o for o in objects if o["kind"] != "Deployment"])
    up.images("keda")
    up.apply(workloads)
    for workload in workloads:
        up.wait_for_deployment("keda", workload["metadata"]["name"])
    up.ready("KEDA")
    up.api.wait(
        "KEDA's metrics API",
        "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.external.metrics.k8s.io",
        lambda found: condition(found, "Available"),
        deadline_s=READY_SECONDS,
        check=up.check,
        why=lambda: explain_pods(up.api, "keda"),
    )
    up.ready("external metrics")


def _with_certificates(objects: list[Obj]) -> list[Obj]:
    """KEDA with certificates of ours instead of its own rotation: with that, all its three programs
    exit once or twice until its operator has made some (10 to 15 s)."""
    services = ("keda-operator", "keda-metrics-apiserver", "keda-admission-webhooks")
    pems = certificates.for_service(
        *(f"{service}.keda.svc{end}" for service in services for end in ("", f".{DOMAIN}"))
    )
    bundle = base64.b64encode(pems["ca.crt"].encode()).decode()
    for obj in objects:
        match obj["kind"]:
            case "APIService":
                obj["spec"] = obj["spec"] | {"caBundle": bundle}
                obj["spec"].pop("insecureSkipTLSVerify", None)
            case "ValidatingWebhookConfiguration":
                for webhook in obj["webhooks"]:
                    webhook["clientConfig"]["caBundle"] = bundle
            case "Deployment":
                for container in obj["spec"]["template"]["spec"]["containers"]:
                    rotation = "--enable-cert-rotation"
                    container["args"] = [a for a in container["args"] if rotation not in a]
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "kedaorg-certs", "namespace": "keda"},
        "stringData": pems,
    }
    first = [o for o in objects if o["kind"] == "Namespace"]
    return [*first, secret, *(o for o in objects if o not in first)]
