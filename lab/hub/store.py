"""The hub's repositories on disk: blobs by content, one JSON file a commit, refs that move.

    <root>/blobs/<sha256>
    <root>/repos/<org>/<name>/repo.json              visibility and refs
    <root>/repos/<org>/<name>/commits/<commit>.json  path -> file

The id of a commit is a sha1 over its tree, so the same files give the same commit on every lab.
"""

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Visibility = Literal["public", "private", "gated"]

# What .gitattributes sends to LFS on the real Hub; and anything from 10 MB on.
LFS_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".onnx", ".msgpack"}
LFS_SIZE = 10 * 1000 * 1000
CHUNK = 4 * 1024 * 1024


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. `oid` is git's id: of the content, or of the pointer of an LFS file.

    `xet`: it can be downloaded from Xet storage, too.
    """

    path: str
    size: int
    sha256: str
    oid: str
    lfs: bool
    pointer_size: int = 0
    xet: bool = False

    @property
    def etag(self) -> str:
        """What the Hub gives as the file's ETag: sha256 of an LFS file, else git's id."""
        return self.sha256 if self.lfs else self.oid


class NoSuchRepo(Exception):
    """There is no repository of that name."""


class NoSuchRevision(Exception):
    """The repository has no such branch, tag or commit."""


class Hub:
    """The repositories under `root`. Safe for one writer and many readers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "repos").mkdir(exist_ok=True)

    def commit(
        self,
        repo: str,
        files: Mapping[str, Path | bytes],
        ref: str = "main",
        visibility: Visibility = "public",
        *,
        xet: bool = False,
    ) -> str:
        """Make a commit of exactly these files and point `ref` at it.

        `xet`: its LFS files are in Xet storage, as most on the real Hub are.

        A Path is hard-linked, not copied, where the file system allows it: it must not change
        afterwards. Returns the 40-hex commit.
        """
        stored = [self._store(path, content, xet) for path, content in sorted(files.items())]
        tree = "".join(f"{file.path}\0{file.oid}\n" for file in stored)
        commit = hashlib.sha1(tree.encode()).hexdigest()
        folder = self._folder(repo)
        (folder / "commits").mkdir(parents=True, exist_ok=True)
        entries = {file.path: asdict(file) for file in stored}
        _write_json(folder / "commits" / f"{commit}.json", entries)
        about = self._about(repo) if (folder / "repo.json").exists() else {"refs": {}}
        about["visibility"] = visibility
        about["refs"][ref] = commit
        _write_json(folder / "repo.json", about)
        return commit

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Point the branch or tag `name` at `commit`; it needn't have been committed here."""
        about = self._about(repo)
        about["refs"][name] = commit
        _write_json(self._folder(repo) / "repo.json", about)

    def resolve(self, repo: str, revision: str) -> str:
        """The commit of a branch, tag, commit or the start of one (7 digits and more)."""
        refs = self.refs(repo)
        if revision in refs:
            return refs[revision]
        commits = self._folder(repo) / "commits"
        matches = (
            [path.stem for path in commits.glob(f"{revision}*.json")]
            if (len(revision) >= 7 and revision.isalnum())
            else []
        )
        if len(matches) != 1:
            raise NoSuchRevision(revision)
        return matches[0]

    def files(self, repo: str, commit: str) -> dict[str, StoredFile]:
        """The files of a commit by path; none if a ref points at a commit that is gone."""
        path = self._folder(repo) / "commits" / f"{commit}.json"
        try:
            return _commit(path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return {}

    def blob(self, file: StoredFile) -> Path:
        """Where the content of a file lies."""
        return self.root / "blobs" / file.sha256

    def refs(self, repo: str) -> dict[str, str]:
        """Branches and tags: name -> commit."""
        refs: dict[str, str] = self._about(repo)["refs"]
        return refs

    def visibility(self, repo: str) -> Visibility:
        """Who may read the repository."""
        visibility: Visibility = self._about(repo)["visibility"]
        return visibility

    def repos(self) -> list[str]:
        """The names of all repositories."""
        found = (self.root / "repos").glob("*/*/repo.json")
        return sorted(str(path.parent.relative_to(self.root / "repos")) for path in found)

    def _folder(self, repo: str) -> Path:
        return self.root / "repos" / repo

    def _about(self, repo: str) -> dict[str, Any]:
        path = self._folder(repo) / "repo.json"
        if ".." in repo or not path.exists():
            raise NoSuchRepo(repo)
        about: dict[str, Any] = json.loads(path.read_text())
        return about

    def _store(self, path: str, content: Path | bytes, xet: bool) -> StoredFile:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        lfs = Path(path).suffix in LFS_SUFFIXES or size >= LFS_SIZE
        sha256 = hashlib.sha256()
        git = hashlib.sha1(f"blob {size}\0".encode())
        for chunk in _chunks(content):
            sha256.update(chunk)
            if not lfs:
                git.update(chunk)
        digest = sha256.hexdigest()
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
        ).encode()
        if lfs:
            git = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer)
        blob = self.root / "blobs" / digest
        if not blob.exists():
            _place(content, blob)
        pointer_size = len(pointer) if lfs else 0
        return StoredFile(path, size, digest, git.hexdigest(), lfs, pointer_size, xet and lfs)


@functools.lru_cache(maxsize=16)
def _commit(path: Path, _: int) -> dict[str, StoredFile]:
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {name: StoredFile(**entry) for name, entry in entries.items()}


def _chunks(content: Path | bytes) -> list[bytes] | Any:
    if isinstance(content, bytes):
        return [content]
    return _read(content)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _place(content: Path | bytes, blob: Path) -> None:
    temporary = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        try:
            os.link(content, temporary)
        except OSError:  # another file system
            shutil.copyfile(content, temporary)
    temporary.replace(blob)


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    temporary.replace(path)
