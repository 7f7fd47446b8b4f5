"""Weights for a cluster without a way out: pack a published commit into a tar, take one in.

The tar has `<repo>/<commit>/MANIFEST.json` first, then the files that it names. Its bytes are
compared with that manifest while they are copied, so a stream from stdin is read once. What the
manifest says was compared with the Hub where the commit was fetched.
"""

import errno
import hashlib
import io
import os
import select
import shutil
import stat
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from weights import manifest, plan, publish, verify
from weights.errors import (
    BadArchive,
    Damaged,
    DiskFull,
    NoSpace,
    Place,
    ReaderGone,
    Stalled,
    UnsafeName,
    UsageError,
    WeightsError,
    WrongBytes,
    volume_error,
)
from weights.events import Reporter, amount
from weights.fetch import SPARE_BYTES
from weights.manifest import File, Manifest
from weights.pace import LOOK_SECONDS
from weights.publish import Folders
from weights.resolve import check_commit, check_repo
from weights.volume import check_root, published

STDIO = "-"
CHUNK = 1024 * 1024
# A manifest of 10,000 files has 2 MB.
MANIFEST_LIMIT = 64 * 1024 * 1024
STALL_S = 120.0
AGAIN = "make it again with python -m weights pack, then start again: nothing was published"


class Readable(Protocol):
    """Bytes that come one after the other."""

    def read(self, size: int, /) -> bytes:
        """At most so many; none at the end."""


@dataclass(frozen=True)
class Entry:
    """A thing in an archive or folder. `content` is None for what is no plain file."""

    name: str
    size: int
    content: Readable | None


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    out: str
    repo: str
    commit: str
    files: int
    bytes: int
    manifest_digest: str


@dataclass(frozen=True)
class Imported:
    """What is published now. `hit`: it was there before, and nothing was read."""

    path: str
    repo: str
    commit: str
    files: int
    bytes: int
    manifest_digest: str
    hit: bool


# -- out --------------------------------------------------------------------------------------


def pack(root: Path, repo: str, commit: str, out: str, reporter: Reporter) -> Packed:
    """Write a published commit as a tar to the file `out`, or to stdout for "-".

    Raises UsageError, NotPublished, Damaged (then there is no whole tar), ReaderGone, DiskFull.
    """
    folder, found = published(root, repo, commit)
    try:
        with _written(out) as file:
            _write(file, folder, found, reporter)
    except BrokenPipeError as error:
        raise ReaderGone(
            f"nobody reads the tar of {Place(repo, commit)} any more",
            "look at what the reader says: if the commit was there already, all is well",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"{out} can't be written: {error.strerror}",
                f"make room there, or give another --out, for {amount(found.bytes)}",
            ) from error
        raise volume_error(error, folder) from error
    return Packed(out, repo, commit, len(found.files), found.bytes, found.digest)


