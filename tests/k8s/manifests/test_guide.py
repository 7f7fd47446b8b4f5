"""What most manifests for vLLM on the web get wrong is right here: a test for each mistake."""

import json
import re
from typing import Any

import pytest

from catalog import ClusterSpec, ModelSpec
from catalog.engine_args import RESERVED_ENV
from catalog.load import catalog
from k8s import manifests
from k8s.manifests.platform import prometheus_namespace
from k8s.manifests.release import Obj, Release
from tests.k8s.manifests import rendered
from tests.k8s.manifests.rendered import containers, pods

PAIRS = [pytest.param(m, c, id=f"{m.name} on {c.name}") for m, c in rendered.pairs()]
EVERYTHING = rendered.everything()
LLAMA = catalog().model("llama-3.1-8b-instruct")
QWEN = catalog().model("qwen2.5-32b-instruct")
SMOLLM = catalog().model("smollm2-135m")
EKS = catalog().cluster("eks-example")
GKE = catalog().cluster("gke-example")
LAB = catalog().cluster("lab")


def engine(model: ModelSpec, cluster: ClusterSpec) -> Obj:
    """The Deployment's Pod."""
    spec: Obj = manifests.deployment(rendered.release(model, cluster))["spec"]["template"]["spec"]
    return spec


def environment(container: Obj) -> dict[str, Any]:
    names = [entry["name"] for entry in container.get("env", [])]
    assert len(set(names)) == len(names), "a name stands twice"
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def hub_jobs(model: ModelSpec, cluster: ClusterSpec) -> list[Obj]:
    return [
        manifests.resolve_job(model, cluster, "main", "run-1"),
        manifests.download_job(model, cluster, rendered.COMMIT, "run-1"),
    ]


# Scaling


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_metrics_and_labels_are_those_that_vllm_and_the_monitor_have(
    model: ModelSpec, cluster: ClusterSpec
) -> None:
    text = json.dumps(rendered.objects(model, cluster))
    assert "vllm:num_requests_running" in text
    assert "vllm:num_requests_waiting" in text
    for wrong in ("vllm_num_requests", "gpu_cache_usage", "nvidia_gpu_utilization", "metricName"):
        assert wrong not in text
    monitor = manifests.pod_monitor(cluster)
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    given = {rule["targetLabel"] for rule in endpoint["relabelings"]}
    for trigger in triggers(model, cluster):
        for label in re.findall(r"[{,](\w+)=", trigger["metadata"]["query"]):
            assert label in given, f"the query selects by {label}, which no series has"


def triggers(model: ModelSpec, cluster: ClusterSpec) -> list[Obj]:
    scaled = manifests.scaled_object(rendered.release(model, cluster), rendered.THRESHOLDS, 1)
    found: list[Obj] = scaled["spec"]["triggers"]
    return found


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_keda(model: ModelSpec, cluster: ClusterSpec) -> None:
    first, second = triggers(model, cluster)
    assert [first["name"], second["name"]] == ["in-flight", "waiting"]
    assert "running" in first["metadata"]["query"]
    assert "waiting" in first["metadata"]["query"]
    for trigger in (first, second):
        # One series, per replica, and no value is an error.
        assert trigger["metadata"]["query"].startswith("sum(")
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert 'slot="green"' in trigger["metadata"]["query"]
    scaled = manifests.scaled_object(rendered.release(model, cluster), rendered.THRESHOLDS, 2)
    spec = scaled["spec"]
    assert spec["minReplicaCount"] == 2, "at zero replicas the metric can't wake it"
    assert "cooldownPeriod" not in spec
    # Prometheus away at peak never scales down.
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert spec["fallback"]["failureThreshold"] >= 1
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300
    up = behavior["scaleUp"]["policies"]
    assert all(130 <= policy["periodSeconds"] <= 1800 for policy in up), "slower than a cold start"


