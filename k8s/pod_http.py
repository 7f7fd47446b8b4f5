"""HTTP to a Pod through the API server's port-forward.

It works from a laptop and through NetworkPolicies, and keeps the Authorization header, which the
API server's proxy subresource drops.
"""

import http.client
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from k8s.client import Client


@contextmanager
def pod_connection(
    client: Client, pod: str, port: int, *, timeout_s: float, namespace: str | None = None
) -> Iterator[http.client.HTTPConnection]:
    """An HTTP connection to the port of the Pod. Raises PodUnreachable, also inside the block."""
    raise NotImplementedError
    yield


def get_text(
    client: Client,
    pod: str,
    port: int,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    namespace: str | None = None,
) -> str:
    """GET; the body as text. Raises PodUnreachable, HttpStatus for a status of 300 or more."""
    raise NotImplementedError


def get_json(
    client: Client,
    pod: str,
    port: int,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    namespace: str | None = None,
) -> Any:
    """GET; the body as JSON."""
    raise NotImplementedError


def post_json(
    client: Client,
    pod: str,
    port: int,
    path: str,
    body: Any,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    namespace: str | None = None,
) -> Any:
    """POST JSON; the answer as JSON."""
    raise NotImplementedError
