"""The lab's keeper: starts the sandbox and the relay, and cleans up when its parent is gone.

`python -m lab.kubernetes.keeper CONFIG` (JSON: see `KeeperConfig`), started by `sandbox.Sandbox`.
Its stdin is a pipe whose other end only the parent holds: when that closes (the parent closed it,
ended or was killed), the keeper kills the sandbox, removes its cgroups and deletes its state. It
runs in a session of its own, so that what kills the parent's process group spares it, and should
it be killed itself, the kernel kills the sandbox (PR_SET_PDEATHSIG).
"""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.kubernetes import cgroups

PR_SET_PDEATHSIG = 1
NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
READY_DEADLINE_S = 60.0


@dataclass(frozen=True)
class KeeperConfig:
    """What the keeper is told: `relay` maps file descriptors of listening sockets to addresses
    inside the sandbox; `lock` is the descriptor of the socket that holds the lab's name."""

    state: str
    cgroup: str
    relay: dict[str, str]
    lock: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class KeeperError(Exception):
    """The sandbox can't be started; the message says why."""


def die_with_parent() -> None:
    """For preexec_fn of a process with one thread: SIGKILL for the child when we end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_sandbox(config: KeeperConfig) -> tuple[subprocess.Popen[bytes], int]:
    """Starts the sandbox; returns the process that waits for it, and its first process's pid."""
    state = Path(config.state)
    log = state / "log" / "sandbox.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-m", "lab.kubernetes.init", str(state)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=die_with_parent,  # safe: this process has one thread
        )
    end = time.monotonic() + READY_DEADLINE_S
    while not (state / "ready").exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            tail = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise KeeperError("the sandbox did not start: " + ("\n".join(tail) or "no output"))
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, int(children[0])


def start_relay(config: KeeperConfig, init: int) -> subprocess.Popen[bytes]:
    """Starts the relay between the given listening sockets and the sandbox's network."""
    with (Path(config.state) / "log" / "relay.log").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "lab.relay", f"/proc/{init}/ns/net"]
            + [f"{fd}={address}" for fd, address in config.relay.items()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=[int(fd) for fd in config.relay],
            preexec_fn=die_with_parent,  # safe: this process has one thread
        )


def wait_for_the_end(children: list[subprocess.Popen[bytes]]) -> None:
    """Until the parent's end of the pipe closes or a child ends."""
    fds = [os.pidfd_open(child.pid) for child in children]
    select.select([sys.stdin.fileno(), *fds], [], [])
    for fd in fds:
        os.close(fd)


def clean_up(
    config: KeeperConfig, children: list[subprocess.Popen[bytes]], init: int | None
) -> None:
    """Ends everything and removes every trace."""
    if init is not None:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(init, signal.SIGKILL)
    for child in children:
        child.kill()
        child.wait(timeout=30)
    cgroups.remove(config.cgroup)
    shutil.rmtree(config.state, ignore_errors=True)
    with suppress(OSError):  # another lab is in there
        Path(config.state).parent.rmdir()


def main() -> None:
    """Runs until the lab's end."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    config = KeeperConfig(**json.loads(sys.argv[1]))
    children: list[subprocess.Popen[bytes]] = []
    init: int | None = None
    try:
        cgroups.make(config.cgroup)
        sandbox, init = start_sandbox(config)
        children.append(sandbox)
        if config.relay:
            children.append(start_relay(config, init))
        print(json.dumps({"init": init}), flush=True)
        wait_for_the_end(children)
    except (KeeperError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
    finally:
        clean_up(config, children, init)


if __name__ == "__main__":
    main()
