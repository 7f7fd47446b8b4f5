"""A sandbox on this machine: namespaces with a node's folders and network, and programs in it.

`Sandbox.start` makes it by way of a keeper (see keeper.py), which removes it without a trace when
`stop` is called or this process ends, however it ends.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.kubernetes import cgroups
from lab.kubernetes.keeper import READY_DEADLINE_S, KeeperConfig

MARKER = "vllm-promotion-lab"
ROOT = Path(__file__).parents[2]  # of the repository: where `python -m lab…` finds its modules
STOP_DEADLINE_S = 60.0
COMMAND_DEADLINE_S = 60.0
LOG_LINES = 15


class LabError(Exception):
    """The lab can't start or go on; the message says what, why and what to do."""


@dataclass(frozen=True)
class Program:
    """A program that runs in the sandbox, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The last lines of its log, indented."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        except OSError as error:
            lines = [str(error)]
        return "\n".join("    " + line[:400] for line in lines) or "    (no output)"

    def kill(self) -> None:
        """Ends it at once. (The process that we know waits for it outside of the sandbox.)"""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait(timeout=COMMAND_DEADLINE_S)


def lock_name(name: str) -> str:
    """The abstract Unix socket that a running lab of that name holds; it ends with its holder."""
    return f"\0{MARKER}-{os.getuid()}-{name}"


def hold_name(name: str) -> socket.socket:
    """Takes the lab's name. Raises LabError if another lab has it."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(lock_name(name))
    except OSError as error:
        lock.close()
        raise LabError(
            f"a lab named {name!r} is running already (`python -m lab status`): end it, or give "
            "this one another name (`make lab LAB=second`, or --name second)"
        ) from error
    return lock


def is_running(name: str) -> bool:
    """Whether a lab of that name runs under this user. (Asks without taking the name.)"""
    shown = lock_name(name).replace("\0", "@")
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.rpartition(" ")[2] == shown for line in lines)


def make_state(state: Path) -> None:
    """Makes the lab's folder, after removing what a lab that was killed with its keeper left there.

    Raises LabError if the folder holds something else.
    """
    if state.exists():
        if not (state / MARKER).exists():
            raise LabError(
                f"the folder {state} is in use by something that is not a lab: remove it, or give "
                "the lab another name (`make lab LAB=second`, or --name second)"
            )
        remove_folder(state)
    try:
        state.mkdir(parents=True, mode=0o700)
        (state / MARKER).touch()
        (state / "log").mkdir()
    except OSError as error:
        raise LabError(f"can't make the lab's folder {state}: {error.strerror}") from error


def cgroup_of(name: str) -> str:
    """The control group of the sandbox of that name."""
    return f"{MARKER}-{name}"


def clear(state: Path, cgroup: str) -> None:
    """Removes what a sandbox left whose processes have ended and whose keeper was killed."""
    cgroups.remove(cgroup)
    remove_folder(state)


def remove_folder(state: Path) -> None:
    """Removes a sandbox's folder, without going into anything that is mounted there."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(state)], check=False, timeout=120)


@dataclass
class Sandbox:
    """A running sandbox: `init` is the pid of its first process, `cgroup` its own control group."""

    state: Path
    cgroup: str
    init: int
    programs: list[Program] = field(default_factory=list)
    _keeper: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        name: str,
        state: Path,
        relay: Mapping[socket.socket, str],
    ) -> "Sandbox":
        """Makes state folder, cgroups, namespaces and the relay from the listening sockets to
        addresses (host:port) inside. Takes the sockets over. Raises LabError."""
        cgroup = cgroup_of(name)
        lock = hold_name(name)
        try:
            make_state(state)
            config = KeeperConfig(
                state=str(state),
                cgroup=cgroup,
                relay={str(listening.fileno()): to for listening, to in relay.items()},
                lock=lock.fileno(),
            )
            with (state / "log" / "keeper.log").open("wb") as log:
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "lab.kubernetes.keeper", config.to_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
                    start_new_session=True,
                    pass_fds=[lock.fileno(), *(listening.fileno() for listening in relay)],
                )
        finally:
            lock.close()
            for listening in relay:
                listening.close()
        sandbox = cls(state, cgroup, 0, _keeper=keeper)
        try:
            sandbox.init = _read_answer(keeper)
        except BaseException:
            sandbox.stop()
            raise
        return sandbox

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs argv inside, in the folder /."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-p", "-n", "-u", "-i", "--wd=/", "--"]
        return [*enter, *argv]

    def spawn(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Program:
        """Starts a program of the lab, its output in STATE/log/<name>.log."""
        log = self.state / "log" / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.command(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment() | dict(env or {}),
                start_new_session=True,  # Ctrl-C in the terminal is for the lab, not for its parts
            )
        program = Program(name, process, log)
        self.programs.append(program)
        return program

    def run(self, argv: Sequence[str], *, timeout_s: float) -> str:
        """Runs a command to its end inside; returns its output. Raises LabError."""
        try:
            done = subprocess.run(
                self.command(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=environment(),
                start_new_session=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"`{' '.join(argv)}` took more than {timeout_s:.0f} s") from error
        if done.returncode:
            raise LabError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout}")
        return done.stdout

    def wait_for(self, argv: Sequence[str], what: str, check: Callable[[], None]) -> None:
        """Runs a command inside until it succeeds. `check` may raise meanwhile. Raises LabError."""
        end = time.monotonic() + COMMAND_DEADLINE_S
        while True:
            check()
            try:
                self.run(argv, timeout_s=COMMAND_DEADLINE_S)
                return
            except LabError as error:
                if time.monotonic() > end:
                    raise LabError(f"{what} did not come up: {error}") from error
            time.sleep(0.1)

    def check(self) -> None:
        """Raises LabError if a program has ended, with the end of its log."""
        for program in self.programs:
            status = program.process.poll()
            if status is not None:
                raise LabError(f"{program.name} ended with status {status}:\n{program.tail()}")
        if self._keeper is not None and self._keeper.poll() is not None:
            raise LabError("the sandbox has ended: its keeper was killed")

    def stop(self) -> None:
        """Ends the sandbox and waits until no trace of it is left. Raises LabError."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.close()
        try:
            keeper.wait(timeout=STOP_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"the lab did not end within {STOP_DEADLINE_S:.0f} s: look at process {keeper.pid} "
                f"and {self.state}"
            ) from error
        finally:
            keeper.stdout.close()
            for program in self.programs:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.process.wait(timeout=5)
        if self.state.exists():  # the keeper was killed before it could clean up
            clear(self.state, self.cgroup)


def environment() -> dict[str, str]:
    """What every program in the sandbox gets: no setting of the caller's but the path."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/run", "TMPDIR": "/run/tmp", "LANG": "C.UTF-8"}


def _read_answer(keeper: subprocess.Popen[bytes]) -> int:
    """The pid that the keeper prints. Raises LabError with what it says instead."""
    assert keeper.stdout is not None
    end = time.monotonic() + READY_DEADLINE_S + 5
    while not select.select([keeper.stdout], [], [], 0.2)[0]:
        if time.monotonic() > end:
            raise LabError("the sandbox did not start in time")
    answer = json.loads(keeper.stdout.readline() or '{"error": "the keeper of the sandbox died"}')
    if "error" in answer:
        raise LabError(str(answer["error"]))
    return int(answer["init"])
