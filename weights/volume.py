"""What lies on the volume: published commits, what fetches left, and what isn't this program's."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from weights import manifest, publish
from weights.errors import Damaged, NotPublished, VolumeNotWritable
from weights.manifest import COMMIT, Manifest
from weights.resolve import check_commit, check_repo

PART = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a repository's name
# publish.py has what these are.
LEFT = re.compile(r"\.(?P<kind>staging|parts|work|removed)-(?P<commit>[0-9a-f]{40})(-\w+)?")
DEPTH = 2  # organisation/name


@dataclass(frozen=True)
class Commit:
    """A published commit. `used_at`: when it was published, mended, or last found there by a
    promotion, in seconds of the volume's own clock.
    """

    folder: Path
    manifest: Manifest
    used_at: float


@dataclass(frozen=True)
class Leftover:
    """What a fetch that isn't finished, or a removal, has there.

    `kind`: staging, parts, work, removed.
    """

    folder: Path
    repo: str
    kind: str
    commit: str


@dataclass(frozen=True)
class Volume:
    """`foreign`: what this program didn't make or can't read, with the reason."""

    published: list[Commit] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    foreign: dict[Path, str] = field(default_factory=dict)


def check_root(root: Path) -> None:
    """Raise VolumeNotWritable unless the volume is there."""
    if not root.is_dir():
        raise VolumeNotWritable(f"{root} is no folder", "mount the volume, or correct --root")


def published(root: Path, repo: str, commit: str) -> tuple[Path, Manifest]:
    """The folder of a published commit, and its manifest.

    Raises UsageError, VolumeNotWritable, NotPublished, Damaged (the manifest).
    """
    check_repo(repo)
    check_commit(commit)
    check_root(root)
    folder = publish.folders(root, repo, commit).published
    found = manifest.read(folder)
    if found is None:
        raise NotPublished(
            f"{repo}@{commit} isn't published on this volume: {folder} has no {manifest.NAME}",
            f"fetch it first: python -m weights fetch --repo {repo} --commit {commit} "
            f"--root {root}; or correct --root",
        )
    return folder, found


def scan(root: Path) -> Volume:
    """Look at the volume, without reading more than manifests. Raises VolumeNotWritable."""
    check_root(root)
    volume = Volume()
    _scan(root, root, volume)
    return volume


def _scan(root: Path, folder: Path, volume: Volume) -> None:
    repo = folder.relative_to(root).as_posix()
    depth = len(folder.relative_to(root).parts)
    for path in _entries(folder, volume):
        left = LEFT.fullmatch(path.name)
        if path.is_symlink() or not path.is_dir():
            volume.foreign[path] = "is no folder"
        elif depth and COMMIT.fullmatch(path.name):
            _add(path, repo, volume)
        elif depth and left:
            volume.leftovers.append(Leftover(path, repo, left["kind"], left["commit"]))
        elif depth < DEPTH and PART.fullmatch(path.name):
            _scan(root, path, volume)
        else:
            volume.foreign[path] = "has no name of this program's folders"


def _entries(folder: Path, volume: Volume) -> Iterator[Path]:
    try:
        with os.scandir(folder) as found:
            yield from sorted(Path(entry.path) for entry in found)
    except OSError as error:
        volume.foreign[folder] = f"can't be read: {error.strerror}"


def _add(folder: Path, repo: str, volume: Volume) -> None:
    try:
        found = manifest.read(folder)
        used_at = (folder / manifest.NAME).stat().st_mtime if found else 0.0
    except Damaged as error:
        volume.foreign[folder] = str(error)
        return
    except OSError as error:
        volume.foreign[folder] = f"can't be read: {error.strerror}"
        return
    if found is None:
        volume.foreign[folder] = f"has no {manifest.NAME}"
    elif (found.repo, found.commit) != (repo, folder.name):
        volume.foreign[folder] = f"has the manifest of {found.repo}@{found.commit}"
    else:
        volume.published.append(Commit(folder, found, used_at))
