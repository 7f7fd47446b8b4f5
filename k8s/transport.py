"""Requests to the API server: credentials, timeouts, retries, streams, web sockets."""

import contextlib
import itertools
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import urllib3
import websocket
from kubernetes.client.rest import RESTClientObject
from kubernetes.stream.ws_client import websocket_proxycare

from k8s.answers import Asked, error_from, foreign, is_foreign, is_passing, status_of
from k8s.errors import ConfigError, KubernetesError, Unreachable
from k8s.kubeconfig import Account, load_account

# Whoever set insecure-skip-tls-verify in a kubeconfig knows; it comes with every request.
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

CONNECT_S = 5.0
READ_S = 20.0
# How long a request is tried again. Before the first answer of all, the address is more likely
# wrong than the server away: a user mistake, to be said at once. And where a request was tried
# for all of that, the next ones don't wait as long once more, until something answers again.
RETRY_S = 60.0
FIRST_RETRY_S = 3.0
# After so long a request that is tried for RETRY_S is spoken of, once until something answers.
SILENT_S = 5.0
_LONGEST_PAUSE_S = 5.0


_log = logging.getLogger(__name__)


@dataclass
class Request:
    """One request. `unsure`: an earlier try may have been carried out without our knowing."""

    asked: Asked
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    content_type: str = "application/json"
    unsure: bool = False


@dataclass
class _Waiting:
    """A request that has no whole answer yet, tried until the monotonic `deadline`."""

    asked: Asked
    deadline: float
    trouble: str = ""

    def __str__(self) -> str:
        server = self.asked.server
        why = self.trouble or f"{self.asked}: no whole answer yet"
        left_s = max(0.0, self.deadline - time.monotonic())
        return (
            f"the API server at {server} doesn't answer: {why.replace(f' at {server}', '')}; "
            f"trying for {left_s:.0f} s more"
        )


class Backoff:
    """Growing pauses with jitter, so that many clients don't come back at the same moment."""

    def __init__(self) -> None:
        self._pause_s = 0.1

    def sleep(self, deadline: float, at_least_s: float = 0.0) -> bool:
        """Sleep and say True; or, if that would go beyond the monotonic `deadline`, False."""
        pause_s = max(self._pause_s * random.uniform(0.5, 1.0), at_least_s)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        if time.monotonic() + pause_s >= deadline:
            return False
        time.sleep(pause_s)
        return True


