"""As much of an HTTP/1.1 server as an engine needs, over asyncio streams."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

SERVER = "vllm-engine-simulator"
KEEP_ALIVE_S = 5.0  # uvicorn's
MOST_BODY = 64 << 20
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Request:
    """One request; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Reply:
    """Writes one response, whole or as a stream of chunks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.started = False

    @property
    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._reader.at_eof() or self._writer.is_closing()

    def send(self, status: int, body: bytes, content_type: str) -> None:
        """A whole response."""
        head = self._head(status, content_type) + f"content-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)

    def send_json(self, status: int, body: Any) -> None:
        """A whole response of JSON."""
        self.send(status, json.dumps(body).encode(), "application/json")

    def send_error(self, status: int, message: str, kind: str) -> None:
        """An error as vLLM words it."""
        error = {"message": message, "type": kind, "param": None, "code": status}
        self.send_json(status, {"error": error})

    def event(self, data: bytes) -> None:
        """One server-sent event; the first begins the stream."""
        if not self.started:
            head = self._head(200, "text/event-stream; charset=utf-8")
            self._writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
        frame = b"data: " + data + b"\n\n"
        self._writer.write(b"%x\r\n%s\r\n" % (len(frame), frame))

    def end(self) -> None:
        """Ends the stream."""
        self._writer.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Closes the connection in mid-stream."""
        self._writer.close()

    def _head(self, status: int, content_type: str) -> str:
        self.started = True
        return (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nserver: {SERVER}\r\n"
            f"content-type: {content_type}\r\n"
        )


Handler = Callable[[Request, Reply], Awaitable[None]]


class Server:
    """Listens and serves until closed. `handler` answers each request."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._idle: set[asyncio.StreamWriter] = set()
        self._busy: set[asyncio.StreamWriter] = set()

    async def listen(self, host: str, port: int) -> int:
        """Starts to listen; the port (useful when 0 was asked)."""
        self._server = await asyncio.start_server(self._serve, host, port, backlog=2048)
        port = self._server.sockets[0].getsockname()[1]
        return int(port)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no more requests and waits for those in flight; False: some were left."""
        assert self._server is not None, "listen() comes first"
        self._server.close()
        for writer in list(self._idle):
            writer.close()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return not self._busy

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                self._idle.add(writer)
                try:
                    request = await asyncio.wait_for(_read(reader), KEEP_ALIVE_S)
                finally:
                    self._idle.discard(writer)
                if request is None:
                    break
                self._busy.add(writer)
                try:
                    await self._handler(request, Reply(reader, writer))
                    if not writer.is_closing():
                        await writer.drain()
                finally:
                    self._busy.discard(writer)
                if (
                    request.headers.get("connection", "").lower() == "close"
                    or not self._server
                    or not self._server.is_serving()
                ):
                    break
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError, TimeoutError):
            pass  # the client went away, sent no HTTP, or was idle for long
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; None if it ended between two."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    lines = head.decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ", 2)
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    length = int(headers.get("content-length") or 0)
    if not 0 <= length <= MOST_BODY:
        raise ValueError("body too large")
    body = await reader.readexactly(length) if length else b""
    return Request(method, target.partition("?")[0], headers, body)
