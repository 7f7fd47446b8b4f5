"""Requests out and bytes back, over connections that are used again. Runs under gevent.

All of it happens in callbacks of gevent's event loop, on sockets that never block: one core takes
in 50,000 pieces of answers a second so, and waking a greenlet for each would cost half as much
again. What is done for a piece is: read it, read the clock, keep both.
"""

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent.monkey import get_original

from loadtests.answer import Exchange
from loadtests.response import BadResponse

# vLLM closes a connection that was idle for 5 s; never be the one who finds out.
IDLE_SECONDS = 1.0
# How often requests are looked for that take too long.
LOOK_SECONDS = 0.02
_plain_socket: Any = get_original("socket", "socket")  # Locust has gevent replace it
_READ, _WRITE = 1, 2
_BYTES = 65536


class Connections:
    """All connections to one address.

    `late_ns`: how late things may happen. `stood_still_ns`: for how long they would have happened
    later than that, had any been due. `on_end` is called for each exchange that has ended, one at
    a time, in a greenlet that lets the load go first.
    """

    def __init__(
        self,
        family: int,
        address: Any,
        timeout_s: float,
        late_ns: int,
        on_end: Callable[[Exchange], None],
    ) -> None:
        self.family, self.address = family, address
        self.idle: list[_Connection] = []
        self.ended: deque[Exchange] = deque()
        self.stood_still_ns = 0
        self._sent: deque[tuple[Exchange, _Connection]] = deque()
        self._timeout_s = timeout_s
        self._late_ns = late_ns
        self._on_end = on_end
        self._attendant = gevent.spawn(self._attend)
        self._looked = time.perf_counter_ns()
        self._clock = gevent.get_hub().loop.timer(LOOK_SECONDS, LOOK_SECONDS)
        self._clock.start(self._look)

    def send(self, exchange: Exchange, request: bytes) -> None:
        """Sends one request, once, whatever happens: a retry would hide a failure."""
        exchange.sent = time.perf_counter_ns()
        try:
            connection = self._idle_connection() or _Connection(self)
        except OSError as error:  # too many files are open
            exchange.failure, exchange.detail = "connect", str(error)
            exchange.end = time.perf_counter_ns()
            self.ended.append(exchange)
            return
        self._sent.append((exchange, connection))
        connection.send(exchange, request)

    def wait(self) -> None:
        """Returns when all requests have ended, and `on_end` knows."""
        while self._sent or self.ended:
            gevent.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """Closes all, also where an answer is still on its way."""
        self._clock.stop()
        self._clock.close()
        self._attendant.kill()
        for exchange, connection in self._sent:
            if exchange.end is None:
                connection.close()
        for connection in self.idle:
            connection.close()

    def _idle_connection(self) -> "_Connection | None":
        while self.idle:
            connection = self.idle.pop()
            if time.monotonic() - connection.idle_since < IDLE_SECONDS and connection.is_open():
                return connection
            connection.close()
        return None

    def _attend(self) -> None:
        while True:
            while self.ended:
                self._on_end(self.ended.popleft())
                gevent.sleep(0)
            gevent.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Sees how late it is called itself, and ends what takes too long: first sent, first."""
        before, self._looked = self._looked, time.perf_counter_ns()
        late = self._looked - before - int(LOOK_SECONDS * 1e9)
        self.stood_still_ns += max(0, late - self._late_ns)
        latest = self._looked - int(self._timeout_s * 1e9)
        while self._sent:
            exchange, connection = self._sent[0]
            if exchange.end is None:
                if exchange.sent is None or exchange.sent > latest:
                    return
                detail = f"no end within {self._timeout_s:g} s ({connection.stage})"
                connection.fail("timeout", detail)
            self._sent.popleft()


class _Connection:
    """One connection, and the exchange that it carries. `stage`: how that fails, if it fails."""

    __slots__ = (
        "_all",
        "_exchange",
        "_reader",
        "_receive",
        "_rest",
        "_socket",
        "_writer",
        "idle_since",
        "stage",
    )

    def __init__(self, connections: Connections) -> None:
        self._all = connections
        self._exchange: Exchange | None = None
        self.stage = "connect"
        self.idle_since = 0.0
        self._rest = memoryview(b"")  # of the request, to be sent
        self._socket = _plain_socket(connections.family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receive = self._socket.recv
        loop = gevent.get_hub().loop
        self._reader = loop.io(self._socket.fileno(), _READ)
        self._writer = loop.io(self._socket.fileno(), _WRITE)

    def send(self, exchange: Exchange, request: bytes) -> None:
        """Starts an exchange; it ends in `ended`."""
        self._exchange = exchange
        self._rest = memoryview(request)
        if self.stage == "connect":
            self._writer.start(self._write)
            code = self._socket.connect_ex(self._all.address)
            if code not in (0, errno.EINPROGRESS):
                self.fail("connect", os.strerror(code))
        else:
            exchange.reused, exchange.connected = True, exchange.sent
            self._write()

    def fail(self, failure: str, detail: str) -> None:
        """Ends the exchange, and the connection with it."""
        assert self._exchange is not None, "only an exchange can fail"
        self._exchange.failure, self._exchange.detail = failure, detail
        self._end(time.perf_counter_ns())

    def is_open(self) -> bool:
        """Whether the server has neither closed it nor sent what nobody asked for."""
        try:
            self._receive(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Closes it, at any time."""
        for watcher in (self._reader, self._writer):
            watcher.stop()
            watcher.close()
        self._socket.close()

    def _write(self) -> None:
        """Called when it is connected, and when it has room."""
        if self.stage == "connect":
            if code := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.fail("connect", os.strerror(code))
                return
            assert self._exchange is not None, "it was made for one"
            self._exchange.connected = time.perf_counter_ns()
            self.stage = "reset"
            self._reader.start(self._read)
        try:
            self._rest = self._rest[self._socket.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(self.stage, str(error))
            return
        if self._rest:
            self._writer.start(self._write)
        elif self._writer.active:
            self._writer.stop()

    def _read(self) -> None:
        try:
            data = self._receive(_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if self._exchange is not None:
                self.fail(self.stage, str(error))
            else:
                self._reader.stop()
            return
        now = time.perf_counter_ns()
        exchange = self._exchange
        if exchange is None:  # closed, or speaks unasked: is_open() will say so
            self._reader.stop()
            return
        try:
            if not data or exchange.response.feed(now, data):
                self._end(now)
        except BadResponse as error:
            self.fail("bad_http", str(error))

    def _end(self, now: int) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None, "only an exchange can end"
        exchange.end = now
        if exchange.failure is None and exchange.response.keeps_alive and not self._rest:
            self.idle_since = time.monotonic()
            self._all.idle.append(self)
        else:
            self.close()
        self._all.ended.append(exchange)
