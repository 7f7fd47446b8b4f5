"""A file on its way from the Hub: the part that has arrived is on the volume, and was hashed."""

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from weights.manifest import File
from weights.verify import hasher, pieces

# Written to the disk meanwhile, so that little is left to wait for at the end.
WRITE_BACK_BYTES = 64 * 1024 * 1024


class Part:
    """The file that huggingface_hub writes a download to.

    Each piece goes through the hash in a thread while the next one arrives. `kept`: bytes at its
    start that an earlier fetch had got.
    """

    def __init__(self, path: Path, file: File) -> None:
        self.path = path
        self.kept = 0
        self._file = file
        self._hash = hasher(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out = path.open("wb")
        self._written_back = 0
        self._thread: ThreadPoolExecutor | None = None
        self._hashed: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._thread.shutdown()
        self._out.close()

    @property
    def problem(self) -> str | None:
        """Why this isn't the file of the Hub's tree; None if it is."""
        self._out.flush()
        self._wait()
        size = self._out.tell()
        if size != self._file.size:
            return f"has {size} bytes, the Hub's tree has {self._file.size}"
        kind = self._file.digest.partition(":")[0]
        found = f"{kind}:{self._hash.hexdigest()}"
        return None if found == self._file.digest else f"has {found}, not {self._file.digest}"

    def continue_from(self, left: Path, copied: Callable[[int], None]) -> None:
        """Begin with what an ended fetch has left of the file. `copied` is told the bytes so far.

        A copy: who was taken for dead and wakes up goes on writing to the file it has open.
        """
        for piece in pieces(left):
            self._out.write(piece)
            self._hash.update(piece)
            self.kept += len(piece)
            copied(self.kept)

    def restart(self) -> None:
        """Throw away what has arrived."""
        self.seek(0)
        self.truncate()

    # What huggingface_hub calls.

    def tell(self) -> int:
        """Bytes so far."""
        return self._out.tell()

    def write(self, piece: bytes) -> int:
        """Append."""
        self._out.write(piece)
        if self._thread is None:
            if len(piece) == self._file.size:  # a small file: not worth a thread
                self._hash.update(piece)
                return len(piece)
            self._thread = ThreadPoolExecutor(1)
        self._wait()
        self._hashed = self._thread.submit(self._hash.update, piece)
        done = self._out.tell()
        if done - self._written_back >= WRITE_BACK_BYTES:
            # Linux begins to write dirty pages that it is asked to drop (mm/fadvise.c).
            os.posix_fadvise(self._out.fileno(), 0, done, os.POSIX_FADV_DONTNEED)
            self._written_back = done
        return len(piece)

    def seek(self, position: int) -> int:
        """To the start alone: a server that ignores Range sends the file from there."""
        if position:
            raise io.UnsupportedOperation(f"seek to {position} in a part of a download")
        return self._out.seek(0)

    def truncate(self) -> int:
        """After seek(0)."""
        self._wait()
        self._hash = hasher(self._file)
        self._written_back = self.kept = 0
        return self._out.truncate(0)

    def _wait(self) -> None:
        if self._hashed:
            self._hashed.result()
            self._hashed = None
