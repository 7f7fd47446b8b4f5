"""The Jobs of a promotion: resolve a revision, download weights, benchmark a candidate.

A Job's name has a hash of its content, the promotion and the attempt in it: who starts it again
adopts it, and a later promotion never takes an old Job's end for its own.
"""

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
    JOBS_ACCOUNT,
    MODELS,
    PROMOTION,
    UID,
    Obj,
    Release,
    content_hash,
    labels,
)

# Finished Jobs stay for a day, for those who want to look; the pipeline has read their logs.
KEEP_SECONDS = 86_400
RESOLVE_SECONDS = 300
# 140 GB at 10 MB/s take 4 hours; a stalled download is noticed by its own watchdog long before.
DOWNLOAD_SECONDS = 6 * 3600

DOWNLOAD_MEMORY = "4Gi"
# All below DOWNLOAD_MEMORY. HF_XET_HIGH_PERFORMANCE must never be set: it lifts these caps to
# 64 GB, so that the Job is killed (xet-core#927, hub#3300).
XET_ENV = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "1gb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "512mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "128mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "256mb",
    "HF_XET_DATA_MAX_CONCURRENT_FILE_DOWNLOADS": "4",
}


def resolve_job(
    model: ModelSpec, cluster: ClusterSpec, revision: str, promotion: str, attempt: int = 0
) -> Obj:
    """Asks the Hub which commit the revision is. `attempt`: 1, 2, … for a retry."""
    container = {
        **_program(cluster, "resolve", cpu="50m", memory="128Mi", limit="512Mi"),
        "command": _command("weights", "resolve", "--repo", model.repo, "--revision", revision),
        "env": _hub_env(model, cluster),
        "volumeMounts": scratch_mounts(),
    }
    return _job(
        model, cluster, promotion, attempt, "resolve", container, [], deadline_s=RESOLVE_SECONDS
    )


def download_job(
    model: ModelSpec, cluster: ClusterSpec, commit: str, promotion: str, attempt: int = 0
) -> Obj:
    """Fetches, verifies and publishes the weights of a commit on the claim."""
    weights = model.weights
    command = _command(
        "weights", "fetch", "--repo", model.repo, "--commit", commit, "--root", MODELS
    )
    # --allow=*.json, not two words: a pattern may begin with a dash.
    command += [f"--allow={pattern}" for pattern in weights.allow]
    command += [f"--ignore={pattern}" for pattern in weights.ignore]
    command += ["--allow-pickle"] if weights.allow_pickle else []
    command += ["--chat"] if model.chat else []
    container = {
        **_program(cluster, "weights", cpu="250m", memory="512Mi", limit=DOWNLOAD_MEMORY),
        "command": command,
        "env": _hub_env(model, cluster),
        "volumeMounts": [{"name": "models", "mountPath": MODELS}, *scratch_mounts()],
    }
    volume = {
        "name": "models",
        "persistentVolumeClaim": {"claimName": cluster.storage.claim},
    }
    job = _job(
        model,
        cluster,
        promotion,
        attempt,
        "weights",
        container,
        [volume],
        deadline_s=DOWNLOAD_SECONDS,
    )
    # A new volume may belong to root. Only its top folder is looked at, so this is quick; where
    # the storage decides the owner (EFS access points) it does nothing.
    job["spec"]["template"]["spec"]["securityContext"] |= {
        "fsGroup": UID,
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    return job


def benchmark_job(
    release: Release, profile_json: str, trace: str = "", *, deadline_s: int
) -> tuple[Obj, Obj]:
    """The ConfigMap with the load profile, and the Job that runs it within `deadline_s`.

    `trace`: the content of the trace that the profile names as trace.jsonl, if it names one.

    It asks the candidate's Pod directly: a proxy would falsify the times. No CPU limit: throttling
    would too. Several workers are asked for because one core is too little: each gets one.
    """
    model, cluster = release.model, release.cluster
    workers = model.traffic.workers
    config = {"profile.json": profile_json} | ({"trace.jsonl": trace} if trace else {})
    name = f"{model.object_name}-benchmark-{content_hash({'data': config, 'of': release.name})}"
    profile: Obj = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": labels("benchmark", model, **{PROMOTION: release.promotion}),
        },
        "data": config,
    }
    container = {
        **_program(
            cluster,
            "benchmark",
            cpu="500m" if workers == 1 else str(workers),
            memory=f"{512 * workers}Mi",
            limit=f"{2 * workers}Gi",
        ),
        "command": _command("loadtests", "--profile", "/profile/profile.json", "--out", "/out"),
        "env": env(SCRATCH_ENV),
        "volumeMounts": [
            {"name": "profile", "mountPath": "/profile", "readOnly": True},
            {"name": "out", "mountPath": "/out"},
            *scratch_mounts(),
        ],
    }
    volumes: list[Obj] = [
        {"name": "profile", "configMap": {"name": name}},
        {"name": "out", "emptyDir": {}},
    ]
    job = _job(
        model,
        cluster,
        release.promotion,
        0,
        "benchmark",
        container,
        volumes,
        deadline_s=deadline_s,
    )
    return profile, job


def _command(program: str, *args: str) -> list[str]:
    return ["python", "-m", program, *args]


def _program(cluster: ClusterSpec, name: str, *, cpu: str, memory: str, limit: str) -> Obj:
    return {
        "name": name,
        "image": cluster.images.jobs,
        "imagePullPolicy": cluster.images.pull_policy,
        "resources": {
            "requests": {"cpu": cpu, "memory": memory},
            "limits": {"memory": limit},
        },
        "securityContext": container_security(),
        # The last lines of a program that says nothing else are in the Pod's status then.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _hub_env(model: ModelSpec, cluster: ClusterSpec) -> list[Obj]:
    variables = {
        **SCRATCH_ENV,
        "HF_HOME": f"{SCRATCH}/huggingface",
        # Links between blobs break on a shared volume.
        "HF_HUB_DISABLE_SHARED_BLOBS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **XET_ENV,
    }
    if cluster.hub_endpoint:
        variables["HF_ENDPOINT"] = cluster.hub_endpoint
    out = env(variables)
    if model.weights.token_secret:
        reference = {"name": model.weights.token_secret, "key": "HF_TOKEN"}
        out.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return out


def _job(
    model: ModelSpec,
    cluster: ClusterSpec,
    promotion: str,
    attempt: int,
    component: str,
    container: Obj,
    volumes: list[Obj],
    *,
    deadline_s: int,
) -> Obj:
    marks = labels(component, model, **{PROMOTION: promotion})
    spec: Obj = {
        # A retry would run unwatched; who retries is the promotion.
        "backoffLimit": 0,
        "activeDeadlineSeconds": deadline_s,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "template": {
            "metadata": {
                "labels": marks,
                # A sidecar never ends, and so would the Job (istio#11045).
                "annotations": {"sidecar.istio.io/inject": "false"},
            },
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": JOBS_ACCOUNT,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "securityContext": pod_security(),
                "containers": [container],
                "volumes": [*volumes, *scratch_volumes()],
            },
        },
    }
    unique = content_hash({"spec": spec, "attempt": attempt})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{model.object_name}-{component}-{unique}",
            "namespace": cluster.namespace,
            "labels": marks,
        },
        "spec": spec,
    }
