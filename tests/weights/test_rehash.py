"""What is published is looked at again: by size and mtime each time, by hash where that's due."""

import json
import os
from pathlib import Path

import pytest

from lab.hub import Fault
from tests.weights.conftest import REPO, World, model
from weights import manifest
from weights.errors import HubFailed

WEIGHTS = "model.safetensors"
OTHER = b"x" * len(model()[WEIGHTS])


@pytest.fixture
def commit(world: World) -> str:
    """Published, and the Hub is away since."""
    commit = world.commit(model())
    world.fetch(commit)
    world.server.requests.clear()
    world.server.faults.add(Fault(status=503))
    return commit


def published(world: World, commit: str) -> Path:
    return world.root / REPO / commit


def replace(world: World, commit: str, content: bytes, *, keep_mtime: bool = False) -> None:
    """As a restore or a colleague does: another file of the same name."""
    path = published(world, commit) / WEIGHTS
    before = path.stat()
    new = path.with_name("new")
    new.write_bytes(content)
    new.chmod(0o644)
    if keep_mtime:
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


def age(world: World, commit: str, time: str) -> None:
    """Let the last comparison have been then."""
    path = published(world, commit) / manifest.NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"verified_at": time}))


def test_a_hit_asks_no_hub(world: World, commit: str) -> None:
    assert world.fetch(commit).hit
    assert not world.server.requests


def test_a_replaced_file_of_the_same_size_is_fetched_again_alone(world: World, commit: str) -> None:
    replace(world, commit, OTHER)
    world.server.faults.clear()
    assert not world.fetch(commit).hit
    assert world.published(commit) == model()
    assert [r.path.rpartition("/")[2] for r in world.server.requests if r.method == "GET"][1:] == [
        WEIGHTS
    ]
    world.server.faults.add(Fault(status=503))
    assert world.fetch(commit).hit


def test_it_is_never_taken_for_good_while_the_hub_is_away(world: World, commit: str) -> None:
    replace(world, commit, OTHER)
    for _ in range(2):
        with pytest.raises(HubFailed):
            world.fetch(commit)
    assert any(f"{WEIGHTS} of {REPO}" in event["message"] for event in world.events)


def test_the_same_bytes_written_again_are_a_hit_and_compared_once(
    world: World, commit: str
) -> None:
    replace(world, commit, model()[WEIGHTS])
    world.events.clear()
    assert world.fetch(commit).hit
    assert f"{WEIGHTS} was changed" in world.events[0]["message"]
    world.events.clear()
    assert world.fetch(commit).hit and world.events == []


def test_what_hides_behind_its_mtime_is_found_by_its_hash(world: World, commit: str) -> None:
    replace(world, commit, OTHER, keep_mtime=True)
    assert world.fetch(commit).hit, "as documented: sizes and mtimes"
    with pytest.raises(HubFailed):
        world.fetch(commit, rehash=True)
    world.server.faults.clear()
    assert not world.fetch(commit, rehash=True).hit
    assert world.published(commit) == model()


def test_hashes_are_compared_when_it_is_long_ago(world: World, commit: str) -> None:
    age(world, commit, "2020-01-01T00:00:00+00:00")
    world.events.clear()
    assert world.fetch(commit, rehash_after_days=30).hit
    assert "last done 2020-01-01" in world.events[0]["message"]
    world.events.clear()
    assert world.fetch(commit, rehash_after_days=30).hit and world.events == []


def test_a_manifest_of_the_first_version_is_read(world: World, commit: str) -> None:
    path = published(world, commit) / manifest.NAME
    content = json.loads(path.read_text())
    del content["verified_at"], content["mtimes"]
    path.write_text(json.dumps(content))
    assert world.fetch(commit).hit, "after all of it was compared by hash"
    assert manifest.read(published(world, commit)).mtimes  # type: ignore[union-attr]