class Transport:
    """The way to one API server. Thread-safe."""

    def __init__(self, context: str | None) -> None:
        self._context = context
        self._account = load_account(context)
        self._rest = RESTClientObject(self._account.configuration)
        self._reloading = threading.Lock()
        self._answered = False  # whether an API server has ever answered us
        self._told = False  # that none answers now
        self._away = False  # none has answered for RETRY_S

    @property
    def account(self) -> Account:
        """Where and who."""
        return self._account

    def call(self, request: Request, budget_s: float = RETRY_S) -> bytes:
        """The body of the answer, after retries for at most `budget_s`. A wait is logged.

        Raises Unreachable when the budget is spent, and what answers.error_from() makes of
        any other status.
        """
        waiting = _Waiting(request.asked, time.monotonic() + budget_s)
        # Who gives a request less time says himself what becomes of it.
        timer = threading.Timer(SILENT_S, lambda: self._tell(waiting))
        timer.daemon = True
        if budget_s >= RETRY_S:
            timer.start()
        try:
            return self._retried(request, budget_s, waiting)
        finally:
            timer.cancel()

    def _tell(self, waiting: "_Waiting") -> None:
        """Once until something answers; this is another thread than the request's."""
        if not self._told:
            self._told = True
            _log.warning(str(waiting))

    def _retried(self, request: Request, budget_s: float, waiting: "_Waiting") -> bytes:
        started = time.monotonic()
        backoff = Backoff()
        for tries in itertools.count(1):
            deadline = started + self._patience(budget_s)
            left = max(1.0, deadline - time.monotonic())
            try:
                answer = self._once(request, min(READ_S, left))
                return _body(answer, request.asked, left)
            except Unreachable as error:
                request.unsure |= error.sent
                waiting.trouble = str(error)
                deadline = started + self._patience(budget_s)
                if not backoff.sleep(deadline, error.retry_after_s):
                    self._away |= budget_s >= RETRY_S
                    took = "once" if tries == 1 else f"for {time.monotonic() - started:.1f} s"
                    raise Unreachable(
                        f"{error} (tried {took} as {self._account.described}). "
                        "Is the cluster up, and is this its address?"
                    ) from error
        raise AssertionError("the last try returns or raises")

    def _patience(self, budget_s: float) -> float:
        """How long a request that may be tried for `budget_s` is tried as things are."""
        present = self._answered and not self._away
        return budget_s if present else min(budget_s, FIRST_RETRY_S)

    @contextlib.contextmanager
    def stream(self, request: Request, read_s: float) -> Iterator[Iterator[bytes]]:
        """The body as it comes, in pieces; one try.

        Raises Unreachable, also from the iterator, when the connection can't be made, is cut, or
        is silent for `read_s`.
        """
        answer = self._once(request, read_s)
        try:
            yield _pieces(answer, request.asked)
        finally:
            answer.close()

    def websocket(self, request: Request, protocol: str, timeout_s: float) -> websocket.WebSocket:
        """An open web socket; `timeout_s` for the opening and, until changed, for each read."""
        for may_reload in (True, False):
            account = self._account
            try:
                return _open_websocket(account, request, protocol, timeout_s)
            except websocket.WebSocketBadStatusException as error:
                if error.status_code == 401 and may_reload:
                    self._reload(account)
                    continue
                status = status_of(error.resp_body or b"")
                raise self._refusal(error.status_code, status, {}, request.asked) from error
            except (websocket.WebSocketException, OSError) as error:
                raise Unreachable(f"{request.asked}: {error}") from error
        raise AssertionError("the second try returns or raises")

    def _once(self, request: Request, read_s: float) -> urllib3.BaseHTTPResponse:
        """One try, or two if the credentials turn out to be old; the body isn't read yet.

        Raises for a status >= 300.
        """
        for may_reload in (True, False):
            account, rest = self._account, self._rest
            answer = _send(account, rest, request, read_s)
            if answer.status == 401 and may_reload:
                answer.close()
                self._reload(account)
                continue
            if answer.status >= 300:
                status = status_of(_body(answer, request.asked, READ_S))
                self._answered |= not is_foreign(answer.status, status, request.asked)
                refusal = self._refusal(answer.status, status, answer.headers, request.asked)
                if not isinstance(refusal, Unreachable):
                    self._told = self._away = False
                raise refusal
            self._answered = True
            self._told = self._away = False
            return answer
        raise AssertionError("the second try returns or raises")

    def _refusal(
        self, code: int, status: dict[str, Any], headers: Mapping[str, str], asked: Asked
    ) -> KubernetesError:
        """The error for an answer with such a status."""
        if "kind" not in status and (location := headers.get("Location")):
            status = {"message": f"see {location}"}
        why = f"HTTP status {code}: {status.get('message') or 'no reason given'}"
        # A server that has answered before is one; a load balancer may speak for it.
        strange = not self._answered and is_foreign(code, status, asked)
        if not is_passing(code, status):
            if strange:
                return ConfigError(foreign(asked, why), code=code)
            return error_from(code, status, asked)
        details = status.get("details") or {}
        told: Any = headers.get("Retry-After") or details.get("retryAfterSeconds") or 0
        try:
            retry_after_s = float(told)
        except ValueError:  # an HTTP date; the API server sends seconds
            retry_after_s = 0.0
        return Unreachable(
            foreign(asked, why, code) if strange else f"{asked}: {why}",
            code=code,
            sent=code != 429,
            retry_after_s=retry_after_s,
        )

    def _reload(self, used: Account) -> None:
        """Read kubeconfig, token file or login program again, unless another thread just did."""
        with self._reloading:
            if self._account is used:
                account = load_account(self._context)
                self._account, self._rest = account, RESTClientObject(account.configuration)


