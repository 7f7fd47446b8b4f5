"""A fetch against a real hub that misbehaves: what is published is whole, or nothing is."""

import io
import json
import os
import threading
from pathlib import Path

import pytest

from lab.hub import Fault
from lab.hub.server import OUTSIDER_TOKEN, TOKEN
from tests.weights.conftest import QUICK, REPO, World, index, model, tensors
from weights import manifest
from weights.errors import (
    BrokenSafetensors,
    CommitGone,
    GatedRepo,
    HubFailed,
    HubUnreachable,
    MissingShard,
    NoChatTemplate,
    NoSpace,
    NotPublished,
    Stalled,
    Unauthorized,
    Unreadable,
    UnsafeName,
    UsageError,
    VolumeNotWritable,
    WeightsError,
    WrongBytes,
)
from weights.events import Reporter
from weights.fetch import Wanted, fetch
from weights.hub import connect
from weights.pace import Patience

MISSING = "f" * 40


def messages(world: World) -> str:
    return "\n".join(str(event["message"]) for event in world.events)


def refused(world: World, commit: str, kind: type[WeightsError], **how: object) -> WeightsError:
    """Fetch, which must fail just so and leave nothing half. Returns the error."""
    with pytest.raises(kind) as raised:
        world.fetch(commit, **how)  # type: ignore[arg-type]
    error = raised.value
    assert type(error) is kind and error.next_step
    assert not world.published(commit)
    assert not [name for name in world.left_over() if name.startswith(".work")]
    return error


# -- what is right ----------------------------------------------------------------------------


def test_it_is_published_whole_readable_and_the_second_time_a_hit(world: World) -> None:
    files = model(sub__json=b"{}") | {"deep/er/x.json": b"[]", "pytorch_model.bin": b"pickle"}
    commit = world.commit(files)
    os.umask(0o077)
    try:
        first = world.fetch(commit, chat=True)
    finally:
        os.umask(0o022)
    del files["pytorch_model.bin"]
    assert world.published(commit) == files
    assert (first.hit, first.files, first.bytes) == (False, 5, sum(map(len, files.values())))
    assert first.read_bytes_per_s > 0 and first.path == str(world.root / REPO / commit)
    for path in (world.root / REPO).rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert world.left_over() == []
    asked = len(world.server.requests)
    second = world.fetch(commit, chat=True)
    assert second.hit and second.manifest_digest == first.manifest_digest
    assert len(world.server.requests) == asked, "a hit needs no hub"


def test_every_file_is_in_the_manifest_with_the_hash_of_the_hubs_tree(world: World) -> None:
    commit = world.commit(model())
    world.fetch(commit)
    found = manifest.read(world.root / REPO / commit)
    assert found is not None and found.commit == commit
    tree = world.server.hub.files(REPO, commit)
    assert {f.path: f.sha256 or f.git_sha1 for f in found.files} == {
        path: file.etag for path, file in tree.items()
    }
    assert [f.path for f in found.files if f.sha256] == ["model.safetensors"]


def test_a_damaged_file_is_fetched_again_alone(world: World) -> None:
    commit = world.commit(model())
    world.fetch(commit)
    damaged = world.root / REPO / commit / "model.safetensors"
    damaged.write_bytes(b"cut")
    world.server.requests.clear()
    again = world.fetch(commit)
    assert not again.hit and world.published(commit) == model()
    assert world.gets("model.safetensors") == 1 and world.gets("config.json") == 0
    assert world.fetch(commit).hit


def test_an_unreadable_manifest_is_made_anew(world: World) -> None:
    commit = world.commit(model())
    first = world.fetch(commit)
    (world.root / REPO / commit / "MANIFEST.json").write_text("{")
    again = world.fetch(commit)
    assert again.manifest_digest == first.manifest_digest and not again.hit
    assert world.gets("model.safetensors") == 1


def test_other_patterns_add_to_what_is_published(world: World) -> None:
    commit = world.commit(model(extra__txt=b"more"))
    world.fetch(commit, ignore=("*.txt",))
    assert "extra.txt" not in world.published(commit)
    assert world.fetch(commit).files == 4
    assert world.published(commit)["extra.txt"] == b"more"
    assert world.gets("model.safetensors") == 1


def test_a_lost_file_of_an_earlier_selection_is_not_promised(world: World) -> None:
    commit = world.commit(model(extra__txt=b"more"))
    world.fetch(commit)
    for name in ("extra.txt", "config.json"):
        (world.root / REPO / commit / name).unlink()
    world.events.clear()
    assert world.fetch(commit, ignore=("*.txt",)).files == 3
    assert world.published(commit) == model()
    said = messages(world)
    assert f"extra.txt of {REPO}@{commit} was of an earlier selection only" in said
    assert f"config.json of {REPO}@{commit} is missing" in said
    assert said.count("earlier selection") == 1
    assert world.fetch(commit, ignore=("*.txt",)).hit


