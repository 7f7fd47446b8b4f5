"""The demo's story: told as it goes, and an exit status that says whether it went so.

Its commands are real processes; `dagster` and `kubectl` are scripts here (the real ones are
tests/e2e's).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import demo
from lab.demo import Act, DemoFailed, Run
from lab.lab import QUIET_DAGSTER, Lab

LIVE = Act("the first revision", "v1", live=True)
REFUSED = Act("a slow revision", "v2-slow", live=False, gate="ttft_benchmark")


def stage(name: str, outcome: str = "passed") -> dict[str, Any]:
    return {"stage": name, "seconds": 1.25, "outcome": outcome, "decided_by": f"why {name}"}


BEFORE = [stage("gpu_nodes"), stage("gpu_smoke_test")]
GOOD = [*BEFORE, stage("ttft_benchmark"), stage("promoted_model")]
SLOW = [*BEFORE, stage("ttft_benchmark", "refused")]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").write_text("first line\nthe reason\n")
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("act", "status", "stages"), [(LIVE, 0, GOOD), (REFUSED, 1, SLOW)], ids=["live", "refused"]
)
def test_a_right_ending_is_accepted(
    log: Path, act: Act, status: int, stages: list[dict[str, Any]]
) -> None:
    demo.check(act, Run(status, "c0ffee", stages, log))


@pytest.mark.parametrize(
    ("act", "status", "stages", "ended"),
    [
        (LIVE, 1, GOOD, "promoted_model: passed, exit status 1"),
        (LIVE, 0, BEFORE, "gpu_smoke_test: passed, exit status 0"),
        (LIVE, 1, SLOW, "ttft_benchmark: refused, exit status 1"),
        (LIVE, 1, [], "nothing: ran, exit status 1"),
        (REFUSED, 0, GOOD, "promoted_model: passed, exit status 0"),
        (REFUSED, 0, SLOW, "ttft_benchmark: refused, exit status 0"),
        (REFUSED, 1, [*BEFORE, stage("ttft_benchmark", "failed")], "ttft_benchmark: failed"),
        (REFUSED, 1, [stage("gpu_smoke_test", "refused")], "gpu_smoke_test: refused"),
        (REFUSED, 1, [], "nothing: ran, exit status 1"),
    ],
)
def test_a_wrong_ending_is_refused_with_the_end_of_its_log(
    log: Path, act: Act, status: int, stages: list[dict[str, Any]], ended: str
) -> None:
    with pytest.raises(DemoFailed) as error:
        demo.check(act, Run(status, "c0ffee", stages, log))
    assert ended in str(error.value)
    assert "| the reason" in str(error.value)


def test_stages_are_printed_as_they_come(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "stages.jsonl"
    file.parent.mkdir()
    process = subprocess.Popen(["sleep", "30"])
    told: list[dict[str, Any]] = []
    follower = threading.Thread(
        target=lambda: told.extend(demo.follow(process, lambda: {file.parent}, log))
    )
    follower.start()
    printed = ""

    def await_printed(text: str) -> None:
        nonlocal printed
        deadline = time.monotonic() + 10
        while text not in printed:
            assert time.monotonic() < deadline, printed
            printed += capsys.readouterr().out
            time.sleep(0.05)

    try:
        for line in SLOW:
            assert str(line["decided_by"]) not in printed
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            await_printed(str(line["decided_by"]))  # the run goes on meanwhile
        assert process.poll() is None
    finally:
        process.kill()
        follower.join(10)
    assert told == SLOW
    printed += capsys.readouterr().out
    assert [printed.count(str(line["decided_by"])) for line in SLOW] == [1, 1, 1]
    assert "1.2" in printed


def test_a_run_without_end_is_given_up(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROMOTION_SECONDS", 0.5)
    with subprocess.Popen(["sleep", "30"]) as process:
        try:
            with pytest.raises(DemoFailed, match=r"(?s)not ended after 0.5 s.*the reason"):
                demo.follow(process, set, log)
        finally:
            process.kill()


# The whole program

DAGSTER = """#!{python}
import json, os, sys, yaml
from pathlib import Path
config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
revision = config["ops"]["model_revision"]["config"]["revision"]
plan = json.loads((Path(__file__).parent / "plan.json").read_text())[revision]
folder = Path(os.environ["DAGSTER_HOME"]) / "reports" / "smollm2-135m" / f"run-{{revision}}"
folder.mkdir(parents=True)
(folder / "stages.jsonl").write_text("".join(json.dumps(s) + "\\n" for s in plan["stages"]))
(folder / "model_revision.json").write_text(json.dumps({{"commit": plan["commit"]}}))
if plan["live"]:
    (Path(__file__).parent / "live").write_text(plan["commit"])
