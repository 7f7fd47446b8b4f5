"""Where the API server is, and who we are there: from a kubeconfig or the Pod's own account."""

import logging
import os
import re
import shlex
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml
from kubernetes.client import Configuration
from kubernetes.config import incluster_config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

from k8s.errors import ConfigError

T = TypeVar("T")
_log = logging.getLogger(__name__)

# How long a login program may take: some ask a person, in a browser.
LOGIN_S = 60.0
SILENT_S = 5.0  # then it is spoken of
_TEXTS = {"token", "tokenFile", "username", "password"} | {
    f"client-{what}{form}" for what in ("certificate", "key") for form in ("", "-data")
}
# Of what a login program says on stderr, these last lines are told.
_LAST_LINES = 3
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
    """A way into one cluster. `described` is for messages: context and file. `login`: the command
    of the login program, "" for an account that has none.
    """

    configuration: Configuration
    described: str
    login: str = ""

    @property
    def server(self) -> str:
        """The address of the API server."""
        return str(self.configuration.host)

    def authorization(self) -> str | None:
        """The present value of the Authorization header; None with client certificates.

        The library's hook renews it if it knows when it expires. It doesn't strip the newline
        that token files end with, which no HTTP header may contain. Raises ConfigError.
        """

        def key() -> Any:
            return self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")

        try:
            value = _in_time(key, self.described, self.login) if self.login else key()
        except _BROKEN as error:
            raise ConfigError(f"{self.described}: the token can't be renewed: {error}") from error
        return str(value).strip() if value else None


def load_account(context: str | None) -> Account:
    """Read KUBECONFIG (or ~/.kube/config), else the account that a Pod has.

    `context`: which context of the kubeconfig; None: its current one. Raises ConfigError with
    the files, and the contexts that there are.
    """
    named = [path for path in os.environ.get("KUBECONFIG", "").split(os.pathsep) if path]
    paths = [_path(path) for path in named or ["~/.kube/config"]]
    existing = [path for path in paths if _exists(path)]
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


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"KUBECONFIG names {text}, but there is no such user") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # in a folder that this user may not enter
        raise ConfigError(
            f"{path} can't be read: {error.strerror}. Set KUBECONFIG to a file that can."
        ) from None


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
    files = [_read(path) for path in paths]
    contexts = _named(files, "context")
    chosen = context or next(filter(None, (file.get("current-context") for file in files)), None)
    there_are = f"it has: {', '.join(contexts) or 'none'}"
    if not chosen:
        raise ConfigError(
            f"{where} has no current-context ({there_are}). Choose one with `kubectl config "
            "use-context`, or name it as `context` in the cluster's file of catalog/clusters/."
        )
    if chosen not in contexts:
        cure = (
            "Correct `context` in the cluster's file of catalog/clusters/"
            if context
            else "That is its current-context: choose another with `kubectl config use-context`"
        )
        raise ConfigError(
            f"{where} has no context {chosen!r} ({there_are}). {cure}, or set KUBECONFIG to the "
            "file that has it."
        )
    described = f"context {chosen!r} of {where}"
    configuration = Configuration()
    try:
        cluster = _part_of(contexts[chosen], "cluster", files)
        _require_server(contexts[chosen]["cluster"], cluster)
        named_user = contexts[chosen].get("user")
        user = _part_of(contexts[chosen], "user", files) if named_user else {}
        if named_user:
            _require_texts(named_user, user)
        login = _login_of(user)

        def load() -> list[str]:
            with _overheard() as said:
                merged = KubeConfigMerger(os.pathsep.join(map(str, paths))).config
                loader = KubeConfigLoader(merged, active_context=chosen, config_base_path=None)
                loader.load_and_set(configuration)
            return said

        said = _in_time(load, described, login.command) if login else load()
        if login and not configuration.api_key and not configuration.cert_file:
            raise ConfigError(
                f"{described}: the login program of user {named_user!r} failed: "
                f"{_why(said)}{login.hint}. Try it by hand: {login.command}"
            )
        _require_certificates(configuration)
        if named_user:
            _require_way_in(named_user, user, configuration)
    except _BROKEN as error:
        raise ConfigError(
            f"{described} can't be used: {_in_words(error)}. Correct that file, or set KUBECONFIG "
            "to another one."
        ) from error
    return Account(_set_up(configuration), described, login.command if login else "")