def test_two_commits_lie_side_by_side(world: World) -> None:
    first = world.commit(model())
    second = world.commit(model(extra__txt=b"second"))
    world.fetch(first)
    world.fetch(second)
    assert world.published(first) == model() and "extra.txt" in world.published(second)


def test_two_fetches_at_once_end_whole(world: World) -> None:
    files = model() | {f"{i}.safetensors": tensors(f"t{i}", size=50_000) for i in range(8)}
    commit = world.commit(files)
    world.server.faults.add(Fault(where="get", bytes_per_s=2_000_000))
    results: list[object] = []

    def one() -> None:
        try:
            results.append(world.fetch(commit))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    assert not [result for result in results if isinstance(result, BaseException)], results
    assert world.published(commit) == files and world.left_over() == []


# -- a hub that refuses -----------------------------------------------------------------------


def test_gated_is_named_before_not_found(world: World) -> None:
    commit = world.commit(model(), visibility="gated")
    for token in (None, OUTSIDER_TOKEN):
        error = refused(world, commit, GatedRepo, token=token)
        assert REPO in str(error) and "accept the terms" in error.next_step
    assert world.fetch(commit, token=TOKEN).files == 3


def test_a_wrong_token(world: World) -> None:
    commit = world.commit(model())
    error = refused(world, commit, Unauthorized, token="hf_wrong_token")
    assert "hf_wrong_token" not in str(error)


def test_a_commit_whose_tree_is_gone(world: World) -> None:
    world.commit(model())
    error = refused(world, MISSING, CommitGone)
    assert MISSING in str(error) and "history rewritten?" in str(error)


def test_a_listed_file_that_is_404_is_never_optional(world: World) -> None:
    commit = world.commit(model())
    fault = Fault(path="config.json", where="get", status=404, error_code="EntryNotFound")
    world.server.faults.add(fault)
    error = refused(world, commit, CommitGone)
    assert "config.json" in str(error) and "history rewritten?" in str(error)


def test_a_rate_limit_is_waited_out_as_told(world: World) -> None:
    files = model() | {f"{i}.json": b"{}" for i in range(7)}
    commit = world.commit(files)
    world.server.faults.add(
        Fault(where="get", path="*.json", after=4, times=2, status=429, retry_after="2")
    )
    world.fetch(commit, patience=Patience(stall_s=1.0, attempts=1))
    assert world.published(commit) == files
    assert "rate limited, 2 s" in messages(world)
    assert sum(world.gets(name) for name in files) == len(files) + 2, "none is fetched again"


@pytest.mark.parametrize("where", ["api", "get"])
def test_a_server_error_that_passes(world: World, where: str) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(where=where, status=503, times=2))  # type: ignore[arg-type]
    world.fetch(commit)
    assert world.published(commit) == model()


def test_a_server_error_that_stays_is_named_and_finished_files_are_kept(world: World) -> None:
    commit = world.commit(model())
    fault = Fault(path="model.safetensors", where="get", status=500, body=f"token {TOKEN}")
    world.server.faults.add(fault)
    error = refused(world, commit, HubFailed, token=TOKEN)
    assert "answers 500 for model.safetensors of " + REPO in str(error)
    assert TOKEN not in json.dumps(world.events) + str(error)
    world.server.faults.clear()
    world.fetch(commit)
    assert world.gets("config.json") == 1 and world.published(commit) == model()


def test_a_connection_cut_in_a_file_is_resumed(world: World) -> None:
    files = model(big__safetensors=tensors("big", size=6_000_000))  # 24 MB
    commit = world.commit(files)
    world.server.faults.add(
        Fault(path="big.safetensors", where="get", cut_after=15_000_000, times=1)
    )
    world.fetch(commit)
    assert world.published(commit) == files
    assert [r.range for r in world.server.requests if r.range] == ["bytes=10485760-"]


def test_a_hub_that_always_cuts_is_named(world: World) -> None:
    commit = world.commit(model())
    fault = Fault(path="config.json", where="get", cut_after=3)
    world.server.faults.add(fault)
    error = refused(world, commit, HubUnreachable, patience=Patience(attempts=1))
    assert "cut" in str(error) and "config.json" in str(error)


def test_a_stall_ends_with_what_was_waited_for(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(path="model.safetensors", where="get", stall_after=100))
    error = refused(world, commit, Stalled, patience=Patience(stall_s=1.0))
    at = world.server.url.removeprefix("http://")
    assert f"waiting for model.safetensors of {REPO}@{commit} from {at}" in str(error)
    world.server.faults.clear()
    assert world.fetch(commit).files == 3


def test_a_hub_that_never_answers_the_list_is_noticed(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(where="api", delay_s=5))
    error = refused(world, commit, Stalled, patience=Patience(stall_s=0.5))
    at = world.server.url.removeprefix("http://")
    assert f"the list of files of {REPO}@{commit} from {at}" in str(error)
    assert f"waits for the list of files of {REPO}@{commit} from {at}, " in messages(world)


