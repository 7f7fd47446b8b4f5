"""What a fetch has got of a file when it ends is kept, and the next fetch asks for the rest."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hub import Fault
from tests.weights.conftest import QUICK, REPO, World, model, tensors
from tests.weights.test_main import finish, wait_until
from weights import publish
from weights.errors import HubFailed, Interrupted, Stalled, WeightsError
from weights.pace import Patience

BIG = "big.safetensors"
CHUNK = 10 * 1024 * 1024  # huggingface_hub writes so much at a time
FILES = model(big__safetensors=tensors("big", size=8_000_000))  # 32 MB


@pytest.fixture
def commit(world: World) -> str:
    return world.commit(FILES)


def ranges(world: World) -> list[str | None]:
    return [r.range for r in world.server.requests if r.path.endswith(BIG) and r.method == "GET"]


def leave_a_part(world: World, commit: str, content: bytes) -> None:
    part = world.root / REPO / f".parts-{commit}" / BIG
    part.parent.mkdir(parents=True)
    part.write_bytes(content)


def arrived(world: World) -> int:
    return sum(path.stat().st_size for path in (world.root / REPO).glob(f".work-*/files/{BIG}"))


def whole(world: World, commit: str) -> None:
    assert world.published(commit) == FILES
    assert world.left_over() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_after_a_signal_the_next_fetch_goes_on(
    world: World, commit: str, number: signal.Signals
) -> None:
    world.server.faults.add(Fault(path=BIG, where="get", stall_after=25_000_000))
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: arrived(world) >= 2 * CHUNK)
    os.kill(process.pid, number)
    process.communicate()
    world.server.faults.clear()
    finish(world.start(*world.fetch_arguments(commit)), 0)
    assert ranges(world) == [None, f"bytes={2 * CHUNK}-"]
    whole(world, commit)


def test_after_an_error_too(world: World, commit: str) -> None:
    world.server.faults.add(
        Fault(path=BIG, where="get", cut_after=25_000_000, times=1),
        Fault(path=BIG, where="get", status=500),
    )
    with pytest.raises(HubFailed):
        world.fetch(commit)
    world.server.faults.clear()
    world.fetch(commit)
    assert ranges(world)[-1] == f"bytes={2 * CHUNK}-"
    assert world.events[-1]["bytes"] == sum(map(len, FILES.values()))
    whole(world, commit)


@pytest.mark.parametrize(
    ("left", "fault"),
    [
        (FILES[BIG][:CHUNK], Fault(path=BIG, where="get", no_range=True)),
        (FILES[BIG][:CHUNK], Fault(path=BIG, where="get", status=416, times=1)),
        (b"damaged" * 1000, None),
        (FILES[BIG], None),
        (FILES[BIG] + b"more", None),
        (b"", None),
    ],
    ids=["range ignored", "416", "damaged", "all of it", "too much", "nothing"],
)
def test_whatever_was_left_the_bytes_are_right(
    world: World, commit: str, left: bytes, fault: Fault | None
) -> None:
    leave_a_part(world, commit, left)
    if fault:
        world.server.faults.add(fault)
    world.fetch(commit)
    whole(world, commit)


def test_what_was_left_counts_for_the_room_on_the_volume(
    world: World, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is nearly there, only the rest must fit."""
    leave_a_part(world, commit, FILES[BIG][: 3 * CHUNK])
    free = len(FILES[BIG]) - 3 * CHUNK + 64 * 1024 * 1024 + 10_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    world.fetch(commit)
    whole(world, commit)


def test_what_was_left_is_no_sign_of_the_hubs_speed(world: World, commit: str) -> None:
    """It counts as done, and not in the rate."""
    leave_a_part(world, commit, FILES[BIG][: 2 * CHUNK])
    world.server.faults.add(Fault(path=BIG, where="get", stall_after=0))
    with pytest.raises(Stalled):
        world.fetch(commit, patience=Patience(stall_s=2.0, attempts=1))
    told = [event for event in world.events if "bytes_per_s" in event]
    assert told[-1]["bytes"] > 2 * CHUNK
    assert all(event["bytes_per_s"] < 100_000 for event in told), told


@pytest.fixture
def short_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(publish, "DEAD_AFTER_S", 2.0)


def work_of(world: World, commit: str, name: str, host: str, pid: int) -> Path:
    work = world.root / REPO / f".work-{commit}-{name}"
    (work / "files").mkdir(parents=True)
    (work / "files" / BIG).write_bytes(FILES[BIG][:CHUNK])
    (work / "heartbeat").write_text(f"{host} {pid} 1\n")
    return work


@pytest.fixture
def live(world: World, commit: str) -> Iterator[Path]:
    """The work folder of a fetch that goes on."""
    over = threading.Event()
    work = work_of(world, commit, "live", os.uname().nodename, os.getpid())

    def beat() -> None:
        while not over.wait(0.05):
            publish.beat(work)

    thread = threading.Thread(target=beat)
    thread.start()
    yield work
    over.set()
    thread.join()


def test_parts_of_a_process_that_is_gone_are_taken(world: World, commit: str) -> None:
    work_of(world, commit, "gone", os.uname().nodename, 2**22 + 1)
    world.fetch(commit)
    assert ranges(world) == [f"bytes={CHUNK}-"]
    whole(world, commit)


def test_parts_of_a_silent_host_are_taken(
    world: World, commit: str, short_heartbeats: None
) -> None:
    silent = work_of(world, commit, "silent", "elsewhere", 1)
    world.fetch(commit)
    assert f"whether the fetch in {silent.name} is alive" in world.events[0]["message"]
    assert ranges(world) == [f"bytes={CHUNK}-"]
    whole(world, commit)


def test_those_of_a_live_fetch_are_left_alone(
    world: World, commit: str, live: Path, short_heartbeats: None
) -> None:
    world.fetch(commit)
    assert world.published(commit) == FILES
    assert world.left_over() == [live.name]
    assert (live / "files" / BIG).read_bytes() == FILES[BIG][:CHUNK]


def test_killed_at_20_random_moments_it_ends_whole(world: World) -> None:
    """By SIGKILL and SIGTERM in turn; each process takes up what the last one left."""
    files = {f"{i:02}.safetensors": tensors(f"t{i}", size=400_000) for i in range(24)}
    files["config.json"] = b"{}"
    commit = world.commit(files)
    world.server.faults.add(Fault(where="get", bytes_per_s=8_000_000))
    chance = random.Random(4)
    for turn in range(20):
        process = world.start(*world.fetch_arguments(commit))
        time.sleep(chance.uniform(0.3, 1.6))
        process.send_signal(signal.SIGKILL if turn % 2 else signal.SIGTERM)
        process.communicate()
        published = world.published(commit)
        assert published in ({}, files), "nothing, or all of it"
    world.server.faults.clear()
    finish(world.start(*world.fetch_arguments(commit)), 0)
    assert world.published(commit) == files
    finish(world.start("verify", "--repo", REPO, "--commit", commit, "--root", str(world.root)), 0)


def test_an_error_while_others_download_keeps_their_parts(world: World, commit: str) -> None:
    world.server.faults.add(
        Fault(path=BIG, where="get", stall_after=25_000_000),
        Fault(path="model.safetensors", where="get", delay_s=1.0, status=500),
    )
    with pytest.raises(WeightsError) as raised:
        world.fetch(commit, patience=QUICK)
    assert not isinstance(raised.value, Interrupted)
    world.server.faults.clear()
    world.fetch(commit)
    whole(world, commit)
