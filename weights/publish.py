"""The folders on the volume, and how a file and a commit get into their place: by rename.

    <root>/<repo>/<commit>/                published: MANIFEST.json is there
    <root>/<repo>/.staging-<commit>/       verified files of a fetch that isn't finished
    <root>/<repo>/.parts-<commit>/         what has arrived of files, for the next fetch
    <root>/<repo>/.work-<commit>-<id>/     of one running fetch; swept when it is dead
    <root>/<repo>/.removed-<commit>-<id>/  no longer published; being deleted

Readers never see a half: a file is renamed into staging when it is verified, staging is renamed
to the commit when it is whole. Locks of the file system are of no use here (they lie on NFS): one
writer is the Lease's business; two of them still can't spoil anything, since each downloads into
a folder of its own and a rename replaces a file by one with the same bytes.
"""

import ctypes
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from weights import manifest
from weights.errors import NotPublished
from weights.manifest import File, Manifest

BEAT_SECONDS = 2.0
# A fetch whose heartbeat stands still for so long is dead.
DEAD_AFTER_S = 15.0
SILENT_FOR_S = 60.0  # by the times of its file
HEARTBEAT = "heartbeat"
FILES = "files"  # folder of the parts in a work folder


@dataclass(frozen=True)
class Folders:
    """Where a commit is published, staged and downloaded to."""

    root: Path
    repo: str
    commit: str
    work: Path

    @property
    def published(self) -> Path:
        """The commit's final folder."""
        return self.root / self.repo / self.commit

    @property
    def staging(self) -> Path:
        """Verified files wait here until all are there."""
        return self.root / self.repo / f".staging-{self.commit}"

    @property
    def parts(self) -> Path:
        """What ended fetches have left of unfinished files."""
        return self.root / self.repo / f".parts-{self.commit}"


def folders(root: Path, repo: str, commit: str) -> Folders:
    """The folders of a commit; nothing is made yet."""
    work = root / repo / f".work-{commit}-{uuid.uuid4().hex[:8]}"
    return Folders(root, repo, commit, work)


def make(root: Path, folder: Path) -> None:
    """Make the folders from below `root` down to `folder`, open to all, whatever the umask."""
    below = [path for path in (folder, *folder.parents) if root in path.parents]
    for path in reversed(below):
        try:
            path.mkdir(mode=0o755)
        except FileExistsError:
            continue
        path.chmod(0o755)


