"""Every object that can be rendered: for each model and cluster of the catalog that fit."""

import dataclasses

from catalog import ClusterSpec, ModelSpec, PoolError
from catalog.load import catalog
from catalog.model import Adapter
from k8s import manifests
from k8s.manifests import Release, Thresholds
from k8s.manifests.release import Obj

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
THRESHOLDS = Thresholds(in_flight=24, waiting=2, headroom=0.9, lead_seconds=130.0)


ADAPTERS = (
    Adapter(name="sql", repo="lab/smollm2-135m-lora", revision="main"),
    Adapter(name="legal.v2", repo="lab/smollm2-135m-lora", revision="v2"),
)


def with_adapters() -> ModelSpec:
    """A model as the catalog could have it."""
    model = catalog().model("smollm2-135m")
    return model.model_copy(update={"name": "smollm2-with-adapters", "adapters": ADAPTERS})


def pairs() -> list[tuple[ModelSpec, ClusterSpec]]:
    found = []
    for model in (*catalog().models.values(), with_adapters()):
        for cluster in catalog().clusters.values():
            try:
                cluster.pool(model)
            except PoolError:
                continue
            found.append((model, cluster))
    return found


def release(model: ModelSpec, cluster: ClusterSpec) -> Release:
    adapters = tuple(
        dataclasses.replace(adapter, commit=f"{number}" * 40, rank=rank)
        for number, (adapter, rank) in enumerate(
            zip(manifests.unresolved(model), (4, 20), strict=False), 1
        )
    )
    return Release(model, cluster, COMMIT, "green", "run-1", 600, adapters)


def objects(model: ModelSpec, cluster: ClusterSpec) -> list[Obj]:
    candidate = release(model, cluster)
    return [
        *manifests.platform(cluster),
        manifests.deployment(candidate),
        manifests.pdb(candidate),
        manifests.service(model, cluster, "green"),
        manifests.scaled_object(candidate, THRESHOLDS, 1),
        manifests.resolve_job(model, cluster, model.revision, "run-1"),
        manifests.download_job(model, cluster, COMMIT, "run-1"),
        *(
            job
            for adapter, at in zip(model.adapters, candidate.adapters, strict=True)
            for job in (
                manifests.resolve_job(model, cluster, adapter.revision, "run-1", adapter=adapter),
                manifests.adapter_job(model, cluster, adapter, at.commit, "run-1", base=COMMIT),
            )
        ),
        *manifests.benchmark_job(candidate, '{"url": "http://10.0.0.1:8000"}', deadline_s=600),
        manifests.collect_job(
            cluster, "run-1", {COMMIT}, older_than_days=30, free="50GiB", dry_run=True
        ),
        manifests.importer(cluster),
    ]


def everything() -> list[Obj]:
    return [obj for pair in pairs() for obj in objects(*pair)]


def pods(obj: Obj) -> list[Obj]:
    """The Pod spec in a Deployment, Job or Pod, if it is one."""
    if obj["kind"] == "Pod":
        return [obj["spec"]]
    return [obj["spec"]["template"]["spec"]] if obj["kind"] in ("Deployment", "Job") else []


def containers(pod: Obj) -> list[Obj]:
    return [*pod.get("initContainers", []), *pod["containers"]]
