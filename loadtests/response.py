"""HTTP/1.1 framing of one response, with the time at which each piece of the body came.

While load runs, bytes and times are only kept, and the framing is looked at only where the
response may have ended. What the bytes mean is read after the load (answer.py).
"""

from array import array

# A read as short as this may bring the rest of an end that was split.
_SHORT = 8


class BadResponse(Exception):
    """What the server sent is not HTTP/1.1."""


class Response:
    """Fed with bytes as they arrive.

    `status` is None until the head is there. `done`: the response was seen to be complete.
    """

    __slots__ = (
        "_at",
        "_chunked",
        "_ending",
        "_ends",
        "_left",
        "_raw",
        "_spans",
        "_times",
        "done",
        "headers",
        "status",
    )

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.done = False
        self._raw = bytearray()
        self._times = array("q")  # of each read, and where in _raw it ended
        self._ends = array("q")
        self._spans = array("q")  # where in _raw each chunk's data begins and ends, by turns
        self._at = 0  # where in _raw the body or the next line of its framing begins
        self._chunked = False
        self._ending = False
        self._left: int | None = 0  # length of the body; None: until the connection ends

    def feed(self, now: int, data: bytes) -> bool:
        """Takes what one read returned at time `now`. True: the response is complete.

        Raises BadResponse.
        """
        self._times.append(now)
        self._raw += data
        self._ends.append(len(self._raw))
        # The blank line after the last chunk ends the read that brings it.
        if self._chunked and data[-4:] != b"\r\n\r\n" and len(data) > _SHORT:
            return False
        return self._look()

    @property
    def first_byte(self) -> int | None:
        """The time of the first read, which is that of the status line."""
        return self._times[0] if self._times else None

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may carry another request after this response."""
        return self.done and self.headers.get("connection", "").lower() != "close"

    @property
    def pieces(self) -> list[tuple[int, bytes]]:
        """(time, bytes of the body), framing removed. Raises BadResponse."""
        self._look()
        if self.status is None:
            return []
        spans = list(self._spans)
        if not self._chunked:
            spans = [self._at, len(self._raw)]
        elif (begin := self._open_chunk()) is not None:
            spans += [begin, len(self._raw)]
        pieces, read = [], 0
        for begin, end in zip(spans[::2], spans[1::2], strict=True):
            while begin < end:
                while self._ends[read] <= begin:
                    read += 1
                stop = min(end, self._ends[read])
                pieces.append((self._times[read], bytes(self._raw[begin:stop])))
                begin = stop
        return pieces

    def _look(self) -> bool:
        """Whether all has come."""
        if self.status is None and not self._head():
            return False
        if self.done:
            return True
        if self._chunked:
            self._chunks()
        elif self._left is not None:
            self.done = len(self._raw) - self._at >= self._left
        return self.done

    def _head(self) -> bool:
        blank = self._raw.find(b"\r\n\r\n")
        if blank < 0:
            return False
        lines = self._raw[:blank].decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise BadResponse(f"starts with {lines[0][:60]!r}")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        length = self.headers.get("content-length")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunked = True
        elif length is None:
            self._left = None
        elif length.isdecimal() and len(length) <= 18:  # "²" is a digit, and no number
            self._left = int(length)
        else:
            raise BadResponse(f"content-length is {length[:60]!r}")
        self.status, self._at = int(status[:3]), blank + 4
        return True

    def _chunks(self) -> None:
        """Goes on over the chunks that are there as a whole."""
        while (newline := self._raw.find(b"\n", self._at)) >= 0:
            line = self._raw[self._at : newline].strip()
            if self._ending:  # trailers, which a blank line ends
                if not line:
                    self.done = True
                    return
            elif line:  # a blank one ends the chunk before
                size, begin = _size(line), newline + 1
                if begin + size > len(self._raw):
                    return
                self._ending = size == 0
                self._spans.extend((begin, begin + size))
                newline += size
            self._at = newline + 1

    def _open_chunk(self) -> int | None:
        """Where the data of a chunk begins whose end has not come."""
        newline = self._raw.find(b"\n", self._at)
        return None if self.done or self._ending or newline < 0 else newline + 1


def _size(line: bytearray) -> int:
    size = line.partition(b";")[0].strip()
    if not size or size.strip(b"0123456789abcdefABCDEF"):
        raise BadResponse(f"chunk size is {bytes(line[:60])!r}")
    return int(size, 16)
