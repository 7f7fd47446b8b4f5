"""Fetches of files that the hub has in (simulated) Xet storage, by the unmodified hf_xet."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.hub import Fault, HubServer, xet
from lab.hub.server import TOKEN
from tests.weights.conftest import REPO, ROOT, World, model, tensors
from tests.xet_client import begin_anew
from weights import manifest
from weights.errors import (
    DiskFull,
    Forbidden,
    HubFailed,
    HubRefused,
    HubUnreachable,
    Place,
    RateLimited,
    Stalled,
    Unauthorized,
    VolumeNotWritable,
    WeightsError,
    WrongBytes,
)
from weights.pace import Patience
from weights.xet import understand

BIG = tensors("big", size=5_000_000)  # 20 MB in 5 xorbs
BIG_HASH = hashlib.sha256(BIG).hexdigest()
FILES = model(model__safetensors=BIG)
PATIENT = Patience(stall_s=60.0, attempts=2, first_wait_s=0.02)


@pytest.fixture(autouse=True)
def impatient_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A session of hf_xet of this test's own, whose tries follow each other at once."""
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    begin_anew()
    yield
    begin_anew()


@pytest.fixture
def commit(world: World) -> str:
    """The commit of a repository whose weights are in Xet storage."""
    return world.commit(FILES, xet=True)


def asked(world: World, start: str) -> list[str]:
    """The paths that were asked for and begin so."""
    return [r.path for r in world.server.requests if r.path.startswith(start)]


def until(what: Callable[[], object], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, "it didn't come to that"
        time.sleep(0.01)


def refused(world: World, commit: str, kind: type[WeightsError], **how: object) -> WeightsError:
    with pytest.raises(WeightsError) as raised:
        world.fetch(commit, **how)  # type: ignore[arg-type]
    error = raised.value
    assert type(error) is kind, error
    assert "model.safetensors of " + REPO in str(error) and error.next_step
    assert not world.published(commit)
    return error


# -- what is right ----------------------------------------------------------------------------


def test_a_fetch_goes_through_xet_and_is_published_with_the_hubs_hash(
    world: World, commit: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fetched = world.fetch(commit, token=TOKEN)
    assert world.published(commit) == FILES and fetched.bytes == sum(map(len, FILES.values()))
    found = manifest.read(world.root / REPO / commit)
    assert found is not None
    assert {f.path: f.sha256 for f in found.files}["model.safetensors"] == BIG_HASH
    # Through Xet and no other way: what the file is made of was asked once, and each xorb.
    assert asked(world, "/v2/") == [f"/v2/reconstructions/{BIG_HASH}"]
    assert len(asked(world, "/xorbs/")) == 5 and world.gets("model.safetensors") == 0
    assert world.fetch(commit).hit
    # Nothing of it stays on the volume, is told to others, or printed.
    assert world.left_over() == []
    assert not asked(world, "/v1/telemetry")
    assert capfd.readouterr() == ("", "")


def test_the_hubs_token_goes_to_the_hub_alone_and_into_no_log(
    world: World, commit: str, tmp_path: Path
) -> None:
    start = world.start(
        *world.fetch_arguments(commit), HF_TOKEN=TOKEN, HF_XET_CACHE=str(tmp_path / "cache")
    )
    out, err = start.communicate(timeout=120)
    assert start.returncode == 0, out + err
    xorbs = [r for r in world.server.requests if r.path.startswith("/xorbs/")]
    assert xorbs and not any(request.authorized for request in xorbs)
    logs = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "reconstruction" in "".join(logs)
    for text in (out, err, *logs):
        assert TOKEN not in text and xet.TOKEN_PREFIX not in text


def test_the_older_interface_of_the_storage_does_too(world: World, commit: str) -> None:
    world.server.faults.add(Fault(where="cas", status=501, times=1))
    world.fetch(commit)
    assert world.published(commit) == FILES
    assert [path[:4] for path in asked(world, "/v")] == ["/v2/", "/v1/"]


def test_progress_and_the_watchdog_follow_the_network_not_the_file(world: World) -> None:
    files = model(model__safetensors=tensors("big", size=3_000_000))  # 12 MB in 3 xorbs
    commit = world.commit(files, xet=True)
    # 8 s a xorb: for as long nothing is written, which is longer than the watchdog's patience.
    world.server.faults.add(Fault(where="xorb", bytes_per_s=500_000))
    world.fetch(commit, patience=Patience(stall_s=5.0, attempts=1))
    assert world.published(commit) == files
    moved = [event["bytes"] for event in world.events if "percent" in event]
    total = sum(map(len, files.values()))
    assert moved == sorted(moved) and moved[-1] == total
    assert len({n for n in moved if total * 0.05 < n < total * 0.95}) >= 2, moved


# -- a storage that misbehaves ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["cas", "xorb"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, HubRefused),
        (401, Forbidden),
        (403, Forbidden),
        (404, HubRefused),
        (429, RateLimited),
        (500, HubFailed),
        (503, HubFailed),
    ],
)
def test_a_refusal_of_the_storage_has_its_name(
    world: World, commit: str, where: str, status: int, kind: type[WeightsError]
) -> None:
    world.server.faults.add(Fault(where=where, status=status))  # type: ignore[arg-type]
    error = refused(world, commit, kind, patience=PATIENT)
    assert f"Xet storage (127.0.0.1) answers {status} for model.safetensors" in str(error)
    assert "http" not in str(error), "the addresses of parts are signed"
    world.server.faults.clear()
    world.fetch(commit)
    assert world.published(commit) == FILES


