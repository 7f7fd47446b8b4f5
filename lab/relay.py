"""Relays loopback ports of the machine to addresses in the sandbox's network.

`python -m lab.relay NETNS FD=HOST:PORT…`: the listening sockets come from the parent, made in the
machine's network (so that a port in use is the parent's clear error); then this process enters the
sandbox's network, where every connection that it opens from then on lives.
"""

import asyncio
import ctypes
import os
import socket
import sys

CLONE_NEWNET = 0x40000000
CHUNK = 1 << 16
CONNECT_SECONDS = 10


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1 at the port, at a free one for 0. Raises OSError."""
    listening = socket.create_server(("127.0.0.1", port), backlog=128)
    listening.setblocking(False)
    return listening


def enter_network(path: str) -> None:
    """Moves this thread into the network namespace at the path. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until end of file and hands that on, so that half-closed connections work."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
) -> None:
    """Serves one connection; a cut on one side cuts the other."""
    try:
        connecting = asyncio.open_connection(host, port, limit=CHUNK)
        back, there = await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except (OSError, TimeoutError):
        writer.transport.abort()
        return
    try:
        await asyncio.gather(copy(reader, there), copy(back, writer))
    except OSError:
        writer.transport.abort()
        there.transport.abort()
    finally:
        writer.close()
        there.close()


async def serve(targets: dict[int, tuple[str, int]]) -> None:
    """Relays each listening socket (by file descriptor) to its address, for ever."""
    servers = []
    for fd, (host, port) in targets.items():

        async def accept(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            host: str = host,
            port: int = port,
        ) -> None:
            await relay(reader, writer, host, port)

        servers.append(await asyncio.start_server(accept, sock=socket.socket(fileno=fd)))
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    """Enters the network and serves."""
    network, *pairs = sys.argv[1:]
    targets = {}
    for pair in pairs:
        fd, _, address = pair.partition("=")
        host, _, port = address.rpartition(":")
        targets[int(fd)] = (host, int(port))
    enter_network(network)
    asyncio.run(serve(targets))


if __name__ == "__main__":
    main()
