"""Weights for a cluster without a way out: packed here, taken in there, and nothing wrong is."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.weights.conftest import REPO, ROOT, World, model, tensors
from tests.weights.test_main import finish, wait_until
from weights import archive, manifest
from weights.archive import Imported, take
from weights.errors import (
    BadArchive,
    Damaged,
    NoSpace,
    Stalled,
    UnsafeName,
    UsageError,
    VolumeNotWritable,
    WeightsError,
    WrongBytes,
)
from weights.events import Reporter
from weights.manifest import File, Manifest, Selection

AT = "2026-01-01T00:00:00+00:00"
FILES = {
    **model(model__safetensors=tensors("a", "b", size=20_000)),
    **{"deep/er/x.json": b"[]", "empty.txt": b""},
}
SOME = 60_000  # bytes of its tar: the middle of model.safetensors, and no more than a pipe holds
Entries = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def commit(world: World) -> str:
    commit = world.commit(FILES)
    world.fetch(commit)
    return commit


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The volume of the cluster without a way out."""
    root = tmp_path / "there"
    root.mkdir()
    return root


@pytest.fixture
def packed(world: World, commit: str, tmp_path: Path) -> Path:
    out = tmp_path / "commit.tar"
    archive.pack(world.root, REPO, commit, str(out), Reporter(io.StringIO()))
    return out


def took(source: Path, root: Path) -> Imported:
    return take(str(source), root, Reporter(io.StringIO()))


def published(root: Path) -> dict[str, bytes]:
    """All files below commits that a reader could take for published."""
    return {
        str(path.relative_to(found.parent)): path.read_bytes()
        for found in root.glob(f"*/*/*/{manifest.NAME}")
        for path in found.parent.rglob("*")
        if path.is_file() and path.name != manifest.NAME
    }


def refused(source: Path, root: Path, kind: type[WeightsError]) -> str:
    before = published(root)
    with pytest.raises(kind) as raised:
        took(source, root)
    assert type(raised.value) is kind and raised.value.next_step
    assert published(root) == before
    assert [path for path in root.rglob(".*") if path.name.startswith(".work")] == []
    return str(raised.value)


def entries(tar: Path) -> Entries:
    with tarfile.open(tar) as opened:
        return [(info, (opened.extractfile(info) or io.BytesIO()).read()) for info in opened]


def remade(tar: Path, change: Callable[[Entries], Entries]) -> Path:
    changed = change(entries(tar))
    with tarfile.open(tar, "w") as opened:
        for info, content in changed:
            opened.addfile(info, io.BytesIO(content))
    return tar


# -- what is right ----------------------------------------------------------------------------


def test_what_was_packed_is_published_there_just_so(
    world: World, commit: str, packed: Path, there: Path
) -> None:
    os.umask(0o077)
    try:
        first = took(packed, there)
    finally:
        os.umask(0o022)
    assert published(there) == FILES == world.published(commit)
    here, copy = (manifest.read(root / REPO / commit) for root in (world.root, there))
    assert here and copy and here.digest == copy.digest == first.manifest_digest
    assert (here.files, here.selection) == (copy.files, copy.selection)
    assert copy.read_bytes_per_s > 0
    assert not first.hit and first.files == len(FILES)
    for path in (there / REPO).rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert took(packed, there).hit
    assert list((there / REPO).iterdir()) == [there / REPO / commit]


def test_a_fetch_finds_it_there_without_a_hub(
    world: World, commit: str, packed: Path, there: Path
) -> None:
    took(packed, there)
    arguments = ("--repo", REPO, "--commit", commit, "--root", str(there), "--chat")
    away = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    resolved = finish(world.start("resolve", "--repo", REPO, "--revision", commit, **away), 0)
    assert resolved[-1]["commit"] == commit
    asked = len(world.server.requests)
    [fetched] = finish(world.start("fetch", *arguments, **away), 0)
    assert fetched["hit"] is True and len(world.server.requests) == asked


def test_packed_twice_it_is_the_same_tar(world: World, commit: str, packed: Path) -> None:
    again = packed.with_name("again.tar")
    archive.pack(world.root, REPO, commit, str(again), Reporter(io.StringIO()))
    assert again.read_bytes() == packed.read_bytes()
    assert entries(packed)[0][0].name == f"{REPO}/{commit}/MANIFEST.json"


def test_from_a_folder(world: World, commit: str, there: Path) -> None:
    assert took(world.root / REPO / commit, there).files == len(FILES)
    assert published(there) == FILES


