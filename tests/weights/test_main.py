"""The program as the Job runs it: a process, JSON events, exit statuses, signals."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lab.hub import Fault
from tests.weights.conftest import REPO, World, model, tensors

CANARY = "hf_CANARY"


def finish(process: subprocess.Popen[str], status: int) -> list[dict[str, Any]]:
    """The events of a process that must end with `status`."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert "Traceback" not in err, err
    return [json.loads(line) for line in out.splitlines()]


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.01)


def slow_world(world: World) -> tuple[str, dict[str, bytes]]:
    """Six quick files and one that takes long, so that there is a middle to be killed in."""
    files = model() | {f"{i}.safetensors": tensors(f"t{i}") for i in range(3)}
    files["slow.safetensors"] = tensors("slow", size=3_000_000)
    world.server.faults.add(Fault(path="slow.safetensors", where="get", bytes_per_s=100_000))
    return world.commit(files), files


def in_the_middle(world: World, commit: str, files: dict[str, bytes]) -> bool:
    staging = world.root / REPO / f".staging-{commit}"
    return len(list(staging.glob("*"))) == len(files) - 1


def test_resolve_fetch_verify_list(world: World) -> None:
    commit = world.commit(model())
    [resolved] = finish(world.start("resolve", "--repo", REPO, "--revision", "main"), 0)
    assert resolved == {"event": "result", "repo": REPO, "revision": "main", "commit": commit}
    *progress, result = finish(world.start(*world.fetch_arguments(commit), "--chat"), 0)
    assert progress[-1]["percent"] == 100.0 and progress[-1]["bytes"] == result["bytes"]
    assert {"path", "commit", "files", "bytes", "manifest_digest", "read_bytes_per_s"} < set(result)
    assert result["hit"] is False and Path(result["path"]).is_dir()
    place = ("--repo", REPO, "--commit", commit, "--root", str(world.root))
    [verified] = finish(world.start("verify", *place), 0)
    assert verified["manifest_digest"] == result["manifest_digest"]
    listed = finish(world.start("list", "--root", str(world.root)), 0)[-1]
    assert [row["commit"] for row in listed["published"]] == [commit]
    (Path(result["path"]) / "config.json").write_bytes(b"?" * len(model()["config.json"]))
    [error] = finish(world.start("verify", *place), 1)
    assert error["error"] == "Damaged" and "config.json has git-sha1:" in error["message"]


def test_an_error_is_one_event_with_the_next_step_and_status_1(world: World) -> None:
    world.commit(model())
    [error] = finish(world.start("resolve", "--repo", REPO, "--revision", "nope"), 1)
    assert error["event"] == "error" and error["error"] == "RevisionNotFound"
    assert error["next"] and error["repo"] == REPO


A = "a" * 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resolve", "--revision", "main", "--attempts", "0"), "--attempts 0 "),
        (("resolve", "--revision", "main", "--stall-seconds", "-1"), "--stall-seconds -1 "),
        (("resolve", "--revision", "main", "--stall-seconds", "nan"), "--stall-seconds nan "),
        (("resolve", "--revision", "main", "--stall-seconds", "inf"), "--stall-seconds inf "),
        (("resolve", "--revision", " "), "the revision is empty"),
        (("resolve", "--repo", "ab", "--revision", "main"), "'ab' is no repository"),
        (("fetch", "--repo", "ab", "--commit", A), "'ab' is no repository"),
        (("fetch", "--commit", A, "--rehash-after-days", "-3"), "--rehash-after-days -3 "),
        (("fetch", "--commit", A, "--rehash-after-days", "nan"), "--rehash-after-days nan "),
        (("fetch", "--commit", A, "--attempts", "-1"), "--attempts -1 "),
        (("import", "--from", "-", "--stall-seconds", "0"), "--stall-seconds 0 "),
    ],
)
def test_words_that_can_not_be(world: World, arguments: tuple[str, ...], message: str) -> None:
    repo = [] if {"import", "--repo"} & {*arguments} else ["--repo", REPO]
    root = [] if arguments[0] == "resolve" else ["--root", str(world.root)]
    [error] = finish(world.start(*arguments, *repo, *root), 2)
    assert error["error"] == "UsageError" and error["message"].startswith(message)
    assert error["next"] and not world.server.requests


@pytest.mark.parametrize(
    ("command", "more"),
    [("fetch", ()), ("verify", ()), ("pack", ("--out", "x.tar")), ("list", ())],
)
def test_a_volume_that_is_not_there(world: World, command: str, more: tuple[str, ...]) -> None:
    place = () if command == "list" else ("--repo", REPO, "--commit", A)
    nowhere = str(world.root / "nowhere")
    [error] = finish(world.start(command, *place, "--root", nowhere, *more), 1)
    assert error["message"] == f"{nowhere} is no folder" and "correct --root" in error["next"]