def _read(path: Path) -> dict[str, Any]:
    """A kubeconfig whose lists have the form that they must have. Raises ConfigError."""
    why = ""
    found: Any = None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        place = f" in line {at.line + 1}, column {at.column + 1}" if at else ""
        why = f"it is no YAML: {error.problem}{place}"
    except (yaml.YAMLError, UnicodeDecodeError):
        why = "it is no text"
    except OSError as error:
        why = f"it can't be read: {error.strerror}"
    else:
        if not isinstance(found, dict):
            why = "it is empty" if found is None else "it has no `contexts`, `clusters` and `users`"
        elif not isinstance(found.get("current-context"), str | None):
            why = "its `current-context` is no name"
        for part in ("context", "cluster", "user") if not why else ():
            if not _is_list_of(found.get(f"{part}s"), part):
                why = f"its `{part}s` are no list of entries with `name` and `{part}`"
    if why:
        raise ConfigError(
            f"{path} isn't a kubeconfig: {why}. Correct it, or set KUBECONFIG to the file of your "
            "cluster."
        )
    return dict(found)


def _is_list_of(entries: Any, part: str) -> bool:
    return entries is None or (
        isinstance(entries, list)
        and all(isinstance(entry, dict) for entry in entries)
        and all(isinstance(entry.get("name"), str) for entry in entries)
        and all(isinstance(entry.get(part), dict | None) for entry in entries)
    )


