"""A client that never stops asking: it counts what its users would have seen.

`python -m lab.client URL MODEL [--rate 5]` sends small chat completions at a steady rate whatever
the server does, every other one on a connection of its own, the rest on connections that are kept
alive. It prints one JSON object a second and, on SIGTERM, SIGINT or at --seconds, a summary.
With `--stream N` it asks for one streamed answer of N tokens instead, and says how that arrived.
Needs nothing but Python: it runs in a Pod (client_pod.py).

A request is a failure if it gets no connection, no answer in time, a status other than 200, or an
answer without text. One on a kept-alive connection that the server had closed meanwhile, before
the first byte of an answer, is sent once more on a new one, as HTTP clients do (RFC 9112, 9.3.1);
these are counted as `resent`.
"""

import argparse
import http.client
import json
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

WORKERS = 64
QUESTION = "What is the capital of France?"


class Failure(Exception):
    """A request that a user would call failed; `kind` is a short name to count by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class _Closed(Exception):
    """A kept-alive connection was closed before it answered anything."""


class Tally:
    """What happened so far, and in the last second. Safe across threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.requests = 0
        self.resent = 0
        self.failures: Counter[str] = Counter()
        self.revisions: Counter[str] = Counter()
        self.first_failure: str | None = None
        self._last: tuple[int, Counter[str], Counter[str]] = (0, Counter(), Counter())

    def answered(self, revision: str) -> None:
        with self._lock:
            self.requests += 1
            self.revisions[revision] += 1

    def failed(self, failure: Failure) -> None:
        with self._lock:
            self.requests += 1
            self.failures[failure.kind] += 1
            stamp = time.strftime("%H:%M:%S", time.gmtime())
            self.first_failure = self.first_failure or f"{stamp} {failure}"

    def was_resent(self) -> None:
        with self._lock:
            self.resent += 1

    def second(self) -> dict[str, Any]:
        """What came to an end since the last call."""
        with self._lock:
            requests, failures, revisions = self._last
            self._last = (self.requests, self.failures.copy(), self.revisions.copy())
            return {
                "event": "second",
                "requests": self.requests - requests,
                "failures": dict(self.failures - failures),
                "revisions": dict(self.revisions - revisions),
            }

    def summary(self) -> dict[str, Any]:
        """Everything: `revisions` counts answers by the commit of the engine that gave them."""
        with self._lock:
            return {
                "event": "summary",
                "requests": self.requests,
                "failures": sum(self.failures.values()),
                "failures_by_kind": dict(self.failures),
                "first_failure": self.first_failure,
                "revisions": dict(self.revisions),
                "resent": self.resent,
                "seconds": round(time.monotonic() - self._began, 1),
            }


