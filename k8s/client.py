"""One way to the API server: plain dict objects, timeouts, retries, our own errors."""

from collections.abc import Iterator, Mapping
from typing import Any

from catalog import ClusterSpec

Obj = dict[str, Any]
FIELD_MANAGER = "vllm-promotion"


def connect(cluster: ClusterSpec) -> "Client":
    """A client for the kubeconfig (KUBECONFIG, `cluster.context`) or the Pod's own account.

    Asks nothing of the server yet. Raises ConfigError.
    """
    raise NotImplementedError


class Client:
    """Objects of one cluster, as dicts. Thread-safe. `namespace` is the default one."""

    namespace: str

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Obj:
        """The object. Raises NotFound."""
        raise NotImplementedError

    def find(self, kind: str, name: str, *, namespace: str | None = None) -> Obj | None:
        """The object, or None."""
        raise NotImplementedError

    def list(
        self,
        kind: str,
        *,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        namespace: str | None = None,
    ) -> list[Obj]:
        """All objects with these labels and field values. namespace="*" means all namespaces."""
        raise NotImplementedError

    def apply(
        self, obj: Obj, *, dry_run: bool = False, force: bool = False, manager: str = FIELD_MANAGER
    ) -> Obj:
        """Server-side apply; unknown fields are refused. Raises Conflict with the owned fields."""
        raise NotImplementedError

    def create(self, obj: Obj) -> Obj:
        """Create. Raises AlreadyExists; a create whose answer was lost is recognised."""
        raise NotImplementedError

    def delete(
        self,
        kind: str,
        name: str,
        *,
        propagation: str = "Background",
        missing_ok: bool = True,
        uid: str | None = None,
        namespace: str | None = None,
    ) -> None:
        """Ask for the deletion; doesn't wait for it. `uid`: only if it is still that object."""
        raise NotImplementedError

    def patch(
        self,
        kind: str,
        name: str,
        patch: Obj,
        *,
        manager: str = FIELD_MANAGER,
        namespace: str | None = None,
    ) -> Obj:
        """JSON merge patch. A metadata.resourceVersion in it is a precondition: Conflict."""
        raise NotImplementedError

    def replace(self, obj: Obj) -> Obj:
        """PUT the whole object, if it still has the resourceVersion in `obj`; else Conflict."""
        raise NotImplementedError

    def scale(self, kind: str, name: str, replicas: int, *, namespace: str | None = None) -> None:
        """Set the number of replicas through the scale subresource."""
        raise NotImplementedError

    def watch(
        self,
        kind: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout_s: float,
        window_s: float = 30.0,
        namespace: str | None = None,
    ) -> Iterator[Obj | None]:
        """States of one object (`name`; None: absent) or of many, for `timeout_s` seconds."""
        raise NotImplementedError
