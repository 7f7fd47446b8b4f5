"""What a sandbox could leave behind on the machine, and whether it did."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lab.kubernetes import cgroups

NAMESPACES = ("mnt", "pid", "net", "uts", "ipc")


@dataclass(frozen=True)
class Traces:
    """Of one sandbox: its namespaces, its folder and cgroup, and the machine's packet filter."""

    namespaces: frozenset[str]
    state: Path
    cgroup: str
    rules: str

    @classmethod
    def of(cls, init: int, state: Path, cgroup: str) -> "Traces":
        """Of the running sandbox whose first process is `init`."""
        own = frozenset(namespace(init, kind) for kind in NAMESPACES)
        shared = {namespace("self", kind) for kind in NAMESPACES}
        assert not own & shared, "the sandbox shares a namespace with the machine"
        return cls(own, state, cgroup, rules())

    def left(self) -> list[str]:
        """A line for each trace that is there."""
        found = self.processes()
        mounts = Path("/proc/self/mountinfo").read_text()
        found += [f"mount: {line}" for line in mounts.splitlines() if str(self.state) in line]
        folders = [root / self.cgroup for root in cgroups.hierarchies()]
        found += [f"cgroup: {folder}" for folder in folders if folder.exists()]
        if self.state.exists():
            found.append(f"folder: {self.state}")
        if rules() != self.rules:
            found.append("rules of the packet filter differ")
        return found

    def processes(self) -> list[str]:
        """Those in one of the namespaces (which live as long as one), or about the folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                inside = {namespace(process.name, kind) for kind in NAMESPACES}
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            about = str(self.state) in words and "-m lab.kubernetes" in words
            if inside & self.namespaces or about:
                found.append(f"process {process.name}: {words}")
        return found

    def wait_until_gone(self, seconds: float) -> None:
        """Fails with what is left at the deadline."""
        end = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < end, "\n".join(left)
            time.sleep(0.05)

    def wait_until_no_process(self, seconds: float) -> None:
        """Fails with the processes that are left at the deadline."""
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, "\n".join(left)
            time.sleep(0.05)


def namespace(pid: int | str, kind: str) -> str:
    """The name of a process's namespace of that kind. Raises OSError."""
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def rules() -> str:
    """The machine's own packet filter rules, without counters."""
    done = subprocess.run(
        ["nft", "--stateless", "list", "ruleset"], capture_output=True, text=True, timeout=30
    )
    return done.stdout