def _send(
    account: Account, rest: RESTClientObject, request: Request, read_s: float
) -> urllib3.BaseHTTPResponse:
    headers = {"Accept": "application/json, */*", "User-Agent": "vllm-promotion-pipeline"}
    if authorization := account.authorization():
        headers["Authorization"] = authorization
    body = None
    if request.body is not None:
        headers["Content-Type"] = request.content_type
        body = json.dumps(request.body).encode()
    try:
        # The pool, not rest.request(): that one turns errors into exceptions that have lost the
        # headers (Retry-After) and the difference between "refused" and "cut".
        answer: urllib3.BaseHTTPResponse = rest.pool_manager.request(
            request.method,
            _url(account, request),
            body=body,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
            redirect=False,
            retries=False,
        )
        return answer
    except urllib3.exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) or "doesn't match" in str(error):
            raise ConfigError(
                f"{request.asked}: its certificate isn't accepted: {error}. Is {account.described} "
                "of another cluster, or older than this one?"
            ) from error
        why = str(error)
        if "WRONG_VERSION_NUMBER" in why:
            why = "the server speaks http at this port, not https as its address says"
        raise Unreachable(f"{request.asked}: {why}", sent=False) from error
    except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
        why = f"no connection ({_cause(error)})"
        raise Unreachable(f"{request.asked}: {why}", sent=False) from error
    except urllib3.exceptions.ReadTimeoutError as error:
        raise Unreachable(f"{request.asked}: no answer in {read_s:.0f} s") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unreachable(f"{request.asked}: connection cut ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """The system's own words (`Connection refused`) from under the library's."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error)


def _url(account: Account, request: Request) -> str:
    url = account.server + request.path
    return url + ("?" + urlencode(request.query) if request.query else "")


def _body(answer: urllib3.BaseHTTPResponse, asked: Asked, within_s: float) -> bytes:
    """All of the body. `within_s`: the read timeout is for each wait for bytes, which an answer
    that trickles never reaches. Raises Unreachable.
    """
    deadline = time.monotonic() + within_s
    read = []
    try:
        while piece := answer.read1(65536):
            read.append(piece)
            if time.monotonic() > deadline:
                raise Unreachable(f"{asked}: the answer has no end after {within_s:.0f} s")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unreachable(f"{asked}: connection cut ({_cause(error)})") from error
    finally:
        answer.close()  # one that was read to its end has given its connection back by now
    return b"".join(read)


def _pieces(answer: urllib3.BaseHTTPResponse, asked: Asked) -> Iterator[bytes]:
    try:
        yield from answer.stream(65536)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unreachable(f"{asked}: connection cut ({_cause(error)})") from error


def _open_websocket(
    account: Account, request: Request, protocol: str, timeout_s: float
) -> websocket.WebSocket:
    configuration = account.configuration
    tls: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    if configuration.verify_ssl:
        tls = {"cert_reqs": ssl.CERT_REQUIRED}
    for option, value in (
        ("ca_certs", configuration.ssl_ca_cert),
        ("certfile", configuration.cert_file),
        ("keyfile", configuration.key_file),
        ("server_hostname", configuration.tls_server_name),
    ):
        if value:
            tls[option] = value
    url = _url(account, request).replace("http", "ws", 1)
    options: dict[str, Any] = {"subprotocols": [protocol], "timeout": timeout_s}
    if authorization := account.authorization():
        options["header"] = [f"Authorization: {authorization}"]
    if configuration.proxy:
        options = websocket_proxycare(options, configuration, url, None)
    else:
        options["http_no_proxy"] = ["*"]
    # The library's own create_websocket() has no timeout: a half-open connection hangs for ever.
    socket = websocket.WebSocket(sslopt=tls, skip_utf8_validation=True)
    try:
        socket.connect(url, **options)  # type: ignore[no-untyped-call]
    except BaseException:
        socket.shutdown()  # type: ignore[no-untyped-call]
        raise
    return socket
