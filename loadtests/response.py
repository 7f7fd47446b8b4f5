"""HTTP/1.1 framing of one response, with the time at which each piece of the body came.

This is all that is done with bytes while load runs; what they mean is read after it (answer.py).
"""


class BadResponse(Exception):
    """What the server sent is not HTTP/1.1."""


class Response:
    """Fed with bytes as they arrive. `pieces`: (time, bytes of the body), framing removed.

    `first_byte`: the time of the first read, which is that of the status line.
    """

    __slots__ = (
        "_chunked",
        "_ending",
        "_left",
        "_rest",
        "done",
        "first_byte",
        "headers",
        "pieces",
        "status",
    )

    def __init__(self) -> None:
        self.first_byte: int | None = None
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[int, bytes]] = []
        self.done = False
        self._rest = b""
        self._chunked = False
        self._ending = False
        self._left: int | None = 0  # of the chunk or body; None: until the connection ends

    def feed(self, now: int, data: bytes) -> bool:
        """Takes what one read returned at time `now`. True: the response is complete.

        Raises BadResponse.
        """
        if self.status is None:
            if self.first_byte is None:
                self.first_byte = now
            data = self._head(self._rest + data)
            if self.status is None:
                return False
        if self._chunked:
            return self._chunks(now, data)
        if data:
            self.pieces.append((now, data))
        if self._left is not None:
            self._left -= len(data)
            self.done = self._left <= 0
        return self.done

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may carry another request after this response."""
        return self.done and self.headers.get("connection", "").lower() != "close"

    def _head(self, data: bytes) -> bytes:
        head, blank, body = data.partition(b"\r\n\r\n")
        if not blank:
            self._rest = data
            return b""
        lines = head.decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise BadResponse(f"starts with {lines[0][:60]!r}")
        self.status, self._rest = int(status[:3]), b""
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunked = True
        elif "content-length" in self.headers:
            length = self.headers["content-length"]
            if not length.isdecimal() or len(length) > 18:  # "²" is a digit, and no number
                raise BadResponse(f"content-length is {length[:60]!r}")
            self._left = int(length)
        else:
            self._left = None
        return body

    def _chunks(self, now: int, data: bytes) -> bool:
        if self._rest:
            data, self._rest = self._rest + data, b""
        at = 0
        while True:
            if self._left:
                piece = data[at : at + self._left]
                if piece:
                    self.pieces.append((now, piece))
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    return False
            newline = data.find(b"\n", at)
            if newline < 0:
                self._rest = data[at:]
                return False
            line = data[at:newline].strip()
            at = newline + 1
            if self._ending:  # trailers, which a blank line ends
                if not line:
                    self.done = True
                    return True
            elif line:  # a blank one ends the chunk before
                size = line.partition(b";")[0].strip()
                if not size or size.strip(b"0123456789abcdefABCDEF"):
                    raise BadResponse(f"chunk size is {line[:60]!r}")
                self._left = int(size, 16)
                self._ending = self._left == 0
