"""The Jobs of a promotion: resolve a revision, download weights, benchmark a candidate.

A Job's name has a hash of its content, the promotion and the attempt in it: who starts it again
adopts it, and a later promotion never takes an old Job's end for its own.
"""

from collections.abc import Collection

from catalog import ClusterSpec, ModelSpec
from catalog.model import Adapter
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
    WEIGHTS,
    Obj,
    Release,
    content_hash,
    labels,
    weights_key,
)

# Finished Jobs stay for a day, for those who want to look; the pipeline has read their logs.
KEEP_SECONDS = 86_400
# From the Job's start: a node that must come first (k8s/jobs.py) takes most of it.
RESOLVE_SECONDS = 900
# 140 GB at 10 MB/s take 4 hours; a stalled download is noticed by its own watchdog long before.
DOWNLOAD_SECONDS = 6 * 3600

COLLECT = "collect"  # the command, and the component label of its Jobs
# Deleting 10 TB of many files on a network file system takes a while.
COLLECT_SECONDS = 3600
IMPORTER_SECONDS = 12 * 3600

# A new volume may belong to root. Only its top folder is looked at, so this is quick; where the
# storage decides the owner (EFS access points) it does nothing.
_WRITES_MODELS = {"fsGroup": UID, "fsGroupChangePolicy": "OnRootMismatch"}
# A sidecar never ends, and so would the Job (istio#11045).
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}

DOWNLOAD_MEMORY = "4Gi"
# What Xet's client holds in memory: so much that 16 streams fill a fast network, where the
# program's own choice (weights/__init__.py) has two, and well below DOWNLOAD_MEMORY. It must not be
# left to hf_xet, whose share of the node's memory got Jobs killed (xet-core#927, hub#3300).
XET_ENV = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "1gb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "1gb",
}


def resolve_job(
    model: ModelSpec,
    cluster: ClusterSpec,
    revision: str,
    promotion: str,
    adapter: Adapter | None = None,
) -> Obj:
    """Asks the Hub which commit the revision of the model or of its adapter is."""
    repo = adapter.repo if adapter else model.repo
    container = {
        **_program(cluster, "resolve", cpu="50m", memory="128Mi", limit="512Mi"),
        "command": _command("weights", "resolve", "--repo", repo, "--revision", revision),
        "env": _hub_env(model, cluster),
        "volumeMounts": scratch_mounts(),
    }
    return _job(model, cluster, promotion, 0, "resolve", container, [], deadline_s=RESOLVE_SECONDS)


def download_job(
    model: ModelSpec,
    cluster: ClusterSpec,
    commit: str,
    promotion: str,
    attempt: int = 0,
    *,
    rehash: bool = False,
) -> Obj:
    """Fetches, verifies and publishes the weights of a commit on the claim.

    `attempt`: 1, 2, … for a retry. `rehash`: reads all of it again if it is there already.
    """
    weights = model.weights
    # --allow=*.json, not two words: a pattern may begin with a dash.
    options = [f"--allow={pattern}" for pattern in weights.allow]
    options += [f"--ignore={pattern}" for pattern in weights.ignore]
    options += ["--allow-pickle"] if weights.allow_pickle else []
    options += ["--chat"] if model.chat else []
    options += ["--rehash"] if rehash else []
    return _fetch_job(model, cluster, model.repo, commit, promotion, attempt, options)


def adapter_job(
    model: ModelSpec,
    cluster: ClusterSpec,
    adapter: Adapter,
    commit: str,
    promotion: str,
    attempt: int = 0,
    *,
    base: str,
    rehash: bool = False,
) -> Obj:
    """The same for an adapter of the model, whose own weights are published at commit `base`."""
    options = [f"--adapter-of={model.repo}@{base}"]
    options += ["--rehash"] if rehash else []
    return _fetch_job(model, cluster, adapter.repo, commit, promotion, attempt, options)