def test_a_failure_that_lasts_longer_than_the_clients_patience_is_outlasted(
    world: World, commit: str
) -> None:
    world.server.faults.add(Fault(where="cas", status=503, times=8))  # it tries 6 times
    world.fetch(commit)
    assert world.published(commit) == FILES
    assert "answers 503" in json.dumps(world.events)


@pytest.mark.parametrize("before", [1, 2], ids=["asked by huggingface_hub", "asked by hf_xet"])
def test_a_hub_that_gives_no_token_for_its_storage(
    world: World, commit: str, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    monkeypatch.setattr(xet, "TOKEN_SECONDS", 10)  # so short that hf_xet asks again itself
    world.server.faults.add(Fault(where="api", after=before, status=401))  # the list goes through
    error = refused(world, commit, Unauthorized, token=TOKEN)
    assert TOKEN not in str(error)


def test_a_token_endpoint_that_redirects_gets_no_token_of_ours(
    world: World, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet, "TOKEN_SECONDS", 10)
    with HubServer(world.server.hub) as other:
        world.server.faults.add(Fault(where="api", after=1, redirect=other.url))
        world.fetch(commit, token=TOKEN)
        asked_there = [r for r in other.requests if "xet-read-token" in r.path]
    assert world.published(commit) == FILES
    assert len(asked_there) >= 2 and not any(request.authorized for request in asked_there)


def test_tokens_that_look_expired_to_the_jobs_clock(
    world: World, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet, "TOKEN_SECONDS", -1800)  # the clock is an hour and a half ahead
    world.fetch(commit)
    assert world.published(commit) == FILES


def test_connections_cut_in_the_middle_are_mended(world: World, commit: str) -> None:
    world.server.faults.add(Fault(where="xorb", cut_after=1_000_000, times=4))
    world.fetch(commit, patience=Patience(attempts=1))
    assert world.published(commit) == FILES


def test_a_storage_that_always_cuts(world: World, commit: str) -> None:
    world.server.faults.add(Fault(where="xorb", cut_after=1000))
    error = refused(world, commit, HubUnreachable, patience=PATIENT)
    assert "cut" in str(error)


def test_a_storage_that_can_not_be_reached_is_named_with_what_to_let_pass(
    world: World, commit: str
) -> None:
    world.server.faults.add(Fault(where="cas", redirect="http://127.0.0.1:9"))
    error = refused(world, commit, HubUnreachable, patience=PATIENT)
    assert "cas-server.xethub.hf.co" in error.next_step


def test_a_stall_ends_within_its_time_with_what_was_waited_for(world: World, commit: str) -> None:
    world.server.faults.add(Fault(where="xorb", stall_after=1000))
    started = time.monotonic()
    error = refused(world, commit, Stalled, patience=Patience(stall_s=2.0))
    assert f"waiting for model.safetensors of {REPO}@{commit}" in str(error)
    assert time.monotonic() - started < 20
    world.server.faults.clear()
    begin_anew()  # the next fetch is another process, without the hanging connections
    world.fetch(commit)
    assert world.published(commit) == FILES


def test_a_silent_connection_is_opened_anew_by_the_client(
    world: World, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "1s")
    world.server.faults.add(Fault(where="xorb", stall_after=1000, times=2))
    world.fetch(commit, patience=Patience(stall_s=60.0, attempts=1))
    assert world.published(commit) == FILES


def test_wrong_bytes_of_the_storage_are_found_and_never_published(
    world: World, commit: str
) -> None:
    world.server.faults.add(Fault(where="xorb", flip_byte=6_000_000))
    error = refused(world, commit, WrongBytes)
    assert "sha256:" in str(error)
    world.server.faults.clear()
    world.server.faults.add(Fault(where="xorb", flip_byte=6_000_000, times=1))
    # The first download again: the fault is taken by the first xorb that is asked for.
    world.fetch(commit)
    assert world.published(commit) == FILES


def test_a_part_that_is_no_xorb(world: World, commit: str) -> None:
    world.server.faults.add(Fault(where="xorb", flip_byte=0))  # the first header's version
    error = refused(world, commit, HubFailed, patience=PATIENT)
    assert "damaged" in str(error)


def test_errors_of_the_volume_inside_the_client_are_errors_of_the_volume() -> None:
    place = Place(REPO, "c" * 40, "model.safetensors")
    for text, kind in (
        ("I/O error: No space left on device (os error 28)", DiskFull),
        ("I/O error: Read-only file system (os error 30)", VolumeNotWritable),
    ):
        found = understand(RuntimeError(f"Task error: File reconstruction error: {text}"), place)
        assert type(found) is kind and "model.safetensors" in str(found)
    assert (
        understand(RuntimeError("Cannot send a request, as the client has been closed"), place)
        is None
    )


# -- ends in the middle -----------------------------------------------------------------------


@pytest.fixture
def slow(world: World, commit: str) -> Iterator[subprocess.Popen[str]]:
    """A fetch in a process of its own, in the middle of its weights."""
    fault = Fault(where="xorb", bytes_per_s=200_000)
    world.server.faults.add(fault)
    process = world.start(*world.fetch_arguments(commit))
    try:
        until(lambda: asked(world, "/xorbs/"))
        yield process
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_it_promptly(world: World, commit: str, slow: subprocess.Popen[str]) -> None:
    slow.send_signal(signal.SIGTERM)
    started = time.monotonic()
    out, err = slow.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert (slow.returncode, err) == (1, "")
    last = json.loads(out.splitlines()[-1])
    assert last["event"] == "error" and last["error"] == "Interrupted"
    assert not world.published(commit)
    world.server.faults.clear()
    world.fetch(commit)
    assert world.published(commit) == FILES and world.left_over() == []


def test_after_a_kill_the_next_fetch_is_whole(
    world: World, commit: str, slow: subprocess.Popen[str]
) -> None:
    slow.kill()
    slow.wait(30)
    assert not world.published(commit)
    world.server.faults.clear()
    world.fetch(commit)
    assert world.published(commit) == FILES and world.left_over() == []


def test_a_home_that_can_not_be_written_is_named(world: World, commit: str) -> None:
    process = world.start(*world.fetch_arguments(commit), HF_HOME="/proc/no-home")
    out, _ = process.communicate(timeout=120)
    last = json.loads(out.splitlines()[-1])
    assert (process.returncode, last["error"]) == (2, "UsageError")
    assert "HF_HOME" in last["next"] and "os error" in last["message"]


# -- the client's settings --------------------------------------------------------------------


def test_the_clients_settings_are_those_that_this_version_knows() -> None:
    code = (
        "import json, weights, hf_xet; c = hf_xet.XetConfig(); print(json.dumps({k: str(c.get(k)) "
        "for k in ('reconstruction.download_buffer_size', 'reconstruction.download_buffer_limit',"
        " 'client.read_timeout', 'client.retry_max_duration', 'telemetry.enabled',"
        " 'chunk_cache.size_bytes')}))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert json.loads(out.stdout) == {
        "reconstruction.download_buffer_size": "160000000",
        "reconstruction.download_buffer_limit": "160000000",
        "client.read_timeout": "0:00:30",
        "client.retry_max_duration": "0:00:20",
        "telemetry.enabled": "False",
        "chunk_cache.size_bytes": "0",
    }