@contextmanager
def _written(out: str) -> Iterator[BinaryIO]:
    """Where the tar goes. A file has its name only when it is whole."""
    if out == STDIO:
        if sys.stdout.isatty():
            raise UsageError("a tar is nothing for a terminal", "give --out FILE, or a pipe")
        with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as file:
            yield file
        return
    path = Path(out)
    if path.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a file in it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        file = partial.open("wb")
    except OSError as error:
        raise UsageError(
            f"--out {out}: {partial} can't be written: {error.strerror}",
            "name a file in a folder that is there and that you may write to",
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write(out: BinaryIO, folder: Path, found: Manifest, reporter: Reporter) -> None:
    place = Place(found.repo, found.commit)
    progress = _Progress(found.bytes, reporter)
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        text = found.dump().encode()
        tar.addfile(_info(found, manifest.NAME, len(text)), io.BytesIO(text))
        for file in found.files:
            path = folder / file.path
            wrong = verify.size_problem(path, file)
            if wrong is None:
                with path.open("rb") as content:
                    hashed = _Hashed(content, file, progress)
                    tar.addfile(_info(found, file.path, file.size), hashed)  # type: ignore[arg-type]
                wrong = hashed.problem()
            if wrong:
                raise Damaged(
                    f"{place.of(file.path)} {wrong}: it is damaged, and was not packed",
                    "fetch the commit again: only what is damaged is downloaded",
                    place=place.of(file.path),
                )
    progress.report()


def _info(found: Manifest, path: str, size: int) -> tarfile.TarInfo:
    """No times and no owners: packed again, the same manifest and files are the same bytes."""
    info = tarfile.TarInfo(f"{found.repo}/{found.commit}/{path}")
    info.size, info.mode = size, 0o644
    return info


# -- in ---------------------------------------------------------------------------------------


def take(source: str, root: Path, reporter: Reporter, stall_s: float = STALL_S) -> Imported:
    """Publish what `source` holds: a tar of `pack`, "-" for one on stdin, or a commit's folder.

    Raises BadArchive, UnsafeName, WrongBytes, Stalled, NoSpace, VolumeNotWritable, DiskFull, and
    WeightsError for a commit that is published with other bytes. Then nothing is published.
    """
    check_root(root)
    work = _Work(root, reporter)
    what = "the tar on stdin" if source == STDIO else source
    try:
        if source == STDIO:
            return work.take(_tar(_Patient(sys.stdin.fileno(), stall_s, lambda: None)), what)
        if Path(source).is_dir():
            return work.take(_folder(Path(source)), what)
        with _opened(source) as file:
            return work.take(_tar(file), what)
    except tarfile.TarError as error:
        raise BadArchive(f"{what} is no whole tar: {error}", AGAIN) from error
    except OSError as error:
        raise volume_error(error, root) from error
    finally:
        work.end()


def _opened(source: str) -> BinaryIO:
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}", "correct --from") from error


class _Patient:
    """stdin, with an end to the patience. `tick` is called while it waits."""

    def __init__(self, descriptor: int, stall_s: float, tick: Callable[[], None]) -> None:
        self._descriptor, self._stall_s, self._tick = descriptor, stall_s, tick

    def read(self, size: int, /) -> bytes:
        deadline = time.monotonic() + self._stall_s
        while not select.select([self._descriptor], [], [], 1.0)[0]:
            self._tick()
            if time.monotonic() > deadline:
                raise Stalled(
                    f"no byte on stdin for {self._stall_s:.0f} s",
                    "look at what should send it (kubectl exec needs -i), then start again",
                )
        return os.read(self._descriptor, size)


def _tar(file: Readable) -> Iterator[Entry]:
    """The entries of a tar, as they come. Raises TarError for what is none, or is cut."""
    with tarfile.open(fileobj=file, mode="r|") as tar:  # type: ignore[call-overload]
        for info in tar:
            if not info.isdir():
                yield Entry(info.name, info.size, tar.extractfile(info) if info.isreg() else None)


def _folder(folder: Path) -> Iterator[Entry]:
    """The files of a commit's folder, the manifest first."""
    paths = [
        Path(above) / name
        for above, folders, names in os.walk(folder)
        for name in (*names, *(one for one in folders if (Path(above) / one).is_symlink()))
    ]
    for path in sorted(paths, key=lambda path: (path != folder / manifest.NAME, path)):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        if not stat.S_ISREG(status.st_mode):
            yield Entry(name, 0, None)
            continue
        with path.open("rb") as content:
            yield Entry(name, status.st_size, content)


