"""Where the API server is, and who we are there: from a kubeconfig or the Pod's own account."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubernetes.client import Configuration
from kubernetes.config import incluster_config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

from k8s.errors import ConfigError

# What kubernetes.config raises for files whose structure is wrong, beside its own exception.
_BROKEN = (
    ConfigException,
    yaml.YAMLError,
    OSError,
    TypeError,
    KeyError,
    AttributeError,
    ValueError,
)


@dataclass(frozen=True)
class Account:
    """A way into one cluster. `described` is for messages: context and file."""

    configuration: Configuration
    described: str

    @property
    def server(self) -> str:
        """The address of the API server."""
        return str(self.configuration.host)

    def authorization(self) -> str | None:
        """The present value of the Authorization header; None with client certificates.

        The library's hook renews it if it knows when it expires. It doesn't strip the newline
        that token files end with, which no HTTP header may contain.
        """
        try:
            value = self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        except _BROKEN as error:
            raise ConfigError(f"{self.described}: the token can't be renewed: {error}") from error
        return value.strip() if value else None


def load_account(context: str | None) -> Account:
    """Read KUBECONFIG (or ~/.kube/config), else the account that a Pod has.

    `context`: which context of the kubeconfig; None: its current one. Raises ConfigError with
    the files, and the contexts that there are.
    """
    named = [path for path in os.environ.get("KUBECONFIG", "").split(os.pathsep) if path]
    paths = [Path(path).expanduser() for path in named] or [Path.home() / ".kube" / "config"]
    existing = [path for path in paths if path.exists()]
    if existing:
        return _from_kubeconfig(existing, context)
    if not named and context is None and os.environ.get(incluster_config.SERVICE_HOST_ENV_NAME):
        return _from_pod()
    where = ", ".join(map(str, paths))
    raise ConfigError(
        (
            f"KUBECONFIG names {where}, which doesn't exist. "
            if named
            else f"no kubeconfig: {where} "
            "doesn't exist, KUBECONFIG isn't set, and this isn't a Pod with an account of its own. "
        )
        + "Set KUBECONFIG to the file of your cluster, or start a lab with `make lab` and use "
        "the file that it prints."
    )


def _from_pod() -> Account:
    described = f"the Pod's own account ({incluster_config.SERVICE_TOKEN_FILENAME})"
    configuration = Configuration()
    try:
        incluster_config.load_incluster_config(client_configuration=configuration)
    except _BROKEN as error:
        raise ConfigError(
            f"{described}: {error}. Give the Pod a ServiceAccount with its token mounted, "
            "or set KUBECONFIG."
        ) from error
    return Account(_set_up(configuration), described)


def _from_kubeconfig(paths: list[Path], context: str | None) -> Account:
    where = ", ".join(map(str, paths))
    try:
        merged = KubeConfigMerger(os.pathsep.join(map(str, paths))).config
        contexts = [entry["name"] for entry in merged["contexts"].value]
        chosen = context or merged.safe_get("current-context")
    except _BROKEN as error:
        raise ConfigError(f"{where} isn't a kubeconfig: {error}") from error
    there_are = f"it has: {', '.join(contexts) or 'none'}"
    if not chosen:
        raise ConfigError(
            f"{where} has no current-context ({there_are}). Choose one with `kubectl config "
            "use-context`, or name it as `context` in the cluster's file of catalog/clusters/."
        )
    if chosen not in contexts:
        raise ConfigError(
            f"{where} has no context {chosen!r} ({there_are}). Correct `context` in the cluster's "
            "file of catalog/clusters/, or set KUBECONFIG to the file that has it."
        )
    described = f"context {chosen!r} of {where}"
    configuration = Configuration()
    try:
        loader = KubeConfigLoader(merged, active_context=chosen, config_base_path=None)
        loader.load_and_set(configuration)
        cluster = merged["clusters"].get_with_name(loader.current_context["context"]["cluster"])
        if not cluster["cluster"]["server"]:
            raise ValueError("the cluster has no server")
        _require_certificates(configuration)
        _require_login(merged, loader.current_context["context"].get("user"), configuration)
    except _BROKEN as error:
        raise ConfigError(f"{described} can't be used: {error}") from error
    return Account(_set_up(configuration), described)


def _require_certificates(configuration: Configuration) -> None:
    """Read them once now: later a wrong one looks like a server that can't be reached."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if configuration.ssl_ca_cert:
            context.load_verify_locations(configuration.ssl_ca_cert)
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
    except OSError as error:
        raise ValueError(f"its certificates or keys can't be read: {error}") from error


def _require_login(merged: Any, user: str | None, configuration: Configuration) -> None:
    """The library only logs that a login program failed, and goes on as nobody."""
    entry = (
        merged["users"].get_with_name(user, safe=True) if user and len(merged["users"]) else None
    )
    if not entry or not entry.value.get("user"):
        return
    if "exec" in entry["user"] and not configuration.api_key and not configuration.cert_file:
        command = entry["user"]["exec"]["command"]
        raise ValueError(f"the login program of user {user!r} failed; try it by hand: {command}")


def _set_up(configuration: Configuration) -> Configuration:
    configuration.retries = False  # client.py retries, within a budget and with messages
    # As kubectl does: never through a proxy to one's own machine, whatever HTTPS_PROXY says.
    if urlsplit(configuration.host).hostname in ("localhost", "127.0.0.1", "::1"):
        configuration.proxy = None
    return configuration