def test_what_is_not_published_says_how_to_fetch_it(world: World) -> None:
    place = ("--repo", REPO, "--commit", A, "--root", str(world.root))
    [error] = finish(world.start("verify", *place), 1)
    assert error["error"] == "NotPublished"
    assert f"python -m weights fetch {' '.join(place)}" in error["next"]


def test_the_list_of_what_is_no_volume_is_short(world: World) -> None:
    for number in range(100):
        (world.root / f"file{number:03}").touch()
    *said, result = finish(world.start("list", "--root", str(world.root)), 0)
    assert len(result["foreign"]) == 20 and result["foreign_not_shown"] == 80
    assert "is it the volume?" in said[0]["message"]


def test_who_reads_no_further_sees_no_trace(world: World) -> None:
    """As in `python -m weights … | head -1`."""
    commit = world.commit(model())
    process = world.start(*world.fetch_arguments(commit))
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


@pytest.mark.parametrize("command", ["fetch", "list", "resolve"])
def test_a_full_disk_is_one_line(world: World, command: str) -> None:
    commit = world.commit(model())
    arguments = {
        "fetch": (*world.fetch_arguments(commit), "--ignore", "*"),
        "list": ("list", "--root", str(world.root)),
        "resolve": ("resolve", "--repo", REPO, "--revision", "nope"),
    }[command]
    process = world.start(*arguments, under=("sh", "-c", 'exec "$@" > /dev/full', "sh"))
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert said.count("\n") == 1
    assert said.startswith("can't write what this program says: No space left on device")
    reason = {"fetch": "the patterns leave none", "list": "", "resolve": "no branch, tag or commit"}
    assert reason[command] in said, "the error that it had to say is not lost"


def test_a_revision_that_is_not_there_is_told_with_those_that_are(world: World) -> None:
    commit = world.commit(model())
    for number in range(30):
        world.server.hub.tag(REPO, f"v{number}-slow", commit)
    [error] = finish(world.start("resolve", "--repo", REPO, "--revision", "v2-slo"), 1)
    assert error["error"] == "RevisionNotFound"
    named, more = error["message"].split("its branches and tags: ")[1].split(", and ")
    assert named.split(", ")[0] == "v2-slow" and len(named.split(", ")) == 10
    assert more == "21 more"


def test_the_names_are_left_out_where_the_hub_does_not_give_them(world: World) -> None:
    world.commit(model())
    world.server.faults.add(Fault(where="api", after=1, status=500))
    [error] = finish(world.start("resolve", "--repo", REPO, "--revision", "nope"), 1)
    assert error["error"] == "RevisionNotFound" and "branches and tags" not in error["message"]


def test_the_token_is_in_no_output(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(where="get", status=500, body=f"you sent {CANARY}"))
    endpoint = world.server.url.replace("://", f"://user:{CANARY}@")
    process = world.start(
        *world.fetch_arguments(commit), "--attempts", "1", HF_ENDPOINT=endpoint, HF_TOKEN=CANARY
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and '"error": ' in out
    assert CANARY not in out + err


def test_killed_in_the_middle_the_next_fetch_keeps_what_was_finished(world: World) -> None:
    commit, files = slow_world(world)
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: in_the_middle(world, commit, files))
    process.kill()
    process.wait()
    assert not world.published(commit)
    world.server.faults.clear()
    finish(world.start(*world.fetch_arguments(commit)), 0)
    assert world.published(commit) == files and world.left_over() == []
    finished = [name for name in files if name != "slow.safetensors"]
    assert [name for name in finished if world.gets(name) != 1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_error_event_at_once_and_staging_is_kept(
    world: World, number: signal.Signals
) -> None:
    commit, files = slow_world(world)
    process = world.start(*world.fetch_arguments(commit))
    wait_until(lambda: in_the_middle(world, commit, files))
    started = time.monotonic()
    os.kill(process.pid, number)
    *_, error = finish(process, 1)
    assert time.monotonic() - started < 10  # it would go on for 30 s
    assert error["error"] == "Interrupted" and number.name in error["message"]
    assert not world.published(commit)
    assert world.left_over() == [f".staging-{commit}"]


def test_two_processes_at_once_end_whole(world: World) -> None:
    files = model() | {f"{i}.safetensors": tensors(f"t{i}", size=100_000) for i in range(6)}
    commit = world.commit(files)
    world.server.faults.add(Fault(where="get", bytes_per_s=2_000_000))
    both = [world.start(*world.fetch_arguments(commit)) for _ in range(2)]
    for process in both:
        finish(process, 0)
    assert world.published(commit) == files and world.left_over() == []


def test_a_port_that_is_none_is_one_message(world: World) -> None:
    process = world.start(
        "resolve", "--repo", REPO, "--revision", "main", HF_ENDPOINT="http://127.0.0.1:99999"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == "HF_ENDPOINT is 'http://127.0.0.1:99999': its port is none\n"
