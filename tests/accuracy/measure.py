"""One measured run: server on one core, tool on another, and what the tool said against the log."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lab import model
from tests.accuracy.scenarios import Scenario
from tests.accuracy.score import Score, Truth, read_truth, score, settled
from tests.accuracy.tools import OURS, TOOLS, Load, environment, said

ROOT = Path(__file__).parents[2]
CLIENT_CORE, SERVER_CORE = "0", "1"
PRIORITY = "10"
RUN_SECONDS = 240.0

Beside = Callable[[int], AbstractContextManager[None]]


class MeasureError(Exception):
    """A run can't be measured; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """What came of it. `verdict` and `reason`: of this project's runs only."""

    score: Score
    truths: Sequence[Truth]
    cpu_seconds: float
    server_cpu_seconds: float
    verdict: str = ""
    reason: str = ""


def measure(
    tool: str,
    scenario: Scenario,
    rate: float,
    seconds: float,
    seed: int,
    beside: Beside | None = None,
) -> Run:
    """Has `tool` offer `rate` for `seconds`, of which the first two don't count.

    `beside`, of the tool's process group, makes its life hard meanwhile. Raises MeasureError.
    """
    with tempfile.TemporaryDirectory(prefix="accuracy-") as name:
        folder = Path(name)
        with server(scenario, seed, folder / "truth.json") as port:
            load = Load(
                url=f"http://127.0.0.1:{port}",
                chat=scenario.chat,
                rate=rate,
                count=round(rate * seconds),
                seed=seed,
                tokenizer=model.checkpoint(print),
                folder=folder,
            )
            cpu = run(tool, TOOLS[tool].command(load), folder, RUN_SECONDS, beside)
        log = json.loads((folder / "truth.json").read_text())
        truths = read_truth(log)
        try:
            answers = list(TOOLS[tool].read(load))
        except (OSError, ValueError, KeyError) as error:
            raise MeasureError(f"{tool} left no result: {error!r}\n{printed(folder)}") from None
        counted = settled(truths)
        if tool == OURS:
            # Its warm-up is as long, by its own schedule; it may throw a window away.
            known = {answer.key for answer in answers}
            counted = [truth for truth in truths if truth.id in known]
        verdict, reason = said(load) if tool == OURS else ("", "")
        return Run(score(counted, answers), counted, cpu, log["cpu_seconds"], verdict, reason)


@contextmanager
def server(scenario: Scenario, seed: int, log: Path) -> Iterator[int]:
    """The reference server, at the port given; it writes its log when it ends."""
    command = [sys.executable, "-m", "tests.accuracy.server", "--scenario", scenario.name]
    with log.with_name("server-errors").open("w") as errors:
        process = subprocess.Popen(
            [*pinned(SERVER_CORE), *command, "--seed", str(seed), "--log", str(log)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise MeasureError(log.with_name("server-errors").read_text())
        yield int(line)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def run(
    tool: str, command: Sequence[str], folder: Path, most_s: float, beside: Beside | None = None
) -> float:
    """Runs a `command` of the tool to its end; CPU seconds of it and its children.

    Raises MeasureError after `most_s`.
    """
    alone = beside is None
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*pinned(CLIENT_CORE, alone), *command],
            cwd=ROOT if tool == OURS else folder,
            env=environment(tool),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ends = time.monotonic() + most_s
    try:
        with beside(process.pid) if beside else nullcontext():
            while time.monotonic() < ends:
                pid, _, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = 0
                    return usage.ru_utime + usage.ru_stime
                time.sleep(0.1)
        raise MeasureError(f"{tool} did not end within {most_s:g} s\n{printed(folder)}")
    finally:
        with suppress(ProcessLookupError):  # also what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            process.wait()


def printed(folder: Path) -> str:
    """The last of what a tool printed that ran in `folder`."""
    return (folder / "output").read_text(errors="replace")[-2000:]


@cache
def real_time() -> bool:
    """Whether this user may have programs run before all others."""
    return subprocess.run(["chrt", "--rr", PRIORITY, "true"], capture_output=True).returncode == 0


def pinned(core: str, alone: bool = True) -> list[str]:
    """Prefix of a command that is to run on `core`; `alone`: before what else runs there.

    The kernel lets other programs run for milliseconds before it wakes one. What is measured here
    is the tools, so all of them and the server get real-time priority where that may be asked for.
    """
    command = ["taskset", "-c", core]
    return [*command, "chrt", "--rr", PRIORITY] if alone and real_time() else command