def test_from_one_process_to_another_by_a_pipe(world: World, commit: str, there: Path) -> None:
    place = ("--repo", REPO, "--commit", commit, "--root", str(world.root))
    program = [sys.executable, "-m", "weights"]
    with subprocess.Popen(
        [*program, "pack", *place, "--out", "-"], cwd=ROOT, stdout=subprocess.PIPE
    ) as packing:
        done = subprocess.run(
            [*program, "import", "--root", str(there), "--from", "-"],
            cwd=ROOT, stdin=packing.stdout, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert packing.returncode == 0 and done.returncode == 0, done.stdout
    *progress, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert progress[-1]["percent"] == 100.0
    assert result["commit"] == commit and published(there) == FILES


def test_one_that_nobody_reads_says_so(world: World) -> None:
    commit = world.commit({**FILES, "big.safetensors": tensors("big", size=1_000_000)})
    world.fetch(commit)
    place = ("--repo", REPO, "--commit", commit, "--root", str(world.root))
    process = world.start("pack", *place, "--out", "-")
    assert process.stdout and process.stderr
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    assert '"error": "ReaderGone"' in said and "Traceback" not in said


def test_a_damaged_file_is_mended_alone_and_others_stay(
    world: World, commit: str, packed: Path, there: Path
) -> None:
    took(packed, there)
    folder = there / REPO / commit
    (folder / "model.safetensors").write_bytes(b"cut")
    assert not took(packed, there).hit
    assert published(there) == FILES
    # What is in the published commit beyond the archive stays in it.
    more = File("more.txt", 1, git_sha1=hashlib.sha1(b"blob 1\0x").hexdigest())
    whole = manifest.read(folder)
    assert whole
    (folder / "more.txt").write_bytes(b"x")
    (folder / manifest.NAME).write_text(
        Manifest(REPO, commit, (*whole.files, more), Selection(), 1.0, AT, AT, {}).dump()
    )
    assert took(packed, there).hit
    (folder / "config.json").unlink()
    took(packed, there)
    after = manifest.read(folder)
    assert after and more in after.files and published(there)["config.json"] == FILES["config.json"]
    # But not what is named there and has gone.
    (folder / "more.txt").unlink()
    assert not took(packed, there).hit
    after = manifest.read(folder)
    assert after and more not in after.files and took(packed, there).hit


def test_two_at_once_end_whole(packed: Path, there: Path) -> None:
    results: list[object] = []

    def one() -> None:
        try:
            results.append(took(packed, there))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [type(result) for result in results] == [Imported] * 4, results
    assert published(there) == FILES


# -- what is wrong ----------------------------------------------------------------------------


def renamed(name: str) -> Callable[[Entries], Entries]:
    def change(found: Entries) -> Entries:
        found[-1][0].name = name
        return found

    return change


def as_link(kind: bytes) -> Callable[[Entries], Entries]:
    def change(found: Entries) -> Entries:
        info, _ = found[-1]
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0
        return [*found[:-1], (info, b"")]

    return change


def with_content(content: bytes) -> Callable[[Entries], Entries]:
    def change(found: Entries) -> Entries:
        place = next(
            i for i, (info, _) in enumerate(found) if info.name.endswith("model.safetensors")
        )
        info, before = found[place]
        changed = content or before[:-1] + bytes([before[-1] ^ 1])
        info.size = len(changed)
        return [*found[:place], (info, changed), *found[place + 1 :]]

    return change


def extra(found: Entries) -> Entries:
    info = tarfile.TarInfo(found[0][0].name.replace("MANIFEST.json", "evil.py"))
    info.size = 1
    return [*found, (info, b"x")]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (renamed("/etc/passwd"), UnsafeName, "'/etc/passwd', which leaves its folder"),
        (renamed(f"{REPO}/../../../x"), UnsafeName, "which leaves its folder"),
        (renamed("elsewhere/x"), BadArchive, "elsewhere/x, which isn't below lab/model/"),
        (as_link(tarfile.SYMTYPE), UnsafeName, "as a link or device"),
        (as_link(tarfile.LNKTYPE), UnsafeName, "as a link or device"),
        (as_link(tarfile.CHRTYPE), UnsafeName, "as a link or device"),
        (extra, BadArchive, "has evil.py that its manifest does not name"),
        (with_content(b""), WrongBytes, "model.safetensors of lab/model@"),
        (with_content(b"short"), WrongBytes, "has 5 bytes, its manifest says"),
        (lambda found: [*found, found[-1]], BadArchive, "twice"),
        (lambda found: found[:-2], BadArchive, "ends without 2 of the 5 files"),
        (lambda found: found[1:], BadArchive, "not with MANIFEST.json"),
        (lambda found: [], BadArchive, "begins with nothing"),
    ],
    ids=[
        *("absolute", "dotdot", "elsewhere", "symlink", "hardlink", "device", "extra", "bytes"),
        *("size", "twice", "missing", "no manifest", "empty"),
    ],
)
def test_it_is_refused(
    packed: Path,
    there: Path,
    change: Callable[[Entries], Entries],
    kind: type[WeightsError],
    message: str,
) -> None:
    assert message in refused(remade(packed, change), there, kind)
    assert published(there) == {}


