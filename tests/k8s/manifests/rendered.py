"""Every object that can be rendered: for each model and cluster of the catalog that fit."""

from catalog import ClusterSpec, ModelSpec, PoolError
from catalog.load import catalog
from k8s import manifests
from k8s.manifests import Release, Thresholds
from k8s.manifests.release import Obj

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
THRESHOLDS = Thresholds(in_flight=24, waiting=2, headroom=0.9, lead_seconds=130.0)


def pairs() -> list[tuple[ModelSpec, ClusterSpec]]:
    found = []
    for model in catalog().models.values():
        for cluster in catalog().clusters.values():
            try:
                cluster.pool(model)
            except PoolError:
                continue
            found.append((model, cluster))
    return found


def release(model: ModelSpec, cluster: ClusterSpec) -> Release:
    return Release(model, cluster, COMMIT, "green", "run-1", startup_seconds=600)


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
        *manifests.benchmark_job(candidate, '{"url": "http://10.0.0.1:8000"}', deadline_s=600),
    ]


def everything() -> list[Obj]:
    return [obj for pair in pairs() for obj in objects(*pair)]


def pods(obj: Obj) -> list[Obj]:
    """The Pod spec in a Deployment or Job, if it is one."""
    return [obj["spec"]["template"]["spec"]] if obj["kind"] in ("Deployment", "Job") else []


def containers(pod: Obj) -> list[Obj]:
    return [*pod.get("initContainers", []), *pod["containers"]]
