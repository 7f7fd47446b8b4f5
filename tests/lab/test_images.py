"""The lab's images: the same content is the same digest, and what is in one works alone."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lab import images, programs
from lab.images import oci, toolchain
from lab.images.rootfs import RootFs
from lab.programs.errors import SetupError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree(root: Path, names: list[str], mtime: int) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (mtime, mtime))
    (root / "bin" / "tool").chmod(0o755)
    (root / "link").symlink_to("bin/tool")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)


def test_a_layer_depends_on_content_alone(tmp_path: Path) -> None:
    names = ["bin/tool", "etc/passwd", "lib/b", "lib/a"]
    make_tree(tmp_path / "one", names, mtime=1_000_000_000)
    before = os.umask(0o077)
    make_tree(tmp_path / "two", names[::-1], mtime=1_700_000_000)
    os.umask(before)
    one = oci.write_layer(tmp_path / "one", tmp_path / "layers" / "one.tar")
    two = oci.write_layer(tmp_path / "two", tmp_path / "layers" / "two.tar")
    assert one.digest == two.digest == hashlib.sha256(one.path.read_bytes()).hexdigest()
    assert oci.read_layer(one.path) == one
    assert oci.read_layer(tmp_path / "layers" / "three.tar") is None

    with tarfile.open(one.path) as tar:
        entries = {entry.name: entry for entry in tar}
    assert {entry.mtime for entry in entries.values()} == {0}
    assert {entry.uid for entry in entries.values()} == {0}
    modes = {name: oct(entry.mode) for name, entry in entries.items() if not entry.issym()}
    assert modes == {
        "bin": "0o755",
        "bin/tool": "0o755",
        "etc": "0o755",
        "etc/passwd": "0o644",
        "lib": "0o755",
        "lib/a": "0o644",
        "lib/b": "0o644",
        "tmp": "0o1777",
    }


def test_an_archive_is_an_oci_image(tmp_path: Path) -> None:
    make_tree(tmp_path / "one", ["bin/tool"], mtime=1)
    layer = oci.write_layer(tmp_path / "one", tmp_path / "one.tar")
    config = oci.Config(("/bin/tool",), {"B": "2", "A": "1"}, "/app")
    oci.write_archive(tmp_path / "image.tar", "lab.local/tool:1", [layer], config)

    with tarfile.open(tmp_path / "image.tar") as tar:
        blobs = {entry.name: _read(tar, entry) for entry in tar}
    assert json.loads(blobs["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    for name, content in blobs.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    (listed,) = json.loads(blobs["index.json"])["manifests"]
    assert listed["annotations"]["io.containerd.image.name"] == "lab.local/tool:1"
    manifest = json.loads(blobs[_path(listed["digest"])])
    assert [entry["digest"] for entry in manifest["layers"]] == [f"sha256:{layer.digest}"]
    settings = json.loads(blobs[_path(manifest["config"]["digest"])])
    assert settings["rootfs"]["diff_ids"] == [f"sha256:{layer.digest}"]
    assert settings["config"] == {
        "Entrypoint": ["/bin/tool"],
        "Env": ["A=1", "B=2"],
        "User": "1000",
        "WorkingDir": "/app",
    }


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(entry)
    assert content is not None
    return content.read()


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def test_a_file_is_copied_with_the_links_that_lead_to_it(tmp_path: Path) -> None:
    host = tmp_path / "host"
    (host / "usr" / "lib").mkdir(parents=True)
    (host / "usr" / "lib" / "libz.so.1.2").write_text("code")
    (host / "usr" / "lib" / "libz.so.1").symlink_to("libz.so.1.2")
    (host / "lib").symlink_to("usr/lib")
    (host / "other").symlink_to(host / "usr" / ".." / "lib")  # absolute, with a step back
    root = RootFs(tmp_path / "root")
    root.add(host / "other" / "libz.so.1")
    inside = root.inside(host)
    assert (inside / "usr" / "lib" / "libz.so.1.2").read_text() == "code"
    assert (inside / "usr" / "lib" / "libz.so.1").readlink() == Path("libz.so.1.2")
    assert (inside / "lib").readlink() == Path("usr/lib")
    root.add(host / "lib" / "libz.so.1")  # once more, by another way

    (host / "loop").symlink_to("loop")
    root.add(host / "loop")  # leads nowhere: there is nothing to copy
    assert not root.inside(host / "loop").exists()


def test_packages_come_with_all_that_they_need() -> None:
    names = {str(package.metadata["Name"]).lower() for package in images.closure(["locust"])}
    assert {"locust", "gevent", "greenlet", "flask", "jinja2", "markupsafe"} <= names
    assert "dagster" not in names
    with pytest.raises(SetupError, match="no-such-package isn't installed"):
        images.closure(["no-such-package"])


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="this is no Debian")
def test_a_compiler_comes_with_all_that_it_needs() -> None:
    found = toolchain.versions(["libgomp1"])
    assert {"libgomp1", "libc6"} <= set(found)
    with pytest.raises(SetupError, match="no-such-package"):
        toolchain.versions(["libgomp1", "no-such-package"])


def test_only_what_changed_is_made_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "checkout"
    (code / "weights").mkdir(parents=True)
    (code / "weights" / "__init__.py").write_text("x = 1\n")
    filled: list[str] = []

    def fill_python(root: RootFs) -> None:
        filled.append("python")
        root.finish()

    monkeypatch.setattr(images, "ROOT", code)
    monkeypatch.setattr(images, "_fill_python", fill_python)
    monkeypatch.setattr(images, "PYTHON", {"jobs": ((), ("weights",), oci.Config())})
    said: list[str] = []
    first = images.build_python(said.append)["jobs"]
    assert first.is_relative_to(cache)
    assert len(said) == 1
    assert images.build_python(said.append) == {"jobs": first}

    (code / "weights" / "__init__.py").write_text("x = 2\n")
    second = images.build_python(said.append)["jobs"]
    assert second != first
    assert not first.exists()
    assert filled == ["python"]
    assert len(said) == 1

    (code / "weights" / "__init__.py").write_text("x = 1\n")
    assert images.build_python(said.append)["jobs"].name == first.name


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
@pytest.mark.skipif(not programs.is_built(), reason="the lab is not set up")
def test_the_images_with_python_work_alone(tmp_path: Path) -> None:
    """Each in a root of its own, as the user they run as: no file of the machine is in reach."""
    archives = images.build_python(lambda _: None)
    for name, statement in {
        "promotion-jobs": "import hf_xet, huggingface_hub, locust, weights, loadtests.profile",
        "vllm-simulator": "import asyncio, ssl, sqlite3, lzma, ctypes, lab.engine",
    }.items():
        root = tmp_path / name
        root.mkdir()
        _unpack(archives[name], root)
        command = f'id -u && python -c "{statement}" && ls /etc/ssl/certs/ca-certificates.crt'
        run = subprocess.run(
            ["/bin/sh", "-c", command],
            env=dict(images.ENVIRONMENT),
            cwd="/",
            preexec_fn=functools.partial(_enter, root),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.stderr == ""
        assert run.stdout == "1000\n/etc/ssl/certs/ca-certificates.crt\n"


def _unpack(archive: Path, root: Path) -> None:
    with tarfile.open(archive) as tar:
        index = json.loads(_read(tar, tar.getmember("index.json")))
        manifest = json.loads(_read(tar, tar.getmember(_path(index["manifests"][0]["digest"]))))
        for layer in manifest["layers"]:
            content = tar.extractfile(_path(layer["digest"]))
            with tarfile.open(fileobj=content) as files:
                files.extractall(root, filter="fully_trusted")


def _enter(root: Path) -> None:
    os.chroot(root)
    os.chdir("/")
    os.setgid(oci.USER)
    os.setuid(oci.USER)