def test_a_fetch_that_fails_leaves_no_empty_folders_of_its_own(world: World) -> None:
    world.commit(model())
    commit = world.server.hub.commit("lab/gated", dict(model()), visibility="gated")
    hub = connect({"HF_ENDPOINT": world.server.url})
    wanted, reporter = Wanted("lab/gated", commit), Reporter(io.StringIO())
    with pytest.raises(GatedRepo):
        fetch(wanted, world.root, hub, reporter, QUICK)
    assert not list(world.root.iterdir())
    (world.root / "lab").mkdir()
    with pytest.raises(GatedRepo):
        fetch(wanted, world.root, hub, reporter, QUICK)
    assert list(world.root.rglob("*")) == [world.root / "lab"], "that was there before"


def test_wrong_bytes_once_are_fetched_again(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(path="model.safetensors", where="get", flip_byte=200, times=1))
    world.fetch(commit)
    assert world.published(commit) == model() and "downloading it again" in messages(world)


def test_wrong_bytes_of_the_right_length_are_never_published(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(path="model.safetensors", where="get", flip_byte=200))
    error = refused(world, commit, WrongBytes)
    assert "model.safetensors of " + REPO in str(error) and "sha256:" in str(error)


# -- a repository that is not right -----------------------------------------------------------


def test_a_broken_safetensors_file_is_refused_though_its_hash_is_right(world: World) -> None:
    commit = world.commit(model(model__safetensors=tensors("a") + b"more"))
    error = refused(world, commit, BrokenSafetensors)
    assert "model.safetensors" in str(error)


def test_a_missing_shard_is_found_before_the_weights_are_fetched(world: World) -> None:
    files = {
        "model-1.safetensors": tensors("a"),
        "model.safetensors.index.json": index(a="model-1.safetensors", b="model-2.safetensors"),
    }
    error = refused(world, world.commit(files), MissingShard)
    assert "model-2.safetensors" in str(error) and world.gets("model-1.safetensors") == 0


def test_no_template_while_chat_is_wanted(world: World) -> None:
    commit = world.commit(model(tokenizer_config__json=b"{}"))
    refused(world, commit, NoChatTemplate, chat=True)
    assert world.gets("model.safetensors") == 0
    assert world.fetch(commit).files == 3
    with pytest.raises(NoChatTemplate):
        world.fetch(commit, chat=True)


def test_a_name_that_leaves_the_folder(world: World) -> None:
    commit = world.commit(model() | {"../../evil.json": b"{}"})
    refused(world, commit, UnsafeName)
    assert not list(world.root.parent.rglob("evil.json"))


# -- a volume that is not right ---------------------------------------------------------------


def test_no_space_is_an_error_before_the_first_byte(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = world.commit(model())
    # The one thing that is not real here: a file system of its own needs root.
    usage = lambda _: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr("weights.fetch.shutil.disk_usage", usage)
    error = refused(world, commit, NoSpace)
    assert "1.0 kB free" in str(error)
    assert not [r for r in world.server.requests if "/resolve/" in r.path]


def test_a_root_that_is_not_there(world: World) -> None:
    commit = world.commit(model())
    world.root = world.root / "not-mounted"
    with pytest.raises(VolumeNotWritable, match="not-mounted"):
        world.fetch(commit)


def test_a_folder_that_others_can_not_enter(world: World) -> None:
    commit = world.commit(model())
    (world.root / "lab").mkdir(mode=0o700)
    with pytest.raises(Unreadable, match="lab has mode 0700"):
        world.fetch(commit)
    assert not (world.root / REPO / commit / "MANIFEST.json").exists()


def test_a_folder_without_a_manifest_is_not_touched(world: World) -> None:
    commit = world.commit(model())
    by_hand = world.root / REPO / commit
    by_hand.mkdir(parents=True)
    (by_hand / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(NotPublished, match="without a MANIFEST"):
        world.fetch(commit)
    assert (by_hand / "model.safetensors").read_bytes() == b"somebody's"


def test_what_an_older_fetch_left_is_used_if_right_and_removed_if_not(world: World) -> None:
    commit = world.commit(model())
    staging = world.root / REPO / f".staging-{commit}"
    (staging / "sub").mkdir(parents=True)
    (staging / "config.json").write_bytes(model()["config.json"])
    (staging / "model.safetensors").write_bytes(b"x" * len(model()["model.safetensors"]))
    (staging / "sub" / "foreign.bin").write_bytes(b"x")
    (staging / "tokenizer_config.json").symlink_to("/etc/passwd")
    world.fetch(commit)
    assert world.published(commit) == model()
    assert world.gets("config.json") == 0 and world.gets("model.safetensors") == 1
    assert not (world.root / REPO / commit / "tokenizer_config.json").is_symlink()
    assert Path("/etc/passwd").read_text().startswith("root")


def test_a_short_commit_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="40 hex"):
        world.fetch("abc1234", patience=QUICK)
