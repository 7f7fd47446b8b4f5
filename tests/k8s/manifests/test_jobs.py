"""What the Jobs ask of a node."""

import pytest

from k8s import manifests
from k8s.manifests.release import Obj
from tests.k8s.manifests.rendered import pairs, release


def test_a_trace_goes_with_its_profile() -> None:
    candidate = release(*pairs()[0])
    config, job = manifests.benchmark_job(candidate, "{}", '{"timestamp": 0}', deadline_s=600)
    assert config["data"] == {"profile.json": "{}", "trace.jsonl": '{"timestamp": 0}'}
    other = manifests.benchmark_job(candidate, "{}", deadline_s=600)
    assert other[0]["data"] == {"profile.json": "{}"}
    assert other[1]["metadata"]["name"] != job["metadata"]["name"]


@pytest.mark.parametrize(("workers", "cpu", "memory"), [(1, "500m", "512Mi"), (4, "4", "2048Mi")])
def test_each_worker_of_the_benchmark_gets_a_core(workers: int, cpu: str, memory: str) -> None:
    model, cluster = pairs()[0]
    traffic = model.traffic.model_copy(update={"workers": workers})
    candidate = release(model.model_copy(update={"traffic": traffic}), cluster)
    job: Obj = manifests.benchmark_job(candidate, "{}", deadline_s=600)[1]
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": cpu, "memory": memory}
    assert "cpu" not in container["resources"]["limits"]
