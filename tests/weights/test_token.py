"""The token goes to the hub alone: not to where it redirects, and into no output."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hub import Fault, Hub, HubServer
from lab.hub.server import TOKEN
from tests.weights.conftest import REPO, World, model
from tests.weights.test_main import finish


@pytest.fixture
def elsewhere(world: World, tmp_path: Path) -> Iterator[HubServer]:
    """Another host, as a CDN is: it has the same files, for everybody."""
    with HubServer(Hub(tmp_path / "elsewhere"), host="127.0.0.2") as server:
        server.hub.commit(REPO, model())
        yield server


def test_a_redirect_to_another_host_goes_without_it(world: World, elsewhere: HubServer) -> None:
    commit = world.commit(model(), visibility="private")
    world.server.faults.add(Fault(where="get", redirect=elsewhere.url))
    events = finish(world.start(*world.fetch_arguments(commit), HF_TOKEN=TOKEN), 0)
    assert world.published(commit) == model()
    assert all(request.authorized for request in world.server.requests)
    assert len(elsewhere.requests) == len(model())
    assert not any(request.authorized for request in elsewhere.requests)
    assert TOKEN not in json.dumps(events)
    assert TOKEN not in "".join(
        path.read_text() for path in world.root.rglob("*") if path.suffix in (".json", "")
        if path.is_file()
    )  # fmt: skip


def test_one_on_the_same_host_goes_with_it(world: World) -> None:
    commit = world.commit(model(), visibility="private")
    world.server.faults.add(Fault(where="get", redirect=world.server.url, times=2))
    world.fetch(commit, token=TOKEN)
    assert all(request.authorized for request in world.server.requests)
