"""What all Pods of this project have in common: they pass the `restricted` Pod security level."""

from k8s.manifests.release import UID, Obj

# Writable places beside the volumes with data: everything else is read-only.
SCRATCH = "/scratch"
SCRATCH_ENV = {"HOME": SCRATCH, "TMPDIR": "/tmp"}


def pod_security() -> Obj:
    """Of the Pod. No fsGroup: a change of ownership of 100 GB of weights takes many minutes."""
    return {
        "runAsNonRoot": True,
        "runAsUser": UID,
        "runAsGroup": UID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Obj:
    """Of each container."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def scratch_volumes() -> list[Obj]:
    """Volumes that scratch_mounts() mounts."""
    return [{"name": "scratch", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]


def scratch_mounts() -> list[Obj]:
    """HOME and TMPDIR."""
    return [{"name": "scratch", "mountPath": SCRATCH}, {"name": "tmp", "mountPath": "/tmp"}]


def env(variables: dict[str, str]) -> list[Obj]:
    """Environment variables as a container's list; a name stands there once."""
    return [{"name": name, "value": value} for name, value in variables.items()]
