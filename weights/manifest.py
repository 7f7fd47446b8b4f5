"""MANIFEST.json: what a published folder holds. It is written last: with it, the folder is whole.

A file's hash is the one that the Hub's tree has for it: sha256 of an LFS or Xet file, git's id
(sha1 over "blob <size>\\0" and the content) of any other.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from weights.errors import Damaged, WeightsError

NAME = "MANIFEST.json"
FORMAT = 1
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Selection:
    """Which files of a repository are wanted: patterns as in .gitignore's simple cases, or those
    of a LoRA adapter.
    """

    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allow_pickle: bool = False
    adapter: bool = False


@dataclass(frozen=True)
class File:
    """A file of a commit, as the Hub's tree has it. One of `sha256` and `git_sha1` is set.

    `xet`: the Hub has it in Xet storage.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    xet: bool = field(default=False, compare=False)

    @property
    def digest(self) -> str:
        """The hash with its kind in front: sha256:… or git-sha1:…"""
        return f"sha256:{self.sha256}" if self.sha256 else f"git-sha1:{self.git_sha1}"


@dataclass(frozen=True)
class Manifest:
    """`read_bytes_per_s`: what reading the volume gave, cold. Times: UTC, ISO 8601; `verified_at`:
    when every byte was last compared. `mtimes`: path -> st_mtime_ns of a file when it was.
    """

    repo: str
    commit: str
    files: tuple[File, ...]
    selection: Selection
    read_bytes_per_s: float
    published_at: str
    verified_at: str
    mtimes: Mapping[str, int]
    format: int = field(default=FORMAT)

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """sha256 over repository, commit and files: equal where the same bytes are published."""
        lines = [f"{self.repo}@{self.commit}"]
        lines += sorted(f"{file.digest} {file.size} {file.path}" for file in self.files)
        return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"

    def dump(self) -> str:
        """The text of the file."""
        digests = ("sha256", "git_sha1")
        files = [
            {"path": file.path, "size": file.size}
            | {name: value for name in digests if (value := getattr(file, name)) is not None}
            for file in self.files
        ]
        document = {**asdict(self), "files": files, "bytes": self.bytes, "digest": self.digest}
        return json.dumps(document, indent=1) + "\n"


def read(folder: Path) -> Manifest | None:
    """The manifest of a published folder; None if there is none. Raises Damaged."""
    path = folder / NAME
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        document: dict[str, Any] = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, this program knows {FORMAT}")
        found = Manifest(
            repo=document["repo"],
            commit=document["commit"],
            files=tuple(File(**file) for file in document["files"]),
            selection=Selection(
                allow=tuple(document["selection"]["allow"]),
                ignore=tuple(document["selection"]["ignore"]),
                allow_pickle=document["selection"]["allow_pickle"],
                adapter=document["selection"].get("adapter", False),
            ),
            read_bytes_per_s=document["read_bytes_per_s"],
            published_at=document["published_at"],
            # Version 0.1 had neither.
            verified_at=document.get("verified_at", document["published_at"]),
            mtimes=document.get("mtimes", {}),
        )
        for moment in (found.published_at, found.verified_at):
            datetime.fromisoformat(moment)
        if found.digest != document["digest"]:
            raise ValueError("its digest doesn't fit its content")
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return found


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return Damaged(
        f"{path} can't be read as a manifest: {error}",
        f"move {path.parent} away and fetch the commit again",
    )
