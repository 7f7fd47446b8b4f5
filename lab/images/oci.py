"""OCI image archives, as `ctr images import` reads them: layers, and an image made of layers."""

import hashlib
import io
import json
import platform
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

USER = 1000
"""Who the lab's images run as."""


@dataclass(frozen=True)
class Layer:
    """A layer's tar file; `digest` is sha256 of its bytes, which are not compressed."""

    path: Path
    digest: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Config:
    """What the image runs when a Pod says nothing else."""

    entrypoint: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    working_dir: str = "/"
    user: int = USER


def write_archive(archive: Path, reference: str, layers: Iterable[Layer], config: Config) -> None:
    """Write the OCI archive of an image, whole or not at all."""
    layers = list(layers)
    blobs: dict[str, bytes | Path] = {layer.digest: layer.path for layer in layers}
    settings = _json(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": {
                "Entrypoint": list(config.entrypoint) or None,
                "Env": [f"{key}={value}" for key, value in sorted(config.environment.items())],
                "User": str(config.user),
                "WorkingDir": config.working_dir,
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{x.digest}" for x in layers]},
        }
    )
    kind = "application/vnd.oci.image"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": _blob(blobs, settings, f"{kind}.config.v1+json"),
            "layers": [
                {
                    "mediaType": f"{kind}.layer.v1.tar",
                    "digest": f"sha256:{x.digest}",
                    "size": x.size,
                }
                for x in layers
            ],
        }
    )
    listed = _blob(blobs, manifest, f"{kind}.manifest.v1+json")
    listed["annotations"] = {"io.containerd.image.name": reference}
    index = _json({"schemaVersion": 2, "manifests": [listed]})

    archive.parent.mkdir(parents=True, exist_ok=True)
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", index)
        for digest, content in blobs.items():
            _add(tar, f"blobs/sha256/{digest}", content)
    new.rename(archive)


def _blob(blobs: dict[str, bytes | Path], content: bytes, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    blobs[digest] = content
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _add(tar: tarfile.TarFile, name: str, content: bytes | Path) -> None:
    entry = tarfile.TarInfo(name)
    if isinstance(content, bytes):
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        return
    entry.size = content.stat().st_size
    with content.open("rb") as source:
        tar.addfile(entry, source)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def write_layer(root: Path, layer: Path) -> Layer:
    """A layer with everything below the folder `root`: sorted, owned by root, at time 0."""
    layer.parent.mkdir(parents=True, exist_ok=True)
    new = layer.with_suffix(".new")
    with tarfile.open(new, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            entry = tar.gettarinfo(path, str(path.relative_to(root)))
            if entry.islnk():  # of files that are hard links here
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            entry.mode = _mode(entry)
            if entry.isreg():
                with path.open("rb") as source:
                    tar.addfile(entry, source)
            else:
                tar.addfile(entry)
    with new.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    layer.with_suffix(".sha256").write_text(digest)
    new.rename(layer)
    return Layer(layer, digest)


def _mode(entry: tarfile.TarInfo) -> int:
    """Readable by everybody, whatever the umask here; /tmp keeps its sticky bit."""
    if entry.isdir():
        return 0o1777 if entry.mode & stat.S_ISVTX else 0o755
    return 0o755 if entry.mode & stat.S_IXUSR else 0o644


def read_layer(layer: Path) -> Layer | None:
    """A layer that `write_layer` wrote before, if it is there."""
    if not layer.exists():
        return None
    return Layer(layer, layer.with_suffix(".sha256").read_text())