print("the reason")
sys.exit(plan["status"])
"""

KUBECTL = """#!{python}
import json, sys
from pathlib import Path
here = Path(__file__).parent
said = " ".join(sys.argv)
if " service/" in said:
    print("blue" if (here / "live").exists() else "", end="")
elif " deployment/" in said:
    print((here / "live").read_text(), end="")
elif " pod " in said and " get " in said:
    print("Running", end="")
elif " logs " in said:
    print((here / "client.jsonl").read_text())
elif " apply " in said:
    sys.stdin.read()
"""

ONE = "1" * 40
THREE = "3" * 40
SUMMARY = {
    "event": "summary",
    "requests": 100,
    "failures": 0,
    "resent": 1,
    "revisions": {ONE: 60, THREE: 40},
}


class Stage:
    """Where the demo is played: what each revision's run does, what the client saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = {
            "v1": {"stages": GOOD, "status": 0, "live": True, "commit": ONE},
            "v2-slow": {"stages": SLOW, "status": 1, "live": False, "commit": "2" * 40},
            "v3": {"stages": GOOD, "status": 0, "live": True, "commit": THREE},
        }
        self.summary: dict[str, Any] = dict(SUMMARY)

    def play(self) -> int:
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        lines = [{"event": "second", "requests": 5}, self.summary]
        (self.folder / "client.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return demo.main([])


@pytest.fixture
def theatre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("dagster", DAGSTER), ("kubectl", KUBECTL)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)
    lab = Lab(
        name="none", engine="simulator", gpus=3, state=tmp_path, kubeconfig=tmp_path / "admin",
        promoter_kubeconfig=tmp_path / "promoter", kubectl=programs / "kubectl", prometheus="",
        hub="", pid=0,
    )  # fmt: skip

    @contextmanager
    def a_lab(name: str, engine: str) -> Iterator[Lab]:
        yield lab

    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "HOME", tmp_path / ".demo")
    monkeypatch.setattr(demo, "a_lab", a_lab)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Stage(programs)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_story_as_it_should_go(theatre: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert theatre.play() == 0
    out = capsys.readouterr().out
    assert "demo: as planned" in out
    assert "100 requests meanwhile, 0 failures" in out
    assert out.count("why ttft_benchmark") == 3
    assert [out.count(f"live now: {ONE[:12]}"), out.count(f"live now: {THREE[:12]}")] == [2, 1]


@pytest.mark.parametrize(
    ("revision", "changes", "said"),
    [
        ("v1", {"status": 1}, "the first revision should be live"),
        ("v2-slow", {"status": 0, "stages": GOOD}, "should be refused by ttft_benchmark"),
        ("v2-slow", {"live": True}, f"{ONE[:12]} should be live now, but {'2' * 12} is"),
        ("v3", {"live": False}, f"{THREE[:12]} should be live now, but {ONE[:12]} is"),
    ],
)
def test_the_story_goes_wrong(
    theatre: Stage,
    capsys: pytest.CaptureFixture[str],
    revision: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    theatre.plan[revision] |= changes
    assert theatre.play() == 1
    printed = capsys.readouterr()
    assert "demo: FAILED: " in printed.err
    assert said in printed.err
    assert "as planned" not in printed.out


@pytest.mark.parametrize("change", [{"failures": 1}, {"requests": 0}])
def test_requests_that_failed_fail_the_demo(
    theatre: Stage, capsys: pytest.CaptureFixture[str], change: dict[str, int]
) -> None:
    theatre.summary |= change
    assert theatre.play() == 1
    assert "the client's requests failed" in capsys.readouterr().err


def test_dagster_does_not_advise_another_program_at_each_command(tmp_path: Path) -> None:
    """Where it no longer does of its own accord, the filter can go."""
    command = [str(Path(sys.executable).with_name("dagster")), "job", "execute", "-m", "nowhere"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}

    def said(**environment: str) -> str:
        home = {"DAGSTER_HOME": str(tmp_path)}
        done = subprocess.run(
            command, env=clean | home | environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    assert "SupersessionWarning" in said()
    assert "SupersessionWarning" not in said(PYTHONWARNINGS=QUIET_DAGSTER)