def test_replicas_are_capped_by_the_gpus_of_the_pool() -> None:
    many = LLAMA.model_copy(
        update={"scaling": LLAMA.scaling.model_copy(update={"max_replicas": 99})}
    )
    assert manifests.max_replicas(many, EKS) == 6
    two_each = QWEN.model_copy(
        update={"scaling": QWEN.scaling.model_copy(update={"max_replicas": 99})}
    )
    assert manifests.max_replicas(two_each, EKS) == 4  # 2 nodes of 4 GPUs, 2 GPUs a replica
    assert manifests.max_replicas(LLAMA, EKS) == 4


def test_the_deployment_has_no_replicas() -> None:
    for obj in EVERYTHING:
        if obj["kind"] == "Deployment":
            assert "replicas" not in obj["spec"]


# Engine


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_the_engine_serves_a_local_path_under_its_name(
    model: ModelSpec, cluster: ClusterSpec
) -> None:
    [container] = engine(model, cluster)["containers"]
    assert "command" not in container, "the image's entry point is `vllm serve`"
    path, flag, name, *rest = container["args"]
    assert path == f"/models/{model.repo}/{rendered.COMMIT}"
    assert (flag, name) == ("--served-model-name", model.served_name)
    assert "--model" not in container["args"]
    assert rest[-len(model.args) :] == list(model.args)


def test_tensor_parallel_has_shared_memory() -> None:
    pod = engine(QWEN, EKS)
    args = pod["containers"][0]["args"]
    assert args[args.index("--tensor-parallel-size") + 1] == "2"
    [shm] = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "16Gi"}
    mounts = pod["containers"][0]["volumeMounts"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in mounts
    assert "--tensor-parallel-size" not in engine(LLAMA, EKS)["containers"][0]["args"]


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_it_ends_in_order(model: ModelSpec, cluster: ClusterSpec) -> None:
    pod = engine(model, cluster)
    [container] = pod["containers"]
    shutdown = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert shutdown == model.rollout.drain_seconds
    assert stop == 15
    assert pod["terminationGracePeriodSeconds"] > stop + shutdown


@pytest.mark.parametrize("startup", [60, 61, 600, 3600, 5400])
def test_loading_has_a_budget_of_its_own(startup: int) -> None:
    release = Release(LLAMA, EKS, rendered.COMMIT, "blue", "run-1", startup)
    deployment = manifests.deployment(release)
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert startup <= probe["periodSeconds"] * probe["failureThreshold"] <= startup + 10
    assert deployment["spec"]["progressDeadlineSeconds"] > startup
    assert environment(container)["VLLM_ENGINE_READY_TIMEOUT_S"] == str(startup)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] == "/health"


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_it_is_offline_silent_and_writes_only_where_it_may(
    model: ModelSpec, cluster: ClusterSpec
) -> None:
    pod = engine(model, cluster)
    [container] = pod["containers"]
    variables = environment(container)
    assert set(variables) - {"MODEL_PATH"} - set(model.env) == RESERVED_ENV
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert variables[name] == "1"
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    empty = {v["name"] for v in pod["volumes"] if "emptyDir" in v}
    for name in ("HOME", "TMPDIR", "VLLM_CACHE_ROOT"):
        [mount] = [m for path, m in mounts.items() if f"{variables[name]}/".startswith(f"{path}/")]
        assert mount["name"] in empty
    assert mounts["/models"]["readOnly"] is True
    [models] = [v for v in pod["volumes"] if v["name"] == "models"]
    assert models["persistentVolumeClaim"] == {
        "claimName": cluster.storage.claim,
        "readOnly": True,
    }
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_no_pod_without_the_gpu_limit(model: ModelSpec, cluster: ClusterSpec) -> None:
    pod = engine(model, cluster)
    for container in containers(pod):  # the check sees the GPUs that the engine gets
        limits = container["resources"]["limits"]
        assert limits[model.gpus.resource] == str(model.gpus.count)
        assert "memory" in limits
    [check] = pod["initContainers"]
    assert check["image"] == pod["containers"][0]["image"]
    assert check["command"] == [
        "nvidia-smi",
        "--query-gpu=index,name,uuid,memory.total,memory.used,driver_version",
        "--format=csv",
    ]


