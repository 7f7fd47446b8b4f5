"""A small client of the lab's API server: apply, read, wait. Standard library alone.

(The product's own client, k8s/client.py, is not for the lab to import.)
"""

import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from lab.kubernetes.sandbox import LabError

Obj = dict[str, Any]
FIELD_MANAGER = "vllm-promotion-lab"
REQUEST_SECONDS = 30.0
POLL_SECONDS = 0.1


class ApiError(LabError):
    """The API server said no; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Talks to the API server as admin, at 127.0.0.1 and the given port. Safe across threads."""

    def __init__(self, port: int, pki: Path) -> None:
        self._port = port
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._local = threading.local()
        self._paths: dict[tuple[str, str], tuple[str, bool]] = {}

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        """One request; returns the decoded answer. Raises ApiError, OSError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        for attempt in (1, 2):  # the second on a new connection: an idle one may have been closed
            connection = self._connection()
            try:
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
                text = response.read()
                break
            except (http.client.HTTPException, OSError):
                connection.close()
                del self._local.connection
                if attempt == 2:
                    raise
        if response.status >= 400:
            raise ApiError(response.status, f"{method} {path}: {_message(text)}")
        return json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def find(self, path: str) -> Obj | None:
        """GET; None for 404."""
        try:
            found: Obj = self.request("GET", path)
            return found
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def apply(self, obj: Obj, *, deadline_s: float = 120) -> Obj:
        """Server-side apply. While the kind is not there yet, or its webhook, it tries again."""
        path = f"{self.path(obj, deadline_s=deadline_s)}?fieldManager={FIELD_MANAGER}&force=true"
        end = time.monotonic() + deadline_s
        while True:
            try:
                applied: Obj = self.request("PATCH", path, obj, "application/apply-patch+yaml")
                return applied
            except ApiError as error:
                if error.status not in (404, 409, 429, 500, 503) or time.monotonic() > end:
                    raise
            time.sleep(POLL_SECONDS)

    def path(self, obj: Obj, *, deadline_s: float = 120) -> str:
        """Where an object lives. Waits for its kind to exist. Raises LabError."""
        version, kind = obj["apiVersion"], obj["kind"]
        end = time.monotonic() + deadline_s
        while (version, kind) not in self._paths:
            base = f"/api/{version}" if "/" not in version else f"/apis/{version}"
            for resource in (self.find(base) or {}).get("resources", []):
                if "/" not in resource["name"]:
                    place = (f"{base}/{{}}{resource['name']}", resource["namespaced"])
                    self._paths[version, resource["kind"]] = place
            if (version, kind) not in self._paths:
                if time.monotonic() > end:
                    raise LabError(f"the API server does not know {kind} in {version}")
                time.sleep(POLL_SECONDS)
        path, namespaced = self._paths[version, kind]
        metadata = obj["metadata"]
        inside = f"namespaces/{metadata.get('namespace', 'default')}/" if namespaced else ""
        return f"{path.format(inside)}/{metadata['name']}"

    def wait(
        self,
        what: str,
        path: str,
        ready: Callable[[Obj], bool],
        *,
        deadline_s: float,
        check: Callable[[], None] = lambda: None,
        why: Callable[[], str] = lambda: "",
    ) -> Obj:
        """Until the object at the path is there and ready. `check` may raise meanwhile; `why` tells
        more about a timeout. Raises LabError with the last state seen."""
        end = time.monotonic() + deadline_s
        state: str = "it does not exist"
        while True:
            try:
                obj = self.find(path)
                if obj is not None:
                    if ready(obj):
                        return obj
                    state = json.dumps(obj.get("status", {}).get("conditions", obj.get("status")))
            except (ApiError, OSError, http.client.HTTPException) as error:
                state = str(error)
            check()
            if time.monotonic() > end:
                more = why()
                raise LabError(
                    f"{what} was not ready after {deadline_s:.0f} s; last state: {state[:600]}"
                    + (f"\n{more}" if more else "")
                )
            time.sleep(POLL_SECONDS)

    def _connection(self) -> http.client.HTTPSConnection:
        connection: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self._port, timeout=REQUEST_SECONDS, context=self._tls
            )
            self._local.connection = connection
        return connection


def condition(obj: Obj, kind: str) -> bool:
    """Whether status.conditions has this one as True."""
    conditions = obj.get("status", {}).get("conditions") or []
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def available(deployment: Obj) -> bool:
    """Whether the Deployment (as it is now) has what it asks for."""
    status = deployment.get("status", {})
    fresh = status.get("observedGeneration") == deployment["metadata"]["generation"]
    return fresh and condition(deployment, "Available")


def load(text: str) -> list[Obj]:
    """The objects of a YAML text, Lists unpacked."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    objects: list[Obj] = []
    for document in yaml.load_all(text, Loader=loader):
        if document:
            objects += document["items"] if document["kind"] == "List" else [document]
    return objects


def explain_pods(api: Api, namespace: str) -> str:
    """What the namespace's Pods wait for: one line each that is not ready, with its log's end."""
    lines = []
    for pod in _items(api, f"/api/v1/namespaces/{namespace}/pods"):
        name, status = pod["metadata"]["name"], pod.get("status", {})
        if condition(pod, "Ready"):
            continue
        why = [c.get("message", "") for c in status.get("conditions", []) if c["status"] == "False"]
        for container in status.get("containerStatuses", []):
            for state in (container.get("state", {}), container.get("lastState", {})):
                for detail in state.values():
                    why.append(f"{container['name']}: {detail.get('reason', 'running')}")
                    why.append(detail.get("message", ""))
        lines.append(f"  Pod {name}, {status.get('phase')}: " + "; ".join(w for w in why if w))
        try:
            log = api.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}/log?tailLines=8")
            lines += ["    " + line[:300] for line in str(log).splitlines()]
        except (LabError, OSError):
            continue  # it has no log yet
    return "\n".join(lines)


def _items(api: Api, path: str) -> Iterable[Obj]:
    try:
        return list((api.find(path) or {}).get("items", []))
    except (ApiError, OSError):
        return []


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]
