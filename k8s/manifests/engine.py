"""What serves a model: a Deployment and a PodDisruptionBudget a slot, one Service a model."""

import math

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.pod import (
    SCRATCH,
    SCRATCH_ENV,
    container_security,
    env,
    pod_security,
    scratch_mounts,
    scratch_volumes,
)
from k8s.manifests.release import (
    COMMIT,
    DOMAIN,
    ENGINE,
    ENGINE_ACCOUNT,
    GPU_CHECK,
    MODEL,
    MODELS,
    PORT,
    PROMOTION,
    SLOT,
    Obj,
    Release,
    Slot,
    engine_selector,
    labels,
    slot_name,
)

# New connections still arrive while proxies and load balancers learn that the Pod is going.
PRE_STOP_SECONDS = 15
# vLLM's own exit after its --shutdown-timeout, before the kubelet kills it.
EXIT_SECONDS = 15
# Until the engine starts: a node may have to be bought, and its image of 10 GB pulled.
NODE_AND_IMAGE_SECONDS = 900

# What vLLM takes as --max-lora-rank (vllm/config/lora.py), but for 1.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# What k8s.gpus.parse_nvidia_smi reads, in this order.
GPU_FIELDS = ("index", "name", "uuid", "memory.total", "memory.used", "driver_version")
NVIDIA_SMI = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv"]


def deployment(release: Release) -> Obj:
    """The Deployment of the slot. No `replicas`: those belong to KEDA, or to the rollout.

    A slot's template changes only while the slot is idle. The rolling-update settings are for
    those who edit a live one by hand: the old Pod stays until the new one is ready.
    """
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": release.name,
            "namespace": release.cluster.namespace,
            "labels": labels(ENGINE, release.model, **{SLOT: release.slot}),
            "annotations": {
                PROMOTION: release.promotion,
                COMMIT: release.commit,
                f"{DOMAIN}/repo": release.model.repo,
            },
        },
        "spec": {
            "selector": {"matchLabels": engine_selector(release.model, release.slot)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "progressDeadlineSeconds": release.startup_seconds + NODE_AND_IMAGE_SECONDS,
            "revisionHistoryLimit": 3,
            "template": {
                "metadata": {
                    "labels": labels(ENGINE, release.model, **{SLOT: release.slot}),
                    "annotations": {COMMIT: release.commit},
                },
                "spec": _pod(release),
            },
        },
    }


def _pod(release: Release) -> Obj:
    model, cluster = release.model, release.cluster
    pool = cluster.pool(model)
    pod: Obj = {
        "serviceAccountName": ENGINE_ACCOUNT,
        "automountServiceAccountToken": False,
        # Else the Service of a model named "vllm" sets VLLM_PORT=tcp://…, which vLLM refuses.
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": (
            PRE_STOP_SECONDS + model.rollout.drain_seconds + EXIT_SECONDS
        ),
        "initContainers": [_gpu_check(release)],
        "containers": [_engine(release)],
        "volumes": [
            {
                "name": "models",
                "persistentVolumeClaim": {"claimName": cluster.storage.claim, "readOnly": True},
            },
            # A container's own /dev/shm has 64Mi, too little for tensor parallel.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": model.resources.shm}},
            *scratch_volumes(),
        ],
    }
    if pool.labels:
        pod["nodeSelector"] = dict(pool.labels)
    if pool.tolerations:
        # Exists: the taint's value is "true" on EKS and "present" on GKE.
        pod["tolerations"] = [
            {"key": t.key, "operator": "Exists"} | ({"effect": t.effect} if t.effect else {})
            for t in pool.tolerations
        ]
    return pod


def _gpu_check(release: Release) -> Obj:
    """GPU truth of this very Pod: an init container with the same limits gets the same devices."""
    gpus = release.model.gpus
    return {
        "name": GPU_CHECK,
        "image": release.image,
        "imagePullPolicy": release.cluster.images.pull_policy,
        "command": NVIDIA_SMI,
        "resources": {
            "requests": {"cpu": "10m", "memory": "64Mi"},
            "limits": {"memory": "256Mi", gpus.resource: str(gpus.count)},
        },
        "securityContext": container_security(),
    }


def _engine(release: Release) -> Obj:
    model = release.model
    # Many looks at a small model, few at a large one; the budget is the same.
    startup_period = max(1, min(10, release.startup_seconds // 60))
    return {
        "name": ENGINE,
        "image": release.image,
        "imagePullPolicy": release.cluster.images.pull_policy,
        "args": _arguments(release),
        "env": env(_environment(release)),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {
            "requests": {"cpu": model.resources.cpu, "memory": model.resources.memory},
            "limits": {
                "memory": model.resources.memory,
                model.gpus.resource: str(model.gpus.count),
            },
        },
        "securityContext": container_security(),
        # The load has a budget of its own; liveness begins after it.
        "startupProbe": _health(
            periodSeconds=startup_period,
            failureThreshold=math.ceil(release.startup_seconds / startup_period),
            timeoutSeconds=5,
        ),
        "readinessProbe": _health(periodSeconds=5, failureThreshold=3, timeoutSeconds=5),
        # /health is 503 only when the engine is dead. A busy one may answer late: patience.
        "livenessProbe": _health(periodSeconds=10, failureThreshold=6, timeoutSeconds=10),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *scratch_mounts(),
        ],
    }


def _arguments(release: Release) -> list[str]:
    """The image's entry point is `vllm serve`."""
    model = release.model
    args = [release.weights_path, "--served-model-name", model.served_name]
    if model.gpus.count > 1:
        args += ["--tensor-parallel-size", str(model.gpus.count)]
    # By default vLLM aborts on SIGTERM what is in flight.
    args += ["--shutdown-timeout", str(model.rollout.drain_seconds)]
    if release.adapters:
        rank = max(adapter.rank for adapter in release.adapters)
        args += ["--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= rank))]
        # One batch may hold requests of all of them; with vLLM's 1 they would take turns.
        args += ["--max-loras", str(len(release.adapters))]
        args += ["--lora-modules", *(f"{a.name}={a.path}" for a in release.adapters)]
    return [*args, *model.args]


def _environment(release: Release) -> dict[str, str]:
    """Ours wins over the catalog's: offline, silent, and writing only where it may."""
    return dict(release.model.env) | {
        **SCRATCH_ENV,
        # torch asks for the user's name, and this uid has none in the image.
        "USER": "vllm",
        "VLLM_CACHE_ROOT": f"{SCRATCH}/vllm",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(release.startup_seconds),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _health(*, periodSeconds: int, failureThreshold: int, timeoutSeconds: int) -> Obj:  # noqa: N803
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": periodSeconds,
        "failureThreshold": failureThreshold,
        "timeoutSeconds": timeoutSeconds,
    }


def service(model: ModelSpec, cluster: ClusterSpec, slot: Slot) -> Obj:
    """The Service that users call; its selector says which slot is live."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": model.object_name,
            "namespace": cluster.namespace,
            "labels": labels("service", model),
        },
        "spec": {
            "type": "ClusterIP",
            "selector": {MODEL: model.name, SLOT: slot},
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def pdb(release: Release) -> Obj:
    """The PodDisruptionBudget of the slot.

    minAvailable 1 would block every drain of a node while there is one replica.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": slot_name(release.model, release.slot),
            "namespace": release.cluster.namespace,
            "labels": labels(ENGINE, release.model, **{SLOT: release.slot}),
        },
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": engine_selector(release.model, release.slot)},
        },
    }
