"""What a cluster needs once, applied by an admin: namespace, claim, accounts, monitor, policy."""

from catalog import ClusterSpec
from k8s.manifests.release import Obj


def namespace(cluster: ClusterSpec) -> Obj:
    raise NotImplementedError


def claim(cluster: ClusterSpec) -> Obj:
    raise NotImplementedError


def service_accounts(cluster: ClusterSpec) -> list[Obj]:
    raise NotImplementedError


def rbac(cluster: ClusterSpec) -> list[Obj]:
    raise NotImplementedError


def network_policy(cluster: ClusterSpec) -> Obj:
    raise NotImplementedError


def pod_monitor(cluster: ClusterSpec) -> Obj:
    raise NotImplementedError


def platform(cluster: ClusterSpec) -> list[Obj]:
    """All of it, in an order in which it can be applied."""
    raise NotImplementedError