def missing(where: Folders) -> list[Path]:
    """Which folders a fetch would make, those within others first."""
    folders = (where.staging, *where.staging.parents)
    return [path for path in folders if where.root in path.parents and not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def beat(work: Path) -> None:
    """Say that the fetch of this work folder is alive, once more."""
    (work / HEARTBEAT).write_text(f"{socket.gethostname()} {os.getpid()} {time.monotonic_ns()}\n")


class Others:
    """The work folders of other fetches of the repository: which of them are dead?

    Dead: no such process on this host, or no new heartbeat for DEAD_AFTER_S while we looked. Its
    content counts and not its time: clocks differ, and NFS reads a file anew when it is opened.
    """

    def __init__(self, where: Folders) -> None:
        self._where = where
        self._seen: dict[Path, tuple[str, float]] = {}  # work folder -> heartbeat, since when
        self._alive: set[Path] = set()

    def sweep(self) -> list[str]:
        """Keep the parts of the dead ones, remove the rest. Returns the folders' names."""
        swept = []
        for other in self._folders():
            if self._is_dead(other):
                leave(self._where, other)
                swept.append(other.name)
        return swept

    def undecided(self) -> list[str]:
        """Folders with parts of our commit that may be those of a dead fetch: sweep() again."""
        return [
            other.name
            for other in self._folders()
            if other.name.startswith(f".work-{self._where.commit}-")
            and other not in self._alive
            and any((other / FILES).glob("*"))
        ]

    @property
    def running(self) -> bool:
        """Whether there are any, dead ones included."""
        return bool(self._folders())

    def _folders(self) -> list[Path]:
        work = self._where.work
        return [path for path in work.parent.glob(".work-*") if path != work]

    def _is_dead(self, work: Path) -> bool:
        try:
            said = (work / HEARTBEAT).read_text()
        except OSError:
            said = ""
        if _is_gone(said):
            return True
        before, since = self._seen.get(work, (None, 0.0))
        if said == before:
            return time.monotonic() - since > DEAD_AFTER_S
        if before is not None:
            self._alive.add(work)
        self._seen[work] = (said, time.monotonic())
        return False


def is_dead(work: Path, now: float) -> bool:
    """Whether a fetch is dead, for one who doesn't stay to look. `now`: of now()."""
    try:
        heartbeat = work / HEARTBEAT
        silent_s = now - heartbeat.stat().st_mtime
        return silent_s > SILENT_FOR_S or _is_gone(heartbeat.read_text())
    except FileNotFoundError:
        return work.is_dir() and now - work.stat().st_mtime > SILENT_FOR_S
    except OSError:
        return False


def _is_gone(heartbeat: str) -> bool:
    """Whether there is no such process on this host."""
    words = heartbeat.split()
    if len(words) != 3 or words[0] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # another user's process; being written
        return False
    return False


def leave(where: Folders, work: Path) -> None:
    """Remove a work folder, but keep the parts of files in it for the next fetch of its commit."""
    commit = work.name.split("-")[1]
    pool = where.root / where.repo / f".parts-{commit}"
    for left in (work / FILES).rglob("*"):
        kept = pool / left.relative_to(work / FILES)
        with suppress(OSError):  # taken by another sweep, or the volume is in trouble
            # What another fetch has published meanwhile needn't come again.
            done = (where.root / where.repo / commit / left.relative_to(work / FILES)).exists()
            if left.is_file() and not done and left.stat().st_size > _size(kept):
                make(where.root, kept.parent)
                left.replace(kept)
    shutil.rmtree(work, ignore_errors=True)


def part(where: Folders, path: str) -> Path:
    """Where the part of a file that has arrived is to be written."""
    return where.work / FILES / path


def left_bytes(where: Folders, path: str) -> int:
    """Bytes that an ended fetch has left of a file."""
    return _size(where.parts / path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def now(root: Path) -> float:
    """The volume's own time, in seconds: that which the times of its files are of."""
    with tempfile.TemporaryFile(dir=root) as probe:
        return os.fstat(probe.fileno()).st_mtime


def touch(folder: Path) -> None:
    """Note on a published commit that it is used, for `collect`; not on a read-only volume."""
    with suppress(OSError):
        os.utime(folder / manifest.NAME)


def put_aside(folder: Path, commit: str) -> Path:
    """Rename a folder, on disk, so that nobody takes it for published; returns where it is."""
    aside = folder.with_name(f".removed-{commit}-{uuid.uuid4().hex[:8]}")
    folder.rename(aside)
    _sync(aside.parent)
    return aside


def settle(downloaded: Path, folder: Path, path: str) -> None:
    """Move a verified file to its place in `folder`, readable by all; publish() syncs it.

    Raises FileNotFoundError if `folder` is gone: another fetch has published it.
    """
    downloaded.chmod(0o644)
    target = folder / path
    make(folder, target.parent)
    downloaded.replace(target)


def publish(where: Folders, target: Path, content: Manifest) -> bool:
    """Write the manifest and make the commit visible. `target` has the files, synced: staging, or
    what is published, if that was mended; an import stages in its work folder.

    Returns False if another fetch published the commit meanwhile: the caller looks at what is
    there now. Raises NotPublished for a folder that somebody made by hand.
    """
    if target != where.published and is_published(where):
        return False
    written = _write(where, content)
    try:
        written.replace(target / manifest.NAME)
        _sync(target)
        if target != where.published:
            target.rename(where.published)
            _sync(where.published.parent)
        shutil.rmtree(where.parts, ignore_errors=True)
    except OSError:
        if target != where.published and is_published(where):
            return False
        raise
    return True


def renew(where: Folders, content: Manifest) -> None:
    """Replace the manifest of a published commit."""
    try:
        make(where.root, where.work)
        _write(where, content).replace(where.published / manifest.NAME)
    finally:
        shutil.rmtree(where.work, ignore_errors=True)


def _write(where: Folders, content: Manifest) -> Path:
    written = where.work / manifest.NAME
    written.write_text(content.dump())
    written.chmod(0o644)
    _sync(written)
    return written


def is_published(where: Folders) -> bool:
    """Whether the commit's folder is there, with a manifest. Raises NotPublished if without."""
    if not where.published.exists():
        return False
    # In this order: another fetch's rename between the two brings both.
    if not (where.published / manifest.NAME).exists():
        raise NotPublished(
            f"{where.published} is there without a {manifest.NAME}: not made by this program",
            "move it away (is a server using it?), then start again",
        )
    return True


def tidy(folder: Path, files: Iterable[File]) -> None:
    """Remove from staging what the plan doesn't have, say from a fetch with other patterns."""
    # The manifest may be that of another fetch which is just about to publish: it stays.
    wanted = {folder / manifest.NAME, *(folder / file.path for file in files)}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in wanted:
            path.unlink()


def sync_volume(folder: Path) -> None:
    """Have everything written on the disk: once for all files, where an fsync each takes minutes.

    Raises OSError, also for an earlier failure to write (syncfs(2), Linux 5.8).
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