class _Work:
    """One import, with its work folder. Files are staged there and not in the fetch's staging
    folder: a fetch of the same commit beside it must find nothing but what it verified itself.
    """

    def __init__(self, root: Path, reporter: Reporter) -> None:
        self.root, self.reporter = root, reporter
        self.where: Folders | None = None
        self.ended = threading.Event()

    def alive(self) -> None:
        """Keep the work folder from being taken for that of a dead one."""
        assert self.where is not None
        while not self.ended.wait(publish.BEAT_SECONDS):
            with suppress(OSError):
                publish.beat(self.where.work)

    def end(self) -> None:
        """Leave nothing."""
        self.ended.set()
        if self.where:
            shutil.rmtree(self.where.work, ignore_errors=True)

    def take(self, entries: Iterator[Entry], what: str) -> Imported:
        prefix, found = _manifest(entries, what)
        place = Place(found.repo, found.commit)
        where = publish.folders(self.root, found.repo, found.commit)
        if _is_there(where, found):
            return _imported(where, found, hit=True)
        publish.make(self.root, where.work)
        self.where = where
        publish.beat(where.work)
        threading.Thread(target=self.alive, daemon=True).start()
        publish.Others(where).sweep()
        # A published folder that lacks or damaged a file is mended in place, file by file.
        mends = publish.is_published(where)
        target = where.published if mends else where.work / "commit"
        kept = _others(target, found)
        publish.make(self.root, target)
        self._check_space(found, target)
        self._copy(entries, prefix, found, target, what)
        verify.check_readable(self.root, target)
        publish.sync_volume(target)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content = replace(
            found,
            files=tuple(sorted((*found.files, *kept), key=lambda file: file.path)),
            read_bytes_per_s=round(verify.read_throughput(target, found.files)),
            published_at=now,
            verified_at=now,
            mtimes=verify.mtimes(target, found.files),
        )
        if not publish.publish(where, target, content) and not _is_there(where, found):
            raise WeightsError(
                f"{place} was published by another one meanwhile, with other files", "start again"
            )
        return _imported(where, content, hit=False)

    def _copy(
        self, entries: Iterator[Entry], prefix: str, found: Manifest, target: Path, what: str
    ) -> None:
        place = Place(found.repo, found.commit)
        wanted = {file.path: file for file in found.files}
        progress = _Progress(found.bytes, self.reporter)
        incoming = self._incoming()
        for entry in entries:
            path = _path(entry, prefix, what)
            file = wanted.pop(path, None)
            if file is None:
                twice = any(path == file.path for file in found.files)
                raise BadArchive(
                    f"{what} has {path} {'twice' if twice else 'that its manifest does not name'}",
                    AGAIN,
                    place=place.of(path),
                )
            if entry.content is None:
                raise UnsafeName(
                    f"{what} has {path} as a link or device, not as a plain file",
                    AGAIN,
                    place=place.of(path),
                )
            wrong = f"has {entry.size} bytes, its manifest says {file.size}"
            if entry.size == file.size:
                wrong = _copied(_Hashed(entry.content, file, progress), incoming) or ""
            if wrong:
                raise WrongBytes(
                    f"{place.of(path)}, from {what}, {wrong}", AGAIN, place=place.of(path)
                )
            publish.settle(incoming, target, path)
        if wanted:
            some = ", ".join(list(wanted)[:3]) + (" …" if len(wanted) > 3 else "")
            raise BadArchive(
                f"{what} ends without {len(wanted)} of the {len(found.files)} files of {place} "
                f"({some}): it was cut",
                AGAIN,
                place=place,
            )
        progress.report()

    def _incoming(self) -> Path:
        assert self.where is not None
        return self.where.work / "incoming"

    def _check_space(self, found: Manifest, target: Path) -> None:
        missing = sum(
            file.size for file in found.files if verify.size_problem(target / file.path, file)
        )
        free = shutil.disk_usage(self.root).free
        if missing + SPARE_BYTES > free:
            place = Place(found.repo, found.commit)
            raise NoSpace(
                f"{self.root} has {amount(free)} free; {place} needs {amount(missing)} more, and "
                f"{amount(SPARE_BYTES)} to spare",
                "remove commits that nothing serves (python -m weights collect), or enlarge the "
                "claim",
                place=place,
            )


def _copied(content: "_Hashed", path: Path) -> str | None:
    with path.open("wb") as out:
        while data := content.read(CHUNK):
            out.write(data)
    return content.problem()


def _manifest(entries: Iterator[Entry], what: str) -> tuple[str, Manifest]:
    """What stands before all names, and the manifest, which must come first and be sound."""
    first = next(entries, None)
    if first is None or PurePosixPath(first.name).name != manifest.NAME or not first.content:
        raise BadArchive(
            f"{what} begins with {first.name if first else 'nothing'}, not with {manifest.NAME}",
            "make it with python -m weights pack, or give the folder of a published commit",
        )
    prefix = first.name.removesuffix(manifest.NAME)
    _check_name(first.name, what)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, manifest.NAME).write_bytes(first.content.read(MANIFEST_LIMIT))
        try:
            found = manifest.read(Path(folder))
        except Damaged as error:
            reason = str(error).partition(": ")[2]
            raise BadArchive(f"{what} has no manifest that can be read: {reason}", AGAIN) from error
    assert found is not None
    if not _is_sound(found):
        raise BadArchive(f"{what} has a manifest with fields that can't be", AGAIN)
    check_repo(found.repo)
    check_commit(found.commit)
    for file in found.files:
        try:
            plan.check_name(file.path, Place(found.repo, found.commit))
        except UnsafeName as error:
            raise UnsafeName(str(error), AGAIN, place=error.place) from error
    return prefix, found


