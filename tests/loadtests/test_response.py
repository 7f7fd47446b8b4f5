"""HTTP framing, however the bytes are split."""

import pytest

from loadtests.response import BadResponse, Response
from tests.loadtests.servers import chunked

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def body(response: Response) -> bytes:
    return b"".join(piece for _, piece in response.pieces)


def feed(data: bytes, size: int) -> tuple[Response, int | None]:
    """The response, and the offset at which it was complete."""
    response = Response()
    for at in range(0, len(data), size):
        if response.feed(at, data[at : at + size]):
            return response, at + size
    return response, None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_chunks_split_anywhere(size: int) -> None:
    data = CHUNKED + chunked(b"data: a\r\n\r\n") + chunked(b"0\r\n\r\n") + b"0\r\n\r\n"
    response, end = feed(data, size)
    assert body(response) == b"data: a\r\n\r\n0\r\n\r\n"
    assert end is not None
    assert end >= len(data) > end - size
    assert response.keeps_alive


def test_each_piece_has_the_time_of_its_read() -> None:
    response = Response()
    response.feed(10, CHUNKED)
    response.feed(20, chunked(b"first"))
    response.feed(30, chunked(b"second")[:5])
    response.feed(40, chunked(b"second")[5:])
    assert response.pieces == [(20, b"first"), (30, b"se"), (40, b"cond")]


def test_first_byte_is_that_of_the_head() -> None:
    response = Response()
    assert response.first_byte is None
    response.feed(10, CHUNKED[:3])
    response.feed(20, CHUNKED[3:])
    response.feed(30, chunked(b"body"))
    assert response.first_byte == 10


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_content_length(size: int) -> None:
    response, end = feed(b"HTTP/1.1 503 Oops\r\ncontent-length: 4\r\n\r\nbusy", size)
    assert (response.status, body(response)) == (503, b"busy")
    assert end is not None


def test_empty_body_is_complete_at_once() -> None:
    response, end = feed(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 1000)
    assert end is not None
    assert response.pieces == []


def test_without_length_the_connection_ends_it() -> None:
    response, end = feed(HEAD + b"\r\ndata: x\n\n", 4)
    assert end is None
    assert body(response) == b"data: x\n\n"


def test_trailers_and_extensions() -> None:
    data = CHUNKED + b"3;name=x\r\nabc\r\n0\r\nExpires: never\r\n\r\n"
    response, end = feed(data, 1)
    assert body(response) == b"abc"
    assert end == len(data)


def test_close_is_heeded() -> None:
    response, _ = feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 0\r\n\r\n", 99)
    assert response.done
    assert not response.keeps_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        CHUNKED + b"xyz\r\n",
        CHUNKED + b"-4\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
    ],
)
def test_no_http_is_said_so(data: bytes) -> None:
    with pytest.raises(BadResponse):
        feed(data, 1000)