class Client:
    """Asks one server for chat completions of at most `max_tokens`."""

    def __init__(
        self, url: str, model: str, timeout_s: float, tally: Tally, max_tokens: int = 8
    ) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 80
        self._timeout_s = timeout_s
        self._tally = tally
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        self._question = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        self._body = json.dumps(self._question)

    def ask(self, keep: bool) -> None:
        """One request, on a kept-alive connection or on its own, and its place in the tally."""
        try:
            self._tally.answered(self._kept() if keep else self._fresh())
        except Failure as failure:
            self._tally.failed(failure)
        except Exception as error:  # the tally must account for every request
            self._tally.failed(Failure("client", repr(error)))

    def stream(self) -> dict[str, Any]:
        """One streamed answer of exactly max_tokens, and when (Unix time) it began and ended.

        `whole` if all its tokens and the end of the stream arrived; else `failure` says what
        was missing.
        """
        question = self._question | {
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        told: dict[str, Any] = {"event": "stream", "began": time.time(), "tokens": 0}
        connection = self._connect()
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(question), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Failure(f"status {response.status}", response.read(200).decode())
            last = b""
            for line in response:  # a cut just ends it
                last = line.strip() or last
                if last.startswith(b"data: {") and line.strip():
                    usage = json.loads(last[6:]).get("usage") or {}
                    told["tokens"] = usage.get("completion_tokens", told["tokens"])
            if last != b"data: [DONE]" or told["tokens"] != question["max_tokens"]:
                raise Failure("incomplete", last[:200].decode(errors="replace"))
        except (Failure, OSError, http.client.HTTPException, ValueError) as error:
            told["failure"] = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return told | {"ended": time.time(), "whole": "failure" not in told}

    def _fresh(self) -> str:
        connection = self._connect()
        try:
            return self._exchange(connection)
        finally:
            connection.close()

    def _kept(self) -> str:
        connection = self._idle_connection()
        if connection is None:
            connection = self._connect()
        else:
            try:
                self._send(connection)
                return self._rest(connection)
            except _Closed:
                connection.close()
                self._tally.was_resent()
                connection = self._connect()
        return self._rest(connection, send=True)

    def _rest(self, connection: http.client.HTTPConnection, *, send: bool = False) -> str:
        try:
            revision = self._exchange(connection, send=send)
        except BaseException:
            connection.close()
            raise
        if connection.sock is None:  # the server asked to close
            connection.close()
        else:
            self._idle.put(connection)
        return revision

    def _idle_connection(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                return None
            # Readable while nothing was asked: the server has closed it.
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.connect()
        except TimeoutError as error:
            raise Failure("connect timeout") from error
        except OSError as error:
            raise Failure("connect", str(error)) from error
        return connection

    def _send(self, connection: http.client.HTTPConnection) -> None:
        """Sends the question; raises _Closed if the connection turns out to be closed."""
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", "/v1/chat/completions", self._body, headers)
            assert connection.sock is not None
            if not select.select([connection.sock], [], [], self._timeout_s)[0]:
                raise Failure("timeout")
            if not connection.sock.recv(1, socket.MSG_PEEK):
                raise _Closed
        except (ConnectionError, http.client.HTTPException) as error:
            raise _Closed from error

    def _exchange(self, connection: http.client.HTTPConnection, *, send: bool = True) -> str:
        """Asks, and finds out on the same connection which weights the engine there serves."""
        try:
            if send:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", self._body, headers)
            answer = self._read(connection)
            choice = answer["choices"][0]["message"]
            if not choice.get("content"):
                raise Failure("no text", json.dumps(answer)[:200])
        except TimeoutError as error:
            raise Failure("timeout") from error
        except (OSError, http.client.HTTPException) as error:
            raise Failure("cut", repr(error)) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failure("malformed", repr(error)) from error
        return self._revision(connection)

    def _revision(self, connection: http.client.HTTPConnection) -> str:
        """The commit that the engine at the other end serves. The user has the answer already."""
        if connection.sock is None:
            return "unknown"
        try:
            connection.request("GET", "/v1/models")
            root = str(self._read(connection)["data"][0]["root"])
        except (OSError, http.client.HTTPException):
            connection.close()
            return "unknown"
        return root.rstrip("/").rpartition("/")[2]

    def _read(self, connection: http.client.HTTPConnection) -> dict[str, Any]:
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise Failure(f"status {response.status}", body[:200].decode(errors="replace"))
        decoded: dict[str, Any] = json.loads(body)
        return decoded


def run(client: Client, rate: float, stop: threading.Event) -> None:
    """Sends `rate` requests a second until told to stop, then waits for the answers under way."""
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        number = 0
        while not stop.wait(max(0.0, began + number / rate - time.monotonic())):
            pool.submit(client.ask, number % 2 == 0)
            number += 1


def report(tally: Tally, stop: threading.Event) -> None:
    """Prints what happened, each second."""
    while not stop.wait(1.0):
        print(json.dumps(tally.second()), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no request failed."""
    parser = argparse.ArgumentParser(prog="python -m lab.client", description=__doc__)
    parser.add_argument("url", help="of the service, e.g. http://smollm2-135m.llm.svc:8000")
    parser.add_argument("model", help="the served model name")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one answer")
    parser.add_argument("--seconds", type=float, help="how long; without it until SIGTERM")
    parser.add_argument("--max-tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--stream", type=int, metavar="N", help="one streamed answer of N tokens")
    options = parser.parse_args(argv)
    tally = Tally()
    if options.stream:
        told = Client(options.url, options.model, options.timeout, tally, options.stream).stream()
        print(json.dumps(told), flush=True)
        return 0 if told["whole"] else 1
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    client = Client(options.url, options.model, options.timeout, tally, options.max_tokens)
    threading.Thread(target=report, args=(tally, stop), daemon=True).start()
    if options.seconds is not None:
        timer = threading.Timer(options.seconds, stop.set)
        timer.daemon = True
        timer.start()
    run(client, options.rate, stop)
    summary = tally.summary()
    print(json.dumps(summary), flush=True)
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