def _fetch_job(
    model: ModelSpec,
    cluster: ClusterSpec,
    repo: str,
    commit: str,
    promotion: str,
    attempt: int,
    options: list[str],
) -> Obj:
    command = _command("weights", "fetch", "--repo", repo, "--commit", commit, "--root", MODELS)
    command += [f"--rehash-after-days={model.weights.rehash_after_days:g}"]
    container = {
        **_program(cluster, "weights", cpu="250m", memory="512Mi", limit=DOWNLOAD_MEMORY),
        "command": [*command, *options],
        "env": _hub_env(model, cluster),
        "volumeMounts": [{"name": "models", "mountPath": MODELS}, *scratch_mounts()],
    }
    job = _job(
        model,
        cluster,
        promotion,
        attempt,
        "weights",
        container,
        [_models(cluster)],
        deadline_s=DOWNLOAD_SECONDS,
    )
    job["spec"]["template"]["spec"]["securityContext"] |= _WRITES_MODELS
    marks = job["metadata"]["labels"]
    job["metadata"]["labels"] = {**marks, WEIGHTS: weights_key(repo, commit)}
    return job


def collect_job(
    cluster: ClusterSpec,
    promotion: str,
    keep: Collection[str],
    *,
    older_than_days: float | None,
    free: str | None,
    dry_run: bool,
) -> Obj:
    """Removes published commits but for those in `keep`, by age and by space; or says which."""
    command = _command("weights", COLLECT, "--root", MODELS, "--keep", *sorted(keep))
    command += [f"--older-than={older_than_days}"] if older_than_days is not None else []
    command += [f"--free={free}"] if free is not None else []
    command += ["--dry-run"] if dry_run else []
    container = {
        **_program(cluster, COLLECT, cpu="50m", memory="128Mi", limit="512Mi"),
        "command": command,
        "env": env(SCRATCH_ENV),
        "volumeMounts": [{"name": "models", "mountPath": MODELS}, *scratch_mounts()],
    }
    job = _job(
        None,
        cluster,
        promotion,
        0,
        COLLECT,
        container,
        [_models(cluster)],
        deadline_s=COLLECT_SECONDS,
    )
    job["spec"]["template"]["spec"]["securityContext"] |= _WRITES_MODELS
    return job


def importer(cluster: ClusterSpec) -> Obj:
    """A Pod that waits with the volume mounted, for an administrator who brings weights:
    `kubectl exec -i weights-importer -- python -m weights import --root /models --from -`.
    """
    wait = f"import time; time.sleep({IMPORTER_SECONDS})"
    container = {
        **_program(cluster, "importer", cpu="250m", memory="256Mi", limit="1Gi"),
        "command": ["python", "-c", wait],
        "env": env(SCRATCH_ENV),
        "volumeMounts": [{"name": "models", "mountPath": MODELS}, *scratch_mounts()],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "weights-importer",
            "namespace": cluster.namespace,
            "labels": labels("importer"),
            "annotations": _NO_SIDECAR,
        },
        "spec": {
            **_pod_spec(container, [_models(cluster)]),
            "securityContext": pod_security() | _WRITES_MODELS,
            # Who forgets it: it ends by itself, and nothing in it needs time for that.
            "activeDeadlineSeconds": IMPORTER_SECONDS,
            "terminationGracePeriodSeconds": 1,
        },
    }


def _models(cluster: ClusterSpec) -> Obj:
    return {
        "name": "models",
        "persistentVolumeClaim": {"claimName": cluster.storage.claim},
    }


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
    model: ModelSpec | None,
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
    prefix = f"{model.object_name}-" if model else ""
    spec: Obj = {
        # A retry would run unwatched; who retries is the promotion.
        "backoffLimit": 0,
        "activeDeadlineSeconds": deadline_s,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "template": {
            "metadata": {
                "labels": marks,
                "annotations": _NO_SIDECAR,
            },
            "spec": _pod_spec(container, volumes),
        },
    }
    unique = content_hash({"spec": spec, "attempt": attempt})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{prefix}{component}-{unique}",
            "namespace": cluster.namespace,
            "labels": marks,
        },
        "spec": spec,
    }


def _pod_spec(container: Obj, volumes: list[Obj]) -> Obj:
    return {
        "restartPolicy": "Never",
        "serviceAccountName": JOBS_ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [*volumes, *scratch_volumes()],
    }
