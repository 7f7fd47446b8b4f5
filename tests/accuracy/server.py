"""The reference server: writes tokens on a known schedule and logs when. Simulated, no engine.

    python -m tests.accuracy.server --scenario fixed --log truth.json

One thread over epoll, no parsing of JSON, answers prepared before: it must never be what limits.
Prints its port. SIGTERM ends it; then it writes the log: for each request its id and body, when it
had come, when each of its tokens was written, and how late against the schedule.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import heapq
import json
import random
import re
import resource
import select
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tests.accuracy.scenarios import MODEL, REFUSED, SCENARIOS, Part, Scenario, Script, script

SO_TIMESTAMPNS = 35
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
STALL_AFTER_S = 3.0  # from the first request
_ID = re.compile(rb"^x-request-id: *(\S+)", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)


class _Stop(Exception):
    pass


class Request:
    """One that is being answered: `times` are those at which its parts were written."""

    __slots__ = ("arrived", "at", "connection", "raw", "script", "start", "times")

    def __init__(self, connection: socket.socket, raw: bytes, arrived: int, answer: Script):
        self.connection = connection
        self.raw = raw
        self.arrived = arrived
        self.script = answer
        self.start = arrived  # of the script
        self.at = 0
        self.times: list[int] = []

    def as_json(self) -> dict[str, Any]:
        """The truth about this request; times in ns of time.perf_counter_ns."""
        head, _, body = self.raw.partition(b"\r\n\r\n")
        found = _ID.search(head)
        parts = self.script.parts[: len(self.times)]
        written = list(zip(self.times, parts, strict=True))
        return {
            "id": found[1].decode() if found else "",
            "body": body.decode("utf-8", "replace"),
            "arrived": self.arrived,
            "tokens": [[time_ns, part.tokens] for time_ns, part in written if part.tokens],
            "fault": self.script.fault,
            "whole": len(self.times) == len(self.script.parts),
            "late_ns": max((t - self.start - part.at for t, part in written), default=0),
        }


class Server:
    """Answers requests by `scenario` until it is told to stop."""

    def __init__(self, scenario: Scenario, seed: int = 1) -> None:
        self.scenario = scenario
        self.requests: list[Request] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        # What arrived in the kernel's time of day is turned into ours. The largest difference is
        # that with the least between the two readings.
        self._ahead = max(time.perf_counter_ns() - time.time_ns() for _ in range(100))
        self._epoll = select.epoll()
        self._epoll.register(self.listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, socket.socket] = {}
        self._unfinished: dict[int, bytes] = {}
        self._due: list[tuple[int, int, Request]] = []
        self._stall_at: int | None = None
        self._free_at = 0
        self._leave: collections.deque[int] = collections.deque()
        self._rng = random.Random(f"{scenario.name} {seed}")

    def run(self) -> None:
        """Serves for ever."""
        due, push, pop = self._due, heapq.heappush, heapq.heapreplace
        now_ns = time.perf_counter_ns
        listener, fds = self.listener.fileno(), [self._epoll.fileno()]
        sequence = 0
        while True:
            # select takes microseconds, epoll.poll milliseconds.
            wait = 1.0 if not due else (due[0][0] - now_ns()) / 1e9
            if wait > 0:
                select.select(fds, (), (), wait)
            for fd, _ in self._epoll.poll(0):
                if fd == listener:
                    self._accept()
                elif request := self._read(fd):
                    self.requests.append(request)
                    sequence += 1
                    push(due, (request.start, sequence, request))
            if self._stall_at and now_ns() > self._stall_at:
                self._stall_at = None
                time.sleep(self.scenario.stall_s)
            now = now_ns()
            # Not for ever: what comes meanwhile waits for this.
            for _ in range(64):
                if not due or due[0][0] > now:
                    break
                _, number, request = due[0]
                parts = request.script.parts
                part = parts[request.at]
                now = now_ns()
                request.times.append(now)
                request.at += 1
                try:
                    request.connection.send(part.data)
                    if part.close:
                        request.connection.shutdown(socket.SHUT_RDWR)
                        request.at = len(parts)
                except OSError:  # the client has gone
                    request.at = len(parts)
                if request.at < len(parts):
                    pop(due, (request.start + parts[request.at].at, number, request))
                else:
                    heapq.heappop(due)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            self._connections[connection.fileno()] = connection
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _read(self, fd: int) -> Request | None:
        connection = self._connections[fd]
        try:
            data, extra, _, _ = connection.recvmsg(1 << 20, 64)
        except BlockingIOError:
            return None
        except OSError:
            data, extra = b"", []
        if not data:
            self._epoll.unregister(fd)
            self._unfinished.pop(fd, None)
            self._connections.pop(fd).close()
            return None
        arrived = time.perf_counter_ns()
        for _, kind, value in extra:
            if kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = struct.unpack("qq", value)
                arrived = seconds * 10**9 + nanoseconds + self._ahead
        raw = self._unfinished.pop(fd, b"") + data
        head, blank, body = raw.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or (length and len(body) < int(length[1])):
            self._unfinished[fd] = raw
            return None
        path = head.split(b" ", 2)[1]
        if path in (b"/v1/completions", b"/v1/chat/completions"):
            return self._take(connection, raw, arrived, b"chat" in path)
        connection.send(_page(path, body))
        return None

    def _take(self, connection: socket.socket, raw: bytes, arrived: int, chat: bool) -> Request:
        number, usage = len(self.requests), b"continuous_usage_stats" in raw
        request = Request(connection, raw, arrived, script(self.scenario, number, chat, usage))
        if self.scenario.stall_s and not self.requests:
            self._stall_at = arrived + int(STALL_AFTER_S * 1e9)
        if queue := self.scenario.queue:
            while self._leave and self._leave[0] <= arrived:
                self._leave.popleft()
            if len(self._leave) >= queue.room:
                request.script = Script((Part(0, REFUSED),), "429")
            else:
                service = self._rng.expovariate(1e3 / queue.service_ms)
                self._free_at = max(self._free_at, arrived) + int(service * 1e9)
                self._leave.append(self._free_at)
                request.start = self._free_at
        return request


def _page(path: bytes, body: bytes) -> bytes:
    kind = b"application/json"
    if path == b"/metrics":
        kind = b"text/plain"
        names = "prefix_cache_queries_total prefix_cache_hits_total generation_tokens_total"
        text = "".join(f'vllm:{name}{{model_name="{MODEL}"}} 0\n' for name in names.split())
    elif path == b"/tokenize":
        text = json.dumps({"count": len(body.decode("utf-8", "replace").split()) - 3})
    elif path == b"/version":
        text = json.dumps({"version": "0.0.0+reference"})
    else:
        model = {"id": MODEL, "object": "model", "root": MODEL, "max_model_len": 8192}
        text = json.dumps({"object": "list", "data": [model]})
    head = b"HTTP/1.1 200 OK\r\nServer: reference-server\r\nContent-Type: %s\r\nContent-Length: %d"
    return head % (kind, len(text)) + b"\r\n\r\n" + text.encode()


def _stop(_signal: int, _frame: object) -> None:
    raise _Stop


def main() -> None:
    """Runs one server."""
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy.server", description=__doc__)
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the queue's service times")
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_TIMERSLACK, 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    signal.signal(signal.SIGTERM, _stop)
    server = Server(SCENARIOS[options.scenario], options.seed)
    gc.disable()
    print(server.port, flush=True)
    with contextlib.suppress(_Stop):
        server.run()
    cpu = time.process_time()
    with options.log.open("w") as log:
        json.dump(
            {"cpu_seconds": cpu, "requests": [request.as_json() for request in server.requests]},
            log,
        )


if __name__ == "__main__":
    main()
