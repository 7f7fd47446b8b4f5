"""A volume that is full, read-only or another user's: named, and nothing half is published."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hub import Fault
from tests.weights.conftest import REPO, World, model, tensors
from tests.weights.test_main import finish, wait_until
from tests.weights.test_resume import BIG, CHUNK, arrived, leave_a_part, ranges
from weights.errors import DiskFull, VolumeNotWritable

FILES = model(big__safetensors=tensors("big", size=8_000_000))  # 32 MB


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=30)


@pytest.fixture
def small(world: World) -> Iterator[World]:
    """The volume is a file system of 160 MB (as root: tmpfs)."""
    mount("-t", "tmpfs", "-o", "size=160m", "tmpfs", str(world.root))
    yield world
    subprocess.run(["umount", "-l", str(world.root)], check=True, timeout=30)


def test_it_runs_full_in_the_middle_of_a_file(small: World) -> None:
    """The room was there when the fetch began; somebody else takes it."""
    commit = small.commit(FILES)
    small.server.faults.add(Fault(path=BIG, where="get", bytes_per_s=10_000_000))
    process = small.start(*small.fetch_arguments(commit))
    wait_until(lambda: arrived(small) >= CHUNK)
    filler = small.root / "somebody-elses"
    with filler.open("wb") as out:
        try:
            while True:
                out.write(b"x" * 100_000)
                out.flush()
        except OSError:
            pass
    error = finish(process, 1)[-1]
    assert error["error"] == DiskFull.__name__
    assert f"{BIG} of {REPO}@{commit}" in error["message"]
    assert "finished files are kept" in error["next"]
    assert not small.published(commit)
    filler.unlink()
    small.server.faults.clear()
    small.fetch(commit)
    assert small.published(commit) == FILES
    assert ranges(small)[-1] == f"bytes={CHUNK}-", "and it goes on where it was"


def test_what_is_left_of_a_file_is_copied_only_where_it_has_room_twice(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weights.fetch.SPARE_BYTES", 1_000_000)
    commit = small.commit(FILES)
    leave_a_part(small, commit, FILES[BIG][: 2 * CHUNK])
    filler = small.root / "somebody-elses"
    with filler.open("wb") as out:  # beside the part there is room for the rest, and little more
        os.posix_fallocate(out.fileno(), 0, shutil.disk_usage(small.root).free - 15_000_000)
    small.fetch(commit)
    assert small.published(commit) == FILES
    assert ranges(small) == [None] and any("no room to copy" in e["message"] for e in small.events)


def test_it_is_read_only(small: World) -> None:
    commit = small.commit(FILES)
    mount("-o", "remount,ro", str(small.root))
    with pytest.raises(VolumeNotWritable, match="Read-only file system") as error:
        small.fetch(commit)
    assert "mount the volume read-write" in error.value.next_step
    mount("-o", "remount,rw", str(small.root))
    small.fetch(commit)
    mount("-o", "remount,ro", str(small.root))
    assert small.fetch(commit).hit, "what is there needs no writing"


def test_it_is_another_users(world: World) -> None:
    """Root may write everywhere; the Job's user may not, and so not this process either."""
    commit = world.commit(FILES)
    os.chown(world.root, 4711, 4711)
    without = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    error = finish(world.start(*world.fetch_arguments(commit), under=without), 1)[-1]
    assert error["error"] == VolumeNotWritable.__name__
    assert "Permission denied" in error["message"] and "fsGroup" in error["next"]
    assert not list(Path(world.root).iterdir())
    os.chown(world.root, 0, 0)
    finish(world.start(*world.fetch_arguments(commit), under=without), 0)
