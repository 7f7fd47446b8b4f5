"""A cluster that models are promoted to: one YAML file in catalog/clusters/."""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from catalog.model import ModelSpec
from catalog.spec import (
    DAY,
    Count,
    Cpu,
    LabelKey,
    LabelValue,
    ObjectName,
    Seconds,
    Size,
    Spec,
    amount,
    matching,
)


class Toleration(Spec):
    """A taint of the node pool that Pods must tolerate, whatever its value."""

    key: LabelKey
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None


class NodePool(Spec):
    """Nodes with GPUs. `gpus` per node; `max_nodes` is where the pool stops growing.

    `instance_type` and `hourly_usd` (of a node) are for people who choose a pool: nothing is
    decided by them.
    """

    name: ObjectName
    instance_type: str
    gpus: Annotated[int, Field(ge=1, le=16)]
    gpu_product: LabelValue
    max_nodes: Count
    # What a Pod can get of one node (allocatable, not capacity): a Pod above it never schedules.
    cpu: Cpu
    memory: Size
    hourly_usd: Annotated[float, Field(ge=0)]
    labels: dict[LabelKey, LabelValue]
    tolerations: tuple[Toleration, ...] = ()
    spot: bool = False


class Storage(Spec):
    """The volume with the weights: a ReadWriteMany claim in the cluster's namespace."""

    claim: ObjectName
    storage_class: str | None  # null: the claim binds to a volume made by hand
    size: Size


Image = Annotated[str, matching(r"[A-Za-z0-9][\w./:@-]*", "registry.example.com/jobs@sha256:…")]


class Images(Spec):
    """`jobs`: weights and load-test programs. `engine`: replaces the model's image, if given."""

    jobs: Image
    engine: Image | None = None
    # Never: the images are on the nodes already (the lab, `kind load`); then a tag is enough.
    pull_policy: Literal["IfNotPresent", "Never"] = "IfNotPresent"

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        for field in ("jobs", "engine"):
            image = getattr(self, field)
            if (
                image
                and self.pull_policy != "Never"
                and not re.search(r"@sha256:[0-9a-f]{64}$", image)
            ):
                raise ValueError(
                    f"{field}: {image!r} has no digest; pin it: <image>@sha256:<64 hex digits>"
                )
        return self


def _check_port(url: str) -> str:
    try:
        urlsplit(url).port  # noqa: B018  # raises
    except ValueError:
        raise ValueError(f"{url!r}: its port is none from 0 to 65535") from None
    return url


class Prometheus(Spec):
    """`address` as KEDA reaches it. `monitor_labels`: what its PodMonitor selector wants."""

    address: Annotated[
        str,
        matching(
            r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?", "http://prometheus.monitoring.svc:9090"
        ),
        AfterValidator(_check_port),
    ]
    scrape_seconds: Annotated[float, Field(ge=1), DAY] = 15.0
    monitor_labels: dict[LabelKey, LabelValue] = {}


class Keda(Spec):
    """How often KEDA asks Prometheus, in seconds."""

    polling_seconds: Seconds = 15


def _check_own(namespace: str) -> str:
    if namespace == "default" or namespace.startswith("kube-"):
        raise ValueError(f"{namespace!r} has Pods of others; give it a namespace of its own")
    return namespace


class PoolError(Exception):
    """No node pool of the cluster fits the model; the message says why, pool by pool."""


class ClusterSpec(Spec):
    """One cluster. `name` is the file's name without .yaml."""

    name: ObjectName
    context: str | None = None  # of the kubeconfig; null: its current one, or the Pod's own account
    # For this alone: `python -m k8s platform` restricts all Pods in it.
    namespace: Annotated[ObjectName, AfterValidator(_check_own)]
    storage: Storage
    images: Images
    prometheus: Prometheus
    keda: Keda = Keda()
    hub_endpoint: str | None = None  # HF_ENDPOINT of the Jobs
    node_pools: Annotated[tuple[NodePool, ...], Field(min_length=1)]
    # What is not real here, e.g. ("gpu", "engine"): every record, report and table says so.
    simulated: tuple[str, ...] = ()

    @field_validator("hub_endpoint")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", url):
            raise ValueError("write http(s)://host[:port][/path], without user or password")
        if url:
            _check_port(url)
        return url

    @field_validator("node_pools")
    @classmethod
    def _distinct(cls, pools: tuple[NodePool, ...]) -> tuple[NodePool, ...]:
        names = [pool.name for pool in pools]
        if len(set(names)) != len(names):
            raise ValueError("two node pools have the same name")
        return pools

    def placeholder(self, model: ModelSpec) -> str:
        """Which image is still the one of an example, which no registry has; empty if none is."""
        images = {f"clusters/{self.name}.yaml: images.jobs": self.images.jobs}
        if self.images.engine:
            images[f"clusters/{self.name}.yaml: images.engine"] = self.images.engine
        else:
            images[f"models/{model.name}.yaml: image"] = model.image
        for field, image in images.items():
            if image.endswith("@sha256:" + 64 * "0"):
                return f"catalog/{field}: {image!r} is a placeholder; write your image's digest"
        return ""

    def pool(self, model: ModelSpec) -> NodePool:
        """The node pool that `model` asks for, or else the first that has its GPUs.

        Raises PoolError when no pool of this cluster can take a replica of it.
        """
        refusals = []
        for pool in self.node_pools:
            if model.node_pool not in (None, pool.name):
                refusals.append(f"{pool.name}: the model wants node_pool {model.node_pool}")
            elif model.gpus.count > pool.gpus:
                refusals.append(
                    f"{pool.name}: a node has {pool.gpus} GPUs, gpus.count is {model.gpus.count}"
                )
            elif model.gpus.products and pool.gpu_product not in model.gpus.products:
                refusals.append(
                    f"{pool.name}: its GPUs are {pool.gpu_product}, gpus.products allows "
                    f"{', '.join(model.gpus.products)}"
                )
            elif too_much := [
                f"{field} of a node is {there}, resources.{field} is {wanted}"
                for field, there, wanted in (
                    ("cpu", pool.cpu, model.resources.cpu),
                    ("memory", pool.memory, model.resources.memory),
                )
                if amount(wanted) > amount(there)
            ]:
                refusals.append(f"{pool.name}: {', '.join(too_much)}")
            elif pool.spot and not model.spot:
                refusals.append(f"{pool.name}: is a spot pool, the model has spot: false")
            else:
                return pool
        raise PoolError(
            f"no node pool of cluster {self.name} can take {model.name}: {'; '.join(refusals)}. "
            f"Correct catalog/models/{model.name}.yaml or catalog/clusters/{self.name}.yaml."
        )
