"""Repositories of unusual size: ten thousand files, none, and none with weights."""

import pytest

from tests.weights.conftest import REPO, World, model
from weights.errors import EmptyRepository, NoWeights
from weights.publish import folders


def test_ten_thousand_files(world: World) -> None:
    """The tree comes in pages; each file is fetched once, and the second time none."""
    files = {f"{i // 100:02}/{i}.json": f"{i}".encode() for i in range(10_000)} | model()
    commit = world.commit(files)
    assert world.fetch(commit).files == len(files)
    assert world.published(commit) == files
    gets = [r.path for r in world.server.requests if "/resolve/" in r.path]
    assert len(gets) == len(set(gets)) == len(files)
    world.server.requests.clear()
    assert world.fetch(commit).hit and not world.server.requests


def test_none(world: World) -> None:
    commit = world.commit({})
    with pytest.raises(EmptyRepository, match=f"{REPO}@{commit} has no files") as error:
        world.fetch(commit)
    assert error.value.next_step and not folders(world.root, REPO, commit).published.exists()


def test_none_with_weights(world: World) -> None:
    commit = world.commit({"config.json": b"{}", "README.md": b"about"})
    with pytest.raises(NoWeights, match=f"{REPO}@{commit}") as error:
        world.fetch(commit)
    assert error.value.next_step and not world.published(commit)
    assert not [r for r in world.server.requests if "/resolve/" in r.path]