def spoil(**fields: Any) -> Callable[[Entries], Entries]:
    """A manifest whose own digest is right, and whose content is not."""

    def change(found: Entries) -> Entries:
        document = json.loads(found[0][1])
        files = [File(**file) for file in document["files"]]
        if path := fields.get("path"):
            files[0] = File(path, files[0].size, files[0].sha256, files[0].git_sha1)
        if fields.get("twice"):
            files.append(files[0])
        repo, commit = fields.get("repo", REPO), fields.get("commit", document["commit"])
        made = Manifest(repo, commit, tuple(files), Selection(), 1.0, AT, AT, {}).dump().encode()
        info = found[0][0]
        info.size = len(made)
        return [(info, made), *found[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (spoil(path="../../x"), UnsafeName),
        (spoil(path="/etc/passwd"), UnsafeName),
        (spoil(path=7), BadArchive),
        (spoil(twice=True), BadArchive),
        (spoil(repo="../../x"), UsageError),
        (spoil(commit="../x"), UsageError),
    ],
    ids=["dotdot", "absolute", "no path", "twice", "repo", "commit"],
)
def test_a_manifest_from_elsewhere_is_not_trusted(
    packed: Path, there: Path, change: Callable[[Entries], Entries], kind: type[WeightsError]
) -> None:
    refused(remade(packed, change), there, kind)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("kept", [0.999, 0.6, 0.3, 0.0])
def test_a_tar_that_was_cut_is_refused(packed: Path, there: Path, kept: float) -> None:
    whole = packed.read_bytes()
    end = whole.rindex(FILES["model.safetensors"][-16:]) if kept > 0.9 else int(len(whole) * kept)
    packed.write_bytes(whole[:end])
    refused(packed, there, BadArchive)


def test_what_is_no_tar_is_refused(tmp_path: Path, there: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello " * 1000)
    assert "is no whole tar" in refused(tmp_path / "x", there, BadArchive)
    assert "No such file" in refused(tmp_path / "nowhere", there, UsageError)
    (tmp_path / "folder").mkdir()
    assert "not with MANIFEST.json" in refused(tmp_path / "folder", there, BadArchive)


def test_a_folder_with_a_link_is_refused(
    world: World, commit: str, there: Path, tmp_path: Path
) -> None:
    folder = world.root / REPO / commit
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert "config.json as a link" in refused(folder, there, UnsafeName)
    (folder / "config.json").unlink()
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "more").symlink_to(tmp_path)
    assert "has more that its manifest does not name" in refused(folder, there, BadArchive)


def test_other_bytes_than_those_published_are_refused(
    world: World, commit: str, packed: Path, there: Path
) -> None:
    took(packed, there)
    folder = there / REPO / commit
    found = manifest.read(folder)
    assert found
    other = tuple(
        File(file.path, file.size, "0" * 64) if file.sha256 else file for file in found.files
    )
    (folder / manifest.NAME).write_text(
        Manifest(REPO, commit, other, Selection(), 1.0, AT, AT, {}).dump()
    )
    assert "model.safetensors of" in refused(packed, there, WeightsError)


def test_a_damaged_commit_is_not_packed(world: World, commit: str, tmp_path: Path) -> None:
    damaged = world.root / REPO / commit / "model.safetensors"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    with pytest.raises(Damaged, match=r"model\.safetensors .* was not packed"):
        archive.pack(world.root, REPO, commit, str(tmp_path / "x.tar"), Reporter(io.StringIO()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "models"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "is a folder"),
        ("nowhere/x.tar", "nowhere/.x.tar.partial can't be written: No such file"),
        ("hub/x/x.tar", "Not a directory"),
    ],
)
def test_where_no_tar_can_be_written_is_said_at_once(
    world: World, commit: str, tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "hub/x").touch()
    written = io.StringIO()
    with pytest.raises(UsageError, match=message) as raised:
        archive.pack(world.root, REPO, commit, str(tmp_path / out), Reporter(written))
    assert "name a file in" in raised.value.next_step and not written.getvalue()


def test_no_space_is_said_before_the_first_byte(
    packed: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "SPARE_BYTES", 2**62)
    assert "to spare" in refused(packed, there, NoSpace)
    assert "mount the volume" in _next_step(packed, there / "nowhere")


def _next_step(source: Path, root: Path) -> str:
    with pytest.raises(VolumeNotWritable) as raised:
        took(source, root)
    return raised.value.next_step


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_stream_that_stalls_is_given_up_and_lives_until_then(
    packed: Path, there: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink = pipe
    with os.fdopen(os.dup(source)) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(sink, packed.read_bytes()[:SOME])
        started = time.monotonic()
        with pytest.raises(Stalled, match="no byte on stdin for 2 s"):
            take("-", there, Reporter(io.StringIO()), stall_s=2)
    assert time.monotonic() - started >= 2
    assert published(there) == {}


def test_killed_in_the_middle_nothing_is_published_and_the_next_one_is_whole(
    world: World, packed: Path, there: Path
) -> None:
    program = [sys.executable, "-m", "weights", "import", "--root", str(there), "--from", "-"]
    process = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin
    process.stdin.write(packed.read_bytes()[:SOME])
    process.stdin.flush()
    wait_until(lambda: list(there.glob("*/*/.work-*/commit/*")))
    process.kill()
    process.communicate()
    assert published(there) == {}
    took(packed, there)
    assert published(there) == FILES
    assert [path.name for path in (there / REPO).iterdir() if path.name.startswith(".")] == []