def _named(files: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """The entries of all files by name. Of two with one name the first counts, as for kubectl."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for entry in file.get(f"{part}s") or ():
            found.setdefault(entry["name"], entry.get(part) or {})
    return found


def _part_of(context: dict[str, Any], part: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What the context names. Raises ValueError."""
    name, there = context.get(part), _named(files, part)
    if not name or not isinstance(name, str):
        raise ValueError(f"it names no {part}")
    if name not in there:
        raise ValueError(f"there is no {part} {name!r} (but: {', '.join(there) or 'none'})")
    return there[name]


def _require_server(name: str, cluster: dict[str, Any]) -> None:
    server = cluster.get("server")
    if not server:
        raise ValueError(f"its cluster {name!r} has no server")
    wrong = f"server {server!r} of its cluster {name!r} is no address such as https://10.0.0.1:6443"
    if not re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?(/[^\s?#]*)?", str(server)):
        raise ValueError(wrong)
    try:
        port = urlsplit(server).port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"{wrong}: its port is none")


def _require_texts(name: str, user: dict[str, Any]) -> None:
    """The library fails on others in its own words, with the whole user in them."""
    if not user:
        raise ValueError(f"its user {name!r} has nothing to log in with")
    for key in _TEXTS & user.keys():
        if not isinstance(user[key], str):
            raise ValueError(f"`{key}` of its user {name!r} is no text")


def _require_way_in(name: str, user: dict[str, Any], configuration: Configuration) -> None:
    """Without credentials the library goes on as nobody, and the server's refusal says less."""
    header = str(configuration.api_key.get("BearerToken") or "").strip()
    if not (header.isascii() and header.isprintable()):
        raise ValueError(f"the token of its user {name!r} has characters that no token has")
    scheme, _, credentials = header.partition(" ")
    whole = scheme != "Basic" or (user["username"] and user["password"])
    # With http:// the library leaves a user's certificate aside.
    certificate = user.get("client-certificate") or user.get("client-certificate-data")
    if not (certificate or configuration.cert_file or (credentials and whole)):
        raise ValueError(
            f"its user {name!r} can't log in with {', '.join(map(str, user))} as it is: a user "
            "needs token, tokenFile, client-certificate and client-key, exec, or username and "
            "password, and none of them empty"
        )


def _require_certificates(configuration: Configuration) -> None:
    """Read them once now: later a wrong one looks like a server that can't be reached."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if configuration.ssl_ca_cert:
            context.load_verify_locations(configuration.ssl_ca_cert)
    except OSError as error:
        raise ValueError(f"its cluster's certificates can't be read: {_in_words(error)}") from error
    try:
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
    except OSError as error:
        raise ValueError(
            f"its user's certificate and key can't be read: {_in_words(error)}"
        ) from error


def _in_words(error: Exception) -> str:
    """What went wrong, without numbers and places in the source of libraries."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM").replace("_", " ").lower()
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What kubernetes.config logs in this thread, which is not printed: it goes on as nobody when
    a login program fails, and says why only there.
    """
    said: list[str] = []
    thread = threading.get_ident()

    def hear(record: logging.LogRecord) -> bool:
        if record.module != KubeConfigLoader.__module__.rpartition(".")[2]:
            return True
        if record.thread != thread:
            return True
        said.append(record.getMessage())
        return False

    logging.getLogger().addFilter(hear)
    try:
        yield said
    finally:
        logging.getLogger().removeFilter(hear)


def _in_time(work: Callable[[], T], described: str, login: str) -> T:
    """What `work` returns or raises. Raises ConfigError after LOGIN_S: the library waits for ever
    for a login program, and can't be told to end it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="login", daemon=True)
    thread.start()
    thread.join(SILENT_S)
    if thread.is_alive():
        left_s = LOGIN_S - SILENT_S
        _log.warning(f"{described}: waits for its login program, {left_s:.0f} s more: {login}")
        thread.join(left_s)
    if not outcome.done():
        raise ConfigError(
            f"{described}: its login program hasn't ended after {LOGIN_S:g} s. Does it wait for "
            f"you, or for a server that is away? Try it by hand: {login}"
        )
    return outcome.result()


@dataclass(frozen=True)
class _Login:
    """The login program of a user, as a command to type, and the kubeconfig's own hint."""

    command: str
    hint: str


def _login_of(user: dict[str, Any]) -> _Login | None:
    provider = user.get("auth-provider")
    provider = provider.get("name") if isinstance(provider, dict) else provider
    if provider not in (None, "oidc"):  # kubectl 1.26 and later know no other either
        raise ValueError(
            f"its user has auth-provider {provider!r}, which Kubernetes took out; use the exec "
            "plugin of your cloud"
        )
    login = user.get("exec")
    if login is None:
        return None
    if not isinstance(login, dict) or not login.get("command"):
        raise ValueError("its user's `exec` has no `command`")
    command = shlex.join([str(login["command"]), *map(str, login.get("args") or ())])
    hint = str(login.get("installHint") or "").strip()
    return _Login(command, f". {hint}" if hint else "")


def _why(said: list[str]) -> str:
    """Why a login program failed, from the library's words."""
    why = said[-1].removeprefix("exec: ") if said else "it gave neither token nor certificate"
    if why.startswith("[Errno"):
        return why.partition("] ")[2]
    if why.startswith("failed to decode"):
        return "what it printed is no ExecCredential"
    # On a terminal the program's own words go there, and the library falls over their absence.
    if "NoneType" in why:
        return "it says why above"
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    if len(lines) > 1 + _LAST_LINES:  # the first is the library's
        lines = [lines[0], "…", *lines[-_LAST_LINES:]]
    return " ".join(line if len(line) <= 300 else f"{line[:300]}…" for line in lines).rstrip(".")


def _set_up(configuration: Configuration) -> Configuration:
    configuration.retries = False  # client.py retries, within a budget and with messages
    # As kubectl does: never through a proxy to one's own machine, whatever HTTPS_PROXY says.
    if urlsplit(configuration.host).hostname in ("localhost", "127.0.0.1", "::1"):
        configuration.proxy = None
    return configuration
