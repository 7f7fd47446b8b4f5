"""The folders on the volume, and how a file and a commit get into their place: by rename.

    <root>/<repo>/<commit>/                published: MANIFEST.json is there
    <root>/<repo>/.staging-<commit>/       verified files of a fetch that isn't finished
    <root>/<repo>/.work-<commit>-<id>/     of one running fetch; swept when it is dead
    <root>/<repo>/.removed-<commit>-<id>/  no longer published; being deleted

Readers never see a half: a file is renamed into staging when it is verified, staging is renamed
to the commit when it is whole. Locks of the file system are of no use here (they lie on NFS): one
writer is the Lease's business; two of them still can't spoil anything, since each downloads into
a folder of its own and a rename replaces a file by one with the same bytes.
"""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from weights import manifest
from weights.errors import NotPublished
from weights.manifest import File, Manifest

# A fetch touches its heartbeat every few seconds; older than that, its process is gone.
DEAD_AFTER_S = 60.0


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


def beat(work: Path) -> None:
    """Say that the fetch of this work folder is alive."""
    (work / "heartbeat").write_text(f"{socket.gethostname()} {os.getpid()}\n")


def sweep(work: Path) -> list[str]:
    """Remove the work folders of fetches that are dead; returns their names.

    Dead: no such process on this host, or a heartbeat that is a minute older than ours (both
    times are the file system's, so clocks don't matter).
    """
    now = (work / "heartbeat").stat().st_mtime
    swept = []
    for other in work.parent.glob(".work-*"):
        if other != work and is_dead(other, now):
            shutil.rmtree(other, ignore_errors=True)
            swept.append(other.name)
    return swept


def is_dead(work: Path, now: float) -> bool:
    """Whether the fetch of this work folder is dead, as sweep() judges; `now`: of now()."""
    try:
        heartbeat = work / "heartbeat"
        if now - heartbeat.stat().st_mtime > DEAD_AFTER_S:
            return True
        host, pid = heartbeat.read_text().split()
        if host != socket.gethostname():
            return False
        os.kill(int(pid), 0)
    except FileNotFoundError:
        return work.is_dir() and now - work.stat().st_mtime > DEAD_AFTER_S
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # being written, or another user's process
        return False
    return False


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
    """Move a verified file to its place in `folder`, on disk and readable by all.

    Raises FileNotFoundError if `folder` is gone: another fetch has published it.
    """
    downloaded.chmod(0o644)
    _sync(downloaded)
    target = folder / path
    make(folder, target.parent)
    downloaded.replace(target)


def publish(where: Folders, target: Path, content: Manifest) -> bool:
    """Write the manifest and make the commit visible. `target` has the files: staging, or what
    is published, if that was mended; an import stages in its work folder.

    Returns False if another fetch published the commit meanwhile: the caller looks at what is
    there now. Raises NotPublished for a folder that somebody made by hand.
    """
    if target != where.published and is_published(where):
        return False
    written = where.work / manifest.NAME
    written.write_text(content.dump())
    written.chmod(0o644)
    _sync(written)
    try:
        for folder in {target, *((target / file.path).parent for file in content.files)}:
            _sync(folder)
        written.replace(target / manifest.NAME)
        _sync(target)
        if target != where.published:
            target.rename(where.published)
            _sync(where.published.parent)
    except OSError:
        if target != where.published and is_published(where):
            return False
        raise
    return True


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
