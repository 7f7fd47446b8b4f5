"""Objects of a cluster as plain dicts: read, apply, watch; with our own errors."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from catalog import ClusterSpec
from k8s.answers import Asked, error_from, foreign
from k8s.errors import ConfigError, Conflict, KubernetesError, NotFound, Unreachable
from k8s.kinds import Kind, kind_of
from k8s.transport import RETRY_S, Backoff, Request, Transport

Obj = dict[str, Any]
Objs = list[Obj]  # inside Client, `list` is its method
FIELD_MANAGER = "vllm-promotion"

_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
_PAGE = "500"
# A watch window that is silent this long after its end is a half-open connection.
_GRACE_S = 5.0
# A server that is going down ends each window at once: don't hammer it.
_SHORT_S = 0.5
_CONFLICT_TRIES = 5


def connect(cluster: ClusterSpec) -> "Client":
    """A client for the kubeconfig (KUBECONFIG, `cluster.context`) or the Pod's own account.

    Asks nothing of the server yet. Raises ConfigError.
    """
    return Client(Transport(cluster.context), cluster.namespace)


class Client:
    """Objects of one cluster, as dicts. Thread-safe. `namespace` is the default one.

    All methods raise Unreachable, Unauthorized, Forbidden and, for CRDs, MissingKind. They try
    again after cut connections, 429 (as its Retry-After says) and 5xx, for up to `budget_s`.
    """

    def __init__(self, transport: Transport, namespace: str, budget_s: float = RETRY_S) -> None:
        self.transport = transport
        self.namespace = namespace
        self._budget_s = budget_s

    def within(self, budget_s: float) -> "Client":
        """The same, but no request is tried for longer than `budget_s`.

        For writes under a Lease: one that is still being tried when the Lease has passed to
        someone else would undo what they did.
        """
        return Client(self.transport, self.namespace, budget_s)

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Obj:
        """The object. Raises NotFound."""
        return self._call("get", "GET", kind, name, namespace)

    def find(self, kind: str, name: str, *, namespace: str | None = None) -> Obj | None:
        """The object, or None."""
        try:
            return self.get(kind, name, namespace=namespace)
        except NotFound:
            return None

    def list(
        self,
        kind: str,
        *,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        namespace: str | None = None,
    ) -> Objs:
        """All objects with these labels and field values. namespace="*" means all namespaces."""
        return self._list(kind_of(kind), _selectors(labels, fields), namespace, self._budget_s)[0]

    def apply(
        self, obj: Obj, *, dry_run: bool = False, force: bool = False, manager: str = FIELD_MANAGER
    ) -> Obj:
        """Server-side apply; unknown fields are refused. Raises Conflict with the owned fields.

        A metadata.resourceVersion in it is a precondition: Conflict, with no fields.
        """
        query = {"fieldManager": manager, "fieldValidation": "Strict"}
        if force:
            query["force"] = "true"
        if dry_run:
            query["dryRun"] = "All"
        kind, name, namespace = _identity(obj)

        def once() -> Obj:
            return self._call(
                "apply", "PATCH", kind, name, namespace, query=query, body=obj, content_type=_APPLY
            )

        return once() if "resourceVersion" in obj["metadata"] else _despite_conflicts(once)

    def create(self, obj: Obj) -> Obj:
        """Create. Raises AlreadyExists; a create whose answer was lost is recognised."""
        kind, name, namespace = _identity(obj)
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return self._call("create", "POST", kind, name, namespace, query=query, body=obj)

    def delete(
        self,
        kind: str,
        name: str,
        *,
        propagation: str = "Background",
        uid: str | None = None,
        namespace: str | None = None,
    ) -> None:
        """Ask for the deletion; doesn't wait for it. `uid`: only if it is still that object.

        An object that isn't there is deleted. Raises Conflict if the server refuses it.
        """
        options: Obj = {"propagationPolicy": propagation}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            self._call("delete", "DELETE", kind, name, namespace, body=options)
        except NotFound:
            pass
        except Conflict:
            live = self.find(kind, name, namespace=namespace)
            if live is not None and uid in (None, live["metadata"]["uid"]):
                raise

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
        query = {"fieldManager": manager, "fieldValidation": "Strict"}

        def once() -> Obj:
            return self._call(
                "patch",
                "PATCH",
                kind,
                name,
                namespace,
                query=query,
                body=patch,
                content_type=_MERGE,
            )

        conditional = "resourceVersion" in patch.get("metadata", {})
        return once() if conditional else _despite_conflicts(once)

    def replace(self, obj: Obj) -> Obj:
        """PUT the whole object, if it still has the resourceVersion in `obj`; else Conflict."""
        if not obj["metadata"].get("resourceVersion"):
            raise ValueError("replace() needs metadata.resourceVersion: it is the precondition")
        kind, name, namespace = _identity(obj)
        return self._call("update", "PUT", kind, name, namespace, body=obj)

    def scale(self, kind: str, name: str, replicas: int, *, namespace: str | None = None) -> None:
        """Set the number of replicas through the scale subresource."""
        _despite_conflicts(
            lambda: self._call(
                "scale",
                "PATCH",
                kind,
                name,
                namespace,
                subresource="scale",
                query={"fieldManager": FIELD_MANAGER},
                body={"spec": {"replicas": replicas}},
                content_type=_MERGE,
            )
        )

    def asked(
        self, verb: str, kind: Kind | None, name: str | None, namespace: str | None = None
    ) -> Asked:
        """What is asked, for messages."""
        account = self.transport.account
        return Asked(verb, kind, namespace, name, account.server, account.described)

    def watch(
        self,
        kind: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout_s: float,
        window_s: float = 30.0,
    ) -> Iterator[Obj | None]:
        """States of one object (`name`; None: absent), or of all with `labels`, as they come.

        First what there is (nothing: None), then each change; of several, a deleted one as None.
        At the end of each window of `window_s` the last state of `name` again (of several:
        None), so that the reader can judge by time too. Ends after `timeout_s`. After 410, a cut
        or half-open connection (noticed within `window_s` + 5 s) it lists again: states in
        between may be missed, the last one never is. Raises Unreachable if the server is away
        at the end.
        """
        selectors = _selectors(labels, {"metadata.name": name} if name else None)
        deadline = time.monotonic() + timeout_s
        backoff = Backoff()
        while True:
            left = deadline - time.monotonic()
            found, version = self._list(kind_of(kind), selectors, None, left)
            last = found[-1] if found else None
            yield from found
            if not found:
                yield None
            try:
                while (left := deadline - time.monotonic()) > 0:
                    opened = time.monotonic()
                    seconds = max(1, round(min(window_s, left)))
                    for event in self._window(kind, selectors, version, seconds):
                        backoff = Backoff()
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            last = None if event["type"] == "DELETED" else event["object"]
                            yield last
                    if time.monotonic() - opened < _SHORT_S:
                        _pause(backoff, deadline)
                    yield last if name else None
                return
            except Unreachable as error:
                _pause(backoff, deadline, error.retry_after_s)
            except KubernetesError as error:
                if error.code != 410:
                    raise
                _pause(backoff, deadline)

    def _window(
        self,
        kind_name: str,
        selectors: Mapping[str, str],
        version: str,
        seconds: int,
    ) -> Iterator[Obj]:
        """The events of one watch request of so many seconds. Raises for an ERROR event."""
        kind = kind_of(kind_name)
        where = self._namespace(kind, None)
        query = {
            **selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        asked = self.asked("watch", kind, None, where)
        request = Request(asked, "GET", kind.path(where), query)
        with self.transport.stream(request, seconds + _GRACE_S) as pieces:
            for line in split_lines(pieces):
                event = _json(line, asked)
                if event["type"] == "ERROR":
                    status = event["object"]
                    if status.get("code", 0) >= 500:
                        raise Unreachable(f"{asked}: {status.get('message')}")
                    raise error_from(status.get("code", 0), status, asked)
                yield event

    def _list(
        self, kind: Kind, selectors: Mapping[str, str], namespace: str | None, budget_s: float
    ) -> tuple[Objs, str]:
        """All pages, and the resourceVersion to watch from."""
        where = self._namespace(kind, namespace)
        asked = self.asked("list", kind, None, where)
        items: Objs = []
        query = {**selectors, "limit": _PAGE}
        while True:
            request = Request(asked, "GET", kind.path(where), query)
            try:
                page = _object(self.transport.call(request, budget_s), asked)
            except KubernetesError as error:
                # The next page of a list that changed meanwhile: then all at once.
                if error.code != 410 or "continue" not in query:
                    raise
                items, query = [], dict(selectors)
                continue
            for item in page["items"]:  # unlike single objects, they come without their kind
                items.append({"apiVersion": kind.api_version, "kind": kind.name, **item})
            if not page["metadata"].get("continue"):
                return items, page["metadata"]["resourceVersion"]
            query = {**query, "continue": page["metadata"]["continue"]}

    def _namespace(self, kind: Kind, namespace: str | None) -> str | None:
        if not kind.namespaced or namespace == "*":
            return None
        return namespace or self.namespace

    def _call(
        self,
        verb: str,
        method: str,
        kind_name: str,
        name: str,
        namespace: str | None,
        *,
        subresource: str = "",
        query: Mapping[str, str] | None = None,
        body: Obj | None = None,
        content_type: str = "application/json",
    ) -> Obj:
        kind = kind_of(kind_name)
        where = self._namespace(kind, namespace)
        path = kind.path(where, None if method == "POST" else name, subresource)
        request = Request(
            self.asked(verb, kind, name, where), method, path, query or {}, body, content_type
        )
        try:
            return _object(self.transport.call(request, self._budget_s), request.asked)
        except Conflict:
            # The answer to an earlier try was lost: was it that one which changed the object?
            live = self.find(kind_name, name, namespace=namespace) if request.unsure else None
            if live is not None and body is not None and _has(live, body):
                return live
            raise


def _pause(backoff: Backoff, deadline: float, at_least_s: float = 0.0) -> None:
    """Sleep, to the deadline at most."""
    if not backoff.sleep(deadline, at_least_s):
        time.sleep(max(0.0, deadline - time.monotonic()))


def split_lines(pieces: Iterator[bytes], *, last: bool = False) -> Iterator[bytes]:
    """Whole lines, without their end. `last`: also what comes after the last end of a line."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if last and rest:
        yield rest


