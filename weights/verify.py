"""Are the bytes those of the commit? Hashes, safetensors headers, and what reading them costs."""

import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from weights.errors import BrokenSafetensors, MissingShard, Place, Unreadable
from weights.manifest import File, Manifest
from weights.plan import INDEX, weight_map

CHUNK = 4 * 1024 * 1024
# https://github.com/huggingface/safetensors, safetensors/src/tensor.rs: MAX_HEADER_SIZE
HEADER_LIMIT = 100_000_000
# Bits of a value, ibid. A type that is not here is newer than this table: its size isn't checked.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
# Of the bytes, so much is read to learn how fast the volume is: enough for read-ahead to show,
# little beside the download.
SAMPLE_SHARE = 1 / 64
SAMPLE_BYTES_MIN = 16 * 1024 * 1024
SAMPLE_BYTES_MAX = 512 * 1024 * 1024
SAMPLE_SECONDS = 5.0


def problem(path: Path, file: File, on_bytes: Callable[[int], None] = lambda _: None) -> str | None:
    """Why the file at `path` isn't `file` of the Hub's tree; None if it is. Reads all of it."""
    wrong = size_problem(path, file)
    if wrong:
        return wrong
    found = digest(path, file, on_bytes)
    return None if found == file.digest else f"has {found}, the Hub's tree has {file.digest}"


def size_problem(path: Path, file: File) -> str | None:
    """The quick half: is a plain file of that size there?"""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    if not stat.S_ISREG(status.st_mode):
        return "is no plain file"
    if status.st_size != file.size:
        return f"has {status.st_size} bytes, the Hub's tree has {file.size}"
    return None


def digest(path: Path, file: File, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """The file's hash, of the kind that the Hub's tree has for it."""
    found = hasher(file)
    for piece in pieces(path):
        found.update(piece)
        on_bytes(len(piece))
    return f"{file.digest.partition(':')[0]}:{found.hexdigest()}"


def hasher(file: File) -> "hashlib._Hash":
    """What the file's bytes go through to become its digest."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode())


def pieces(path: Path) -> Iterator[memoryview]:
    """The file's bytes. Each piece must be used before the next one is taken."""
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            yield view[:count]


def mtimes(folder: Path, files: Iterable[File]) -> dict[str, int]:
    """path -> st_mtime_ns: a file with another one may have other bytes."""
    return {file.path: (folder / file.path).stat().st_mtime_ns for file in files}


def damaged(folder: Path, manifest: Manifest, *, hashes: bool) -> dict[str, str]:
    """What no longer matches the manifest: path -> why. With `hashes` every byte is read."""
    check = problem if hashes else size_problem
    found = {file.path: check(folder / file.path, file) for file in manifest.files}
    return {path: why for path, why in found.items() if why}


def check_header(path: Path, place: Place) -> set[str]:
    """The names of a safetensors file's tensors. Raises BrokenSafetensors.

    The header must be JSON within the file, and the tensors must cover the rest of it exactly,
    each with as many bytes as its type and shape take.
    """
    size = path.stat().st_size
    with path.open("rb") as source:
        start = source.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise _broken(place, f"its header would have {length} bytes of {size}")
        raw = source.read(length)
    try:
        header: Any = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("it is no object")
        header.pop("__metadata__", None)
        spans = sorted(_span(name, tensor) for name, tensor in header.items())
    except (ValueError, TypeError, KeyError) as error:
        raise _broken(place, f"its header can't be read: {error}") from error
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise _broken(place, f"tensor {name} begins at {begin}, not at {position}")
        position = end
    if position != size - 8 - length:
        raise _broken(place, f"tensors end at {position}, the data at {size - 8 - length}")
    return set(header)


def _span(name: str, tensor: Mapping[str, Any]) -> tuple[int, int, str]:
    begin, end = tensor["data_offsets"]
    count = 1
    for length in tensor["shape"]:
        if not isinstance(length, int) or length < 0:
            raise ValueError(f"tensor {name} has shape {tensor['shape']}")
        count *= length
    bits = BITS.get(tensor["dtype"])
    if begin > end or (bits and (end - begin) * 8 != count * bits):
        raise ValueError(
            f"tensor {name}, {tensor['dtype']} {tensor['shape']}, has {end - begin} bytes"
        )
    return begin, end, name


def _broken(place: Place, why: str) -> BrokenSafetensors:
    return BrokenSafetensors(
        f"{place} is no whole safetensors file: {why}; its bytes are those of the Hub",
        "the repository is broken: choose another revision",
        place=place,
    )


def check_tensors(folder: Path, files: Iterable[File], place: Place) -> None:
    """Every tensor that an index names must be in its shard. Raises MissingShard."""
    for index in [file.path for file in files if fnmatchcase(file.path, INDEX)]:
        by_shard: dict[str, set[str]] = {}
        for tensor, shard in weight_map(folder / index, place.of(index)).items():
            by_shard.setdefault(str(PurePosixPath(index).with_name(shard)), set()).add(tensor)
        for shard, tensors in by_shard.items():
            absent = sorted(tensors - check_header(folder / shard, place.of(shard)))
            if absent:
                raise MissingShard(
                    f"{index} of {place} says that {absent[0]} is in {shard}, which hasn't got it",
                    "the repository is broken: choose another revision",
                    place=place.of(shard),
                )


def check_readable(root: Path, folder: Path) -> None:
    """Every file and folder from below `root` down must be open to other users to read.

    Servers run as another user than the Job, and some volumes (EFS access points) decide owner
    and mode themselves. Raises Unreadable with path, mode and owner.
    """
    above = [path for path in folder.parents if root in path.parents]
    for path in (root, *above, folder, *folder.rglob("*")):
        status = path.lstat()
        needed = 0o005 if stat.S_ISDIR(status.st_mode) else 0o004
        # The volume's own folder may be open to the group alone: that is how fsGroup does it.
        shared = path == root and status.st_mode & 0o010
        if status.st_mode & needed != needed and not shared:
            raise Unreadable(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o} and owner uid "
                f"{status.st_uid}, gid {status.st_gid}: the server's user can't read it",
                "correct the volume (of an EFS access point: PosixUser and permissions 0755), "
                "then start again",
            )


def read_throughput(folder: Path, files: Iterable[File]) -> float:
    """Bytes/s of reading a sample of the files from the volume, the largest first.

    Not from memory: pages that lie in the page cache are dropped first (they must be written: call
    it after a sync).
    """
    files = sorted(files, key=lambda file: -file.size)
    share = int(SAMPLE_SHARE * sum(file.size for file in files))
    sample = min(SAMPLE_BYTES_MAX, max(SAMPLE_BYTES_MIN, share))
    count, started = 0, time.perf_counter()
    buffer = bytearray(CHUNK)
    for file in files:
        with (folder / file.path).open("rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, sample, os.POSIX_FADV_DONTNEED)
            while got := source.readinto(buffer):
                count += got
                taken = time.perf_counter() - started
                if count >= sample or taken >= SAMPLE_SECONDS:
                    return count / taken
    return count / max(time.perf_counter() - started, 1e-6)