def test_nodes_are_chosen_by_the_pools_labels_and_taints() -> None:
    on_eks, on_gke, in_lab = engine(LLAMA, EKS), engine(LLAMA, GKE), engine(SMOLLM, LAB)
    assert on_eks["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert on_gke["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    for pod in (on_eks, on_gke):
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    assert "nodeSelector" not in in_lab
    assert "tolerations" not in in_lab


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_requests_fit_what_a_node_has_to_give(model: ModelSpec, cluster: ClusterSpec) -> None:
    pool = cluster.pool(model)
    assert quantity(model.resources.cpu) <= quantity(pool.cpu)
    assert quantity(model.resources.memory) <= quantity(pool.memory)


def quantity(text: str) -> float:
    units = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    match = re.fullmatch(r"([\d.]+)(\w*)", text)
    assert match
    return float(match[1]) * units[match[2]]


# Everything


def test_images_are_pinned_or_never_pulled() -> None:
    seen = 0
    for obj in EVERYTHING:
        for pod in pods(obj):
            for container in containers(pod):
                image, policy = container["image"], container["imagePullPolicy"]
                assert policy == "Never" or re.search(r"@sha256:[0-9a-f]{64}$", image)
                assert not image.endswith(":latest")
                seen += 1
    assert seen > 20


def test_pods_pass_the_restricted_level() -> None:
    for obj in EVERYTHING:
        for pod in pods(obj):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in containers(pod):
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    level = manifests.namespace(LAB)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == "restricted"


def test_disruption_budgets_never_block_a_drain() -> None:
    budgets = [obj["spec"] for obj in EVERYTHING if obj["kind"] == "PodDisruptionBudget"]
    assert budgets
    for spec in budgets:
        assert spec["maxUnavailable"] == 1
        assert "minAvailable" not in spec
        assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_claim_can_be_filled_and_shared() -> None:
    for cluster in (LAB, EKS, GKE):
        assert manifests.claim(cluster)["spec"]["accessModes"] == ["ReadWriteMany"]
    assert manifests.claim(EKS)["spec"]["storageClassName"] == "efs-sc"
    assert manifests.claim(LAB)["spec"]["storageClassName"] == ""


def test_the_monitor_has_the_labels_that_prometheus_selects_by() -> None:
    labels = manifests.pod_monitor(EKS)["metadata"]["labels"]
    assert labels["release"] == "kube-prometheus-stack"


def test_a_service_is_not_named_vllm_and_has_a_valid_name() -> None:
    for obj in EVERYTHING:
        if obj["kind"] == "Service":
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", obj["metadata"]["name"])
            assert obj["spec"]["type"] == "ClusterIP"


# Jobs


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_jobs_run_once_end_in_time_and_are_cleaned_away(
    model: ModelSpec, cluster: ClusterSpec
) -> None:
    jobs = [obj for obj in rendered.objects(model, cluster) if obj["kind"] == "Job"]
    assert len(jobs) == 4 + 2 * len(model.adapters)
    for job in jobs:
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["activeDeadlineSeconds"] > 0
        assert job["spec"]["ttlSecondsAfterFinished"] > 0
        for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
            assert labels["vllm-promotion.io/promotion"] == "run-1"
            of_all = labels["app.kubernetes.io/component"] == "collect"
            assert of_all or labels["vllm-promotion.io/model"] == model.name


@pytest.mark.parametrize(("model", "cluster"), PAIRS)
def test_downloads_stay_below_their_memory_limit(model: ModelSpec, cluster: ClusterSpec) -> None:
    for job in hub_jobs(model, cluster):
        [container] = job["spec"]["template"]["spec"]["containers"]
        variables = environment(container)
        assert "HF_XET_HIGH_PERFORMANCE" not in variables
        assert "HF_XET_HP" not in variables
        for bound in ("SIZE", "LIMIT"):
            cap = variables[f"HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_{bound}"]
            assert quantity(cap.replace("gb", "G")) <= quantity("4Gi") / 2
        assert variables["HF_HUB_DISABLE_SHARED_BLOBS"] == "1"
        assert variables.get("HF_ENDPOINT") == cluster.hub_endpoint
    fetch = hub_jobs(model, cluster)[1]["spec"]["template"]["spec"]["containers"][0]
    assert fetch["resources"]["limits"]["memory"] == "4Gi"


def test_the_token_is_a_reference_and_only_in_the_jobs_that_need_it() -> None:
    objects = rendered.objects(LLAMA, EKS)
    reference = {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN"}}
    for job in hub_jobs(LLAMA, EKS):
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert environment(container)["HF_TOKEN"] == reference
    for obj in objects:
        text = json.dumps(obj)
        assert "HUGGING_FACE_HUB_TOKEN" not in text
        assert ("HF_TOKEN" in text) == (obj in hub_jobs_of(objects))
    for job in hub_jobs(SMOLLM, LAB):
        assert "HF_TOKEN" not in json.dumps(job)


def hub_jobs_of(objects: list[Obj]) -> list[Obj]:
    components = ("resolve", "weights")
    return [
        o
        for o in objects
        if o["kind"] == "Job"
        and o["metadata"]["labels"]["app.kubernetes.io/component"] in components
    ]


def test_patterns_and_flags_reach_the_program() -> None:
    weights = LLAMA.weights.model_copy(
        update={"allow": ("*.json",), "ignore": ("-x*",), "allow_pickle": True}
    )
    model = LLAMA.model_copy(update={"weights": weights, "chat": False})
    [container] = manifests.download_job(model, EKS, rendered.COMMIT, "run-1")["spec"]["template"][
        "spec"
    ]["containers"]
    assert container["command"] == [
        *("python", "-m", "weights", "fetch", "--repo", LLAMA.repo),
        *("--commit", rendered.COMMIT, "--root", "/models"),
        *("--rehash-after-days=30", "--allow=*.json", "--ignore=-x*", "--allow-pickle"),
    ]


def test_a_jobs_name_says_its_content_promotion_and_attempt() -> None:
    def name(commit: str = "a" * 40, promotion: str = "run-1", attempt: int = 0) -> str:
        job = manifests.download_job(LLAMA, EKS, commit, promotion, attempt)
        return str(job["metadata"]["name"])

    assert name() == name()
    assert len({name(), name("b" * 40), name(promotion="run-2"), name(attempt=1)}) == 4


# Access


def test_the_pipeline_can_touch_no_secret_and_no_foreign_namespace() -> None:
    for cluster in (LAB, EKS, GKE):
        for role in manifests.rbac(cluster):
            for rule in role.get("rules", []):
                assert "secrets" not in rule["resources"]
                assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"]
                own = role["metadata"].get("namespace") == cluster.namespace
                if not own:
                    assert set(rule["verbs"]) <= {"get", "list", "watch"} or rule["resources"] == [
                        "pods/portforward"
                    ]


def test_engines_can_be_called_by_their_namespace_prometheus_and_marked_clients() -> None:
    spec = manifests.network_policy(EKS)["spec"]
    callers = spec["ingress"][0]["from"]
    assert {"podSelector": {}} in callers
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert {"namespaceSelector": monitoring} in callers
    assert {"namespaceSelector": {"matchLabels": {"vllm-promotion.io/client": "true"}}} in callers
    assert [port["port"] for rule in spec["egress"] for port in rule["ports"]] == [53, 53]


@pytest.mark.parametrize(
    ("address", "namespace"),
    [
        ("http://prometheus-operated.monitoring.svc:9090", "monitoring"),
        ("http://prometheus.obs.svc.cluster.local", "obs"),
        ("https://prometheus.example.com", None),
        ("http://10.0.0.1:9090", None),
        ("http://svc.example.svc", "example"),
    ],
)
def test_where_prometheus_is(address: str, namespace: str | None) -> None:
    prometheus = LAB.prometheus.model_copy(update={"address": address})
    cluster = LAB.model_copy(update={"prometheus": prometheus})
    assert prometheus_namespace(cluster) == namespace