def _identity(obj: Obj) -> tuple[str, str, str | None]:
    return obj["kind"], obj["metadata"]["name"], obj["metadata"].get("namespace")


def _selectors(
    labels: Mapping[str, str] | None, fields: Mapping[str, str] | None
) -> dict[str, str]:
    selectors = {}
    for key, wanted in (("labelSelector", labels), ("fieldSelector", fields)):
        if wanted:
            selectors[key] = ",".join(f"{name}={value}" for name, value in wanted.items())
    return selectors


def _json(body: bytes, asked: Asked) -> Obj:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ConfigError(foreign(asked, repr(body[:200].decode("utf-8", "replace"))))
    return answer


def _object(body: bytes, asked: Asked) -> Obj:
    """An object, a list of them, or a Status. Raises ConfigError for what is none."""
    answer = _json(body, asked)
    if not isinstance(answer.get("metadata"), dict):
        raise ConfigError(foreign(asked, repr(body[:200].decode("utf-8", "replace"))))
    return answer


def _despite_conflicts(call: Callable[[], Obj]) -> Obj:
    """Try again when someone else's write came between, but not when fields are owned by others.

    Only for requests without a precondition of ours: the server then conflicts with itself.
    """
    for tries_left in reversed(range(_CONFLICT_TRIES)):
        try:
            return call()
        except Conflict as conflict:
            if conflict.fields or not tries_left:
                raise
            time.sleep(0.05 * (_CONFLICT_TRIES - tries_left))
    raise AssertionError("the last try returns or raises")


def _has(live: Any, sent: Any) -> bool:
    """Whether `live` has all that was sent; the server adds defaults, and changes the version."""
    if isinstance(sent, dict):
        return isinstance(live, dict) and all(
            key == "resourceVersion" or _has(live.get(key), value) for key, value in sent.items()
        )
    if isinstance(sent, list):
        return isinstance(live, list) and len(live) == len(sent) and all(map(_has, live, sent))
    return bool(live == sent)
