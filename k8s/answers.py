"""From an answer of the API server to one of our errors: what, which object, what to do next."""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from k8s.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    KubernetesError,
    MissingKind,
    NotFound,
    Unauthorized,
)
from k8s.kinds import Kind

# User "u" cannot list resource "pods" in API group "" in the namespace "llm"
_DENIED = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"'
    r' in API group "(?P<group>[^"]*)"(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_OWNER = re.compile(r'conflict with "([^"]*)"')
# Server-side apply reports a wrong field or value as an internal error (500), though it is ours.
_WRONG_FIELD = re.compile(
    "failed to create typed patch object|unable to convert unstructured object"
)


@dataclass(frozen=True)
class Asked:
    """What was asked, for messages. `kind` is None for paths that aren't objects."""

    verb: str
    kind: Kind | None
    namespace: str | None
    name: str | None
    server: str
    account: str

    def __str__(self) -> str:
        if self.kind is None:
            return f"{self.verb} {self.name} at {self.server}"
        place = "/".join(part for part in (self.namespace, self.name) if part)
        return f"{self.verb} {self.kind.name} {place}".rstrip() + f" at {self.server}"

    @property
    def what(self) -> str:
        """The object alone: `Job llm/x`."""
        if self.kind is None:
            return str(self.name)
        return f"{self.kind.name} " + "/".join(p for p in (self.namespace, self.name) if p)


def status_of(body: bytes) -> dict[str, Any]:
    """The `Status` object in an answer; for other bodies their text as its message, no kind."""
    text = body.decode("utf-8", "replace").strip()
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    if isinstance(status, dict) and status.get("kind") == "Status":
        return status
    return {"message": " ".join(text.split())[:500]}


def is_foreign(code: int, status: dict[str, Any], asked: Asked) -> bool:
    """Whether an answer with an error status is none that an API server gives."""
    if "kind" in status or code in (401, 429):
        return False
    # Its words for a group that it doesn't know; but v1 it knows. Go's other servers say the same.
    unknown_group = code == 404 and status.get("message") == "404 page not found"
    return not (unknown_group and asked.kind and asked.kind.api_version != "v1")


def foreign(asked: Asked, said: str, code: int = 0) -> str:
    """The message for an answer that is none of an API server. `said`: what came, with `code`."""
    parts = urlsplit(asked.server)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    # Go's reverse proxy and every load balancer say so of what is behind them.
    what = (
        "a proxy or load balancer, with no API server behind it that answers"
        if code in (502, 503, 504)
        else "no Kubernetes API server"
    )
    return (
        f"what answers at {parts.scheme}://{host}:{port}{parts.path} is {what}: "
        f"to {asked.verb} {asked.what} it says {said}. Its address is from {asked.account}: "
        "correct `server` there, or choose another kubeconfig (KUBECONFIG), or another context of "
        "it (`context` in the cluster's file of catalog/clusters/)"
    )


def is_passing(code: int, status: dict[str, Any]) -> bool:
    """Whether the same request may succeed later: too many requests, server trouble."""
    if _WRONG_FIELD.search(status.get("message", "")):
        return False
    return code in (429, 500, 502, 503, 504)


def error_from(code: int, status: dict[str, Any], asked: Asked) -> KubernetesError:
    """The error for an answer with this HTTP status."""
    message = status.get("message") or f"HTTP status {code}"
    details = status.get("details") or {}
    reason = status.get("reason", "")
    if code == 401:
        return Unauthorized(
            f"{asked.server} doesn't accept the credentials of {asked.account}: {message}. "
            "Log in again or get a fresh kubeconfig or token.",
            code=code,
        )
    if code == 403:
        return _forbidden(message, asked)
    if code == 404:
        return _not_found(details, asked)
    if code == 409:
        return _conflict(message, reason, details, asked)
    if code in (400, 413, 415, 422) or _WRONG_FIELD.search(message):
        return Invalid(f"{asked}: refused: {message}", code=code)
    return KubernetesError(f"{asked}: {message} (HTTP status {code})", code=code)


def _forbidden(message: str, asked: Asked) -> Forbidden:
    denied = _DENIED.search(message)
    if not denied:
        # Quota, PodSecurity, a webhook, a namespace that is being deleted: it says so itself.
        return Forbidden(f"{asked}: an admission rule refuses it: {message}", code=403)
    resource = denied["resource"] + (f".{denied['group']}" if denied["group"] else "")
    where = f"in namespace {denied['namespace']}" if denied["namespace"] else "in the whole cluster"
    return Forbidden(
        f"{asked}: {denied['user']!r} may not {denied['verb']} {resource} {where}. "
        "Bind the Role that `python -m k8s platform --cluster NAME` prints to it, or use another "
        f"account (now: {asked.account}).",
        code=403,
    )


def _not_found(details: dict[str, Any], asked: Asked) -> KubernetesError:
    if details.get("kind") == "namespaces" and asked.kind and asked.kind.name != "Namespace":
        return NotFound(
            f"{asked}: namespace {details.get('name')!r} doesn't exist. "
            "`python -m k8s platform --cluster NAME` prints what a cluster needs once; or correct "
            "`namespace` in the cluster's file.",
            code=404,
        )
    if not details.get("name") and asked.kind:
        kind = asked.kind
        cure = f"Install {kind.needs}." if kind.needs else "Is that Kubernetes too old?"
        return MissingKind(
            f"{asked}: the cluster doesn't know {kind.name} ({kind.api_version}). {cure}", code=404
        )
    return NotFound(f"{asked}: {asked.what} doesn't exist", code=404)


def _conflict(message: str, reason: str, details: dict[str, Any], asked: Asked) -> Conflict:
    if reason == "AlreadyExists":
        return AlreadyExists(f"{asked}: it exists already")
    owners = {}
    for cause in details.get("causes") or []:
        owner = _OWNER.search(cause.get("message", ""))
        if cause.get("reason") == "FieldManagerConflict" and owner:
            owners[cause.get("field", "?")] = owner[1]
    if owners:
        listed = ", ".join(f"{field} (set by {owner!r})" for field, owner in owners.items())
        return Conflict(
            f"{asked}: someone else manages {listed}. Change it there, or give it up: "
            "`kubectl get … --show-managed-fields` shows who set what.",
            fields=owners,
        )
    return Conflict(f"{asked}: {message}")