def _is_sound(found: Manifest) -> bool:
    """Whether a manifest from elsewhere has the types that ours have, and each file once."""
    plain = isinstance(found.repo, str) and isinstance(found.commit, str)
    files = all(
        isinstance(file.path, str) and isinstance(file.size, int) and file.size >= 0
        for file in found.files
    )
    return plain and files and len({file.path for file in found.files}) == len(found.files)


def _path(entry: Entry, prefix: str, what: str) -> str:
    """The entry's path below the commit. Raises UnsafeName, BadArchive."""
    _check_name(entry.name, what)
    if not entry.name.startswith(prefix):
        raise BadArchive(f"{what} has {entry.name}, which isn't below {prefix}", AGAIN)
    return entry.name.removeprefix(prefix)


def _check_name(name: str, what: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise UnsafeName(f"{what} has an entry {name!r}, which leaves its folder", AGAIN)


def _is_there(where: Folders, found: Manifest) -> bool:
    """Whether just this is published, by its sizes. Raises WeightsError if other bytes are."""
    if not publish.is_published(where):
        return False
    there = None
    with suppress(Damaged):
        there = manifest.read(where.published)
    if there is None:
        return False
    known = {file.path: file.digest for file in there.files}
    for file in found.files:
        if known.get(file.path, file.digest) != file.digest:
            raise WeightsError(
                f"{file.path} of {Place(found.repo, found.commit)} is published with other bytes "
                f"({known[file.path]}, not {file.digest}): one of the two is not this commit",
                "find out which one the Hub has; nothing was changed",
            )
    if verify.damaged(where.published, there, hashes=False):
        return False
    if {file.path for file in found.files} - set(known):
        return False
    publish.touch(where.published)
    return True


def _others(folder: Path, found: Manifest) -> list[File]:
    """Files of an earlier selection, which stay published if they are there."""
    there = None
    with suppress(Damaged):
        there = manifest.read(folder)
    paths = {file.path for file in found.files}
    return [
        file
        for file in (there.files if there else ())
        if file.path not in paths and verify.size_problem(folder / file.path, file) is None
    ]


def _imported(where: Folders, found: Manifest, *, hit: bool) -> Imported:
    return Imported(
        str(where.published),
        found.repo,
        found.commit,
        len(found.files),
        found.bytes,
        found.digest,
        hit,
    )


# -- both -------------------------------------------------------------------------------------


class _Hashed:
    """A file's content on its way; at the end problem() says whether it was that file."""

    def __init__(self, content: Readable, file: File, progress: "_Progress") -> None:
        self._content, self._file, self._progress = content, file, progress
        self._hash = (
            hashlib.sha256()
            if file.sha256
            else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        )

    def read(self, size: int, /) -> bytes:
        data = self._content.read(size)
        self._hash.update(data)
        self._progress.add(len(data))
        return data

    def problem(self) -> str | None:
        """Why it isn't that file, None if it is."""
        found = f"{'sha256' if self._file.sha256 else 'git-sha1'}:{self._hash.hexdigest()}"
        if found == self._file.digest:
            return None
        return f"has {found}, its manifest says {self._file.digest}"


class _Progress:
    """Says now and then how far it is."""

    def __init__(
        self, total: int, reporter: Reporter, alive: Callable[[], None] = lambda: None
    ) -> None:
        self._total, self._reporter, self._alive = total, reporter, alive
        self._done = 0
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        self._alive()
        if time.monotonic() - self._said > LOOK_SECONDS:
            self.report()

    def report(self) -> None:
        self._said = time.monotonic()
        rate = self._done / max(self._said - self._started, 1e-6)
        percent = 100 * self._done / self._total if self._total else 100.0
        self._reporter.progress(
            f"{amount(self._done)} of {amount(self._total)} ({percent:.0f} %), {amount(rate)}/s",
            bytes=self._done,
            total_bytes=self._total,
            percent=round(percent, 1),
            bytes_per_s=round(rate),
        )
