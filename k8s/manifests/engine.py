"""What serves a model: a Deployment and a PodDisruptionBudget a slot, one Service a model."""

from catalog import ClusterSpec, ModelSpec
from k8s.manifests.release import Obj, Release, Slot


def deployment(release: Release) -> Obj:
    """The Deployment of the slot. No `replicas`: those belong to KEDA, or to the rollout."""
    raise NotImplementedError


def service(model: ModelSpec, cluster: ClusterSpec, slot: Slot) -> Obj:
    """The Service that users call; its selector says which slot is live."""
    raise NotImplementedError


def pdb(release: Release) -> Obj:
    """The PodDisruptionBudget of the slot."""
    raise NotImplementedError
