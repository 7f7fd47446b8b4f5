"""Collecting on a real volume: what goes, what stays, and what a kill in the middle leaves."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lab.hub import Fault
from tests.weights.conftest import REPO, World, model, tensors
from tests.weights.test_main import finish, in_the_middle, slow_world, wait_until
from weights import collect, manifest, publish
from weights.errors import UsageError, VolumeNotWritable
from weights.events import Reporter
from weights.volume import scan

DAY_S = 86_400


def published(world: World, days: float, **more: bytes) -> str:
    """A commit that was last used so many days ago."""
    commit = world.commit(model(**{f"days{days}__txt".replace(".", "_"): b"", **more}))
    world.fetch(commit)
    age(world, commit, days)
    return commit


def age(world: World, commit: str, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(world.root / REPO / commit / manifest.NAME, (then, then))


def run(world: World, *arguments: str, keep: str = "f" * 40) -> dict[str, Any]:
    """`collect` as a process. Its result, with the rows that it listed."""
    start = ("collect", "--root", str(world.root), "--keep", f"{REPO}@{keep}")
    *said, result = finish(world.start(*start, *arguments), 0)
    rows = [event for event in said if "repo" in event]
    return {**result, "rows": rows, "said": "\n".join(event["message"] for event in said)}


def here(world: World) -> set[str]:
    return {commit.manifest.commit for commit in scan(world.root).published}


def test_by_age_the_dry_run_lists_and_the_run_removes_just_that(world: World) -> None:
    old, kept, new = published(world, 40), published(world, 90), published(world, 1)
    dry = run(world, "--older-than", "30", "--dry-run", keep=kept)
    assert here(world) == {old, kept, new}
    assert [(row["commit"], row["removed"]) for row in dry["rows"]] == [
        (kept, False), (old, True), (new, False),
    ]  # fmt: skip
    assert dry["rows"][1]["why"] == "unused for 40.0 days"
    assert dry["dry_run"] and dry["removed"] == 1 and dry["bytes"] == dry["rows"][1]["size_bytes"]
    real = run(world, "--older-than", "30", keep=kept)
    assert real["rows"] == [{**row, "idle_days": real["rows"][i]["idle_days"]}
                            for i, row in enumerate(dry["rows"])]  # fmt: skip
    assert here(world) == {kept, new} and world.left_over() == []
    assert (real["removed"], real["kept"], real["left"]) == (1, 2, 0)


def test_by_space_the_oldest_go_until_so_much_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    third, first, second, kept = (published(world, days) for days in (1, 4, 3, 9))
    volume = scan(world.root)
    sizes = {c.manifest.commit: c.manifest.bytes for c in volume.published}
    wanted = collect.Policy(frozenset({kept}), None, free=100 + sizes[first] + 1)
    verdicts = collect.commits(volume, wanted, time.time(), free=100)
    assert [v.commit for v in verdicts if v.removed] == [first, second]
    assert not [v for v in collect.commits(volume, wanted, time.time(), free=10**9) if v.removed]
    everything = collect.Policy(frozenset({kept}), None, free=10**18)
    verdicts = collect.commits(volume, everything, time.time(), free=100)
    assert [v.commit for v in verdicts if v.removed] == [first, second, third]
    result = run(world, "--free", "1000000TB", keep=kept)
    assert here(world) == {kept} and result["short_bytes"] > 10**17


def test_a_promotion_that_finds_a_commit_there_uses_it(world: World) -> None:
    commit = published(world, 40)
    assert world.fetch(commit).hit
    assert run(world, "--older-than", "30")["removed"] == 0
    assert here(world) == {commit}


def test_what_is_used_while_it_is_judged_stays(world: World, tmp_path: Path) -> None:
    commit = published(world, 40)
    wanted = collect.policy(["f" * 40], 30, None)
    [verdict] = collect.commits(scan(world.root), wanted, time.time(), 0)
    assert verdict.removed
    publish.touch(world.root / REPO / commit)
    with (tmp_path / "out").open("w") as out:
        assert collect._remove([verdict], Reporter(out)) == ([], 0)
    assert "used just now" in (tmp_path / "out").read_text()
    assert here(world) == {commit}


def test_a_reader_keeps_the_files_that_it_has_open(world: World) -> None:
    commit = published(world, 40)
    with (world.root / REPO / commit / "model.safetensors").open("rb") as reader:
        start = reader.read(10)
        run(world, "--older-than", "30")
        assert here(world) == set()
        assert start + reader.read() == model()["model.safetensors"]


def test_a_running_fetch_keeps_what_it_writes(world: World) -> None:
    commit, files = slow_world(world)
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: in_the_middle(world, commit, files))
    result = run(world, "--older-than", "0")
    assert {row["why"] for row in result["rows"]} == {"a fetch is running"}
    assert result["removed"] == 0
    world.server.faults.clear()
    finish(process, 0)
    assert world.published(commit) == files


def test_a_commit_that_is_mended_is_kept(world: World) -> None:
    files = {**model(), "slow.safetensors": tensors("slow", size=1_000_000)}
    commit = world.commit(files)
    world.fetch(commit)
    age(world, commit, 40)
    (world.root / REPO / commit / "slow.safetensors").unlink()
    world.server.faults.add(Fault(path="slow.safetensors", where="get", bytes_per_s=20_000))
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: world.gets("slow.safetensors") == 2)
    assert run(world, "--older-than", "30")["removed"] == 0
    world.server.faults.clear()
    finish(process, 0)
    assert world.published(commit) == files


def test_what_a_dead_fetch_left_goes_unless_its_commit_is_kept(world: World) -> None:
    commit, files = slow_world(world)
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: in_the_middle(world, commit, files))
    process.kill()
    process.wait()
    assert [name[:6] for name in sorted(world.left_over())] == [".stagi", ".work-"]
    kept = run(world, "--older-than", "30", keep=commit)
    assert kept["removed"] == 1 and world.left_over() == [f".staging-{commit}"]
    gone = run(world, "--older-than", "30")
    assert gone["removed"] == 1 and gone["bytes"] > 0 and world.left_over() == []


@pytest.mark.parametrize("moment", range(4))
def test_killed_in_the_middle_nothing_half_looks_published(world: World, moment: int) -> None:
    many = {f"{i:03}__txt": b"x" for i in range(120)}
    commits = [published(world, 40 + i, **many) for i in range(3)]
    whole = {name: len(world.published(name)) for name in commits}
    start = ("collect", "--root", str(world.root), "--keep", "f" * 40, "--older-than", "30")
    process = world.start(*start)
    wait_until(lambda: process.poll() is not None or len(here(world)) < 3 - moment // 2)
    time.sleep(0.003 * moment)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for commit in here(world):
        assert len(world.published(commit)) == whole[commit]
    for commit in set(commits) - here(world):
        assert not world.published(commit)
    run(world, "--older-than", "30")
    assert here(world) == set() and world.left_over() == []
    assert not world.fetch(commits[0]).hit, "and can be fetched again"
    assert len(world.published(commits[0])) == whole[commits[0]]


def test_what_this_program_did_not_make_is_named_and_stays(world: World) -> None:
    repo = world.root / REPO
    old = published(world, 40)
    by_hand, other, damaged = (repo / (c * 40) for c in "abc")
    by_hand.mkdir()
    (by_hand / "model.safetensors").write_bytes(b"mine")
    (repo / old / manifest.NAME).replace(repo / "kept.json")
    other.mkdir()
    (other / manifest.NAME).write_bytes((repo / "kept.json").read_bytes())
    (repo / "kept.json").rename(repo / old / manifest.NAME)
    age(world, old, 40)
    damaged.mkdir()
    (damaged / manifest.NAME).write_text("{")
    (repo / ("d" * 40)).symlink_to(repo / old)
    (world.root / "lost+found").mkdir()
    (world.root / "notes.txt").write_text("mine")
    (world.root / "datasets" / "mine" / "deep").mkdir(parents=True)
    result = run(world, "--older-than", "0", "--free", "1000TB")
    assert here(world) == set()
    for path, why in {
        by_hand: "has no MANIFEST.json",
        other: f"has the manifest of {REPO}@{old}",
        damaged: "can't be read as a manifest",
        repo / ("d" * 40): "is no folder",
        world.root / "lost+found": "has no name of this program's folders",
        world.root / "notes.txt": "is no folder",
        world.root / "datasets" / "mine" / "deep": "has no name of this program's folders",
    }.items():
        assert os.path.lexists(path)
        assert f"{path} {why}" in result["said"] or why in result["said"], path
    assert result["foreign"] == 7
    assert (by_hand / "model.safetensors").read_bytes() == b"mine"


def test_list_has_all_three(world: World) -> None:
    commit = published(world, 1)
    (world.root / REPO / f".staging-{'a' * 40}").mkdir()
    (world.root / "notes.txt").write_text("mine")
    [_, result] = finish(world.start("list", "--root", str(world.root)), 0)
    assert [row["commit"] for row in result["published"]] == [commit]
    assert result["unfinished"] == [str(world.root / REPO / f".staging-{'a' * 40}")]
    assert result["foreign"] == {str(world.root / "notes.txt"): "is no folder"}


def test_a_keep_that_is_not_there_is_said(world: World) -> None:
    published(world, 1)
    said = run(world, "--older-than", "30", keep="e" * 40)["said"]
    assert f"{'e' * 40} is to be kept, and isn't published on this volume" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", f"{REPO}@main", "--older-than", "1"], "lab/model@main"),
        (["--keep", "f" * 40], "nothing says what to remove"),
        (["--keep", "f" * 40, "--free", "lots"], "--free lots is no size"),
        (["--keep", "f" * 40, "--older-than", "-1"], "--older-than -1"),
        (["--keep", "f" * 40, "--older-than", "nan"], "--older-than nan"),
    ],
)
def test_mistakes(world: World, arguments: list[str], message: str) -> None:
    commit = published(world, 40)
    [error] = finish(world.start("collect", "--root", str(world.root), *arguments), 2)
    assert error["error"] == "UsageError" and message in error["message"]
    assert here(world) == {commit}


def test_nothing_is_kept_by_mistake_of_leaving_it_out(world: World) -> None:
    process = world.start("collect", "--root", str(world.root), "--older-than", "1")
    assert "--keep" in process.communicate(timeout=60)[1] and process.returncode == 2


@pytest.mark.parametrize(
    ("text", "size"), [("50GiB", 50 * 2**30), ("1.5Gi", 3 * 2**29), ("2GB", 2 * 10**9), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert collect.policy(["f" * 40], None, text).free == size
    with pytest.raises(UsageError):
        collect.policy(["f" * 40], None, f"-{text}")


def test_a_volume_that_may_only_be_read_can_be_looked_at(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(world, 40)
    wanted = collect.policy(["f" * 40], 30, None)

    def read_only(root: Path) -> float:
        raise OSError(errno.EROFS, "Read-only file system", str(root))

    monkeypatch.setattr(publish, "now", read_only)
    with (tmp_path / "out").open("w") as out:
        looked = collect.collect(world.root, wanted, Reporter(out), dry_run=True)
        with pytest.raises(VolumeNotWritable, match="Read-only"):
            collect.collect(world.root, wanted, Reporter(out), dry_run=False)
    assert looked.removed == 1
