"""The lab's own control group: made before the kubelet needs it, gone when the lab is.

The kubelet gets it as its `cgroupRoot`, so that everything that it and the container runtime make
lies below one folder a hierarchy. Works with cgroup v1 (a folder in each controller's hierarchy),
v2 (one folder) and both side by side.
"""

import os
import time
from pathlib import Path

# What the kubelet wants to find in its cgroupRoot on v2, as far as the kernel has it.
V2_CONTROLLERS = ("cpu", "cpuset", "memory", "hugetlb", "pids")


def hierarchies(mountinfo: str | None = None) -> list[Path]:
    """Mount points of every cgroup hierarchy of this machine (from /proc/self/mountinfo)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] in ("cgroup", "cgroup2"):
            found.append(Path(left.split(" ")[4]))
    return found


def make(name: str) -> None:
    """Makes the group `/name` in every hierarchy. Raises OSError."""
    for root in hierarchies():
        _pass_controllers_down(root)
        folder = root / name
        folder.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: empty in a new group, and then unusable
            if (root / file).exists() and not (folder / file).read_text().strip():
                (folder / file).write_text((root / file).read_text())


def _pass_controllers_down(root: Path) -> None:
    """On v2 a group has the controllers that its parent passes down."""
    available = root / "cgroup.controllers"
    if not available.exists():
        return
    have = set(available.read_text().split())
    passed = set((root / "cgroup.subtree_control").read_text().split())
    missing = [c for c in V2_CONTROLLERS if c in have and c not in passed]
    for controller in missing:
        try:
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            raise OSError(
                error.errno,
                f"{root} can't pass the controller {controller} down ({error.strerror}); in a "
                "container, start that with the machine's cgroup namespace (--cgroupns=host)",
            ) from error


def remove(name: str, *, deadline_s: float = 10) -> list[Path]:
    """Removes the group and all below it, waiting for its last processes to be gone.

    Returns the folders that are still there at the deadline (none, if all is well).
    """
    end = time.monotonic() + deadline_s
    while True:
        left = [folder for root in hierarchies() if not _rmdir(folder := root / name)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)


def _rmdir(folder: Path) -> bool:
    for path, folders, _ in os.walk(folder, topdown=False):
        for child in folders:
            _try_rmdir(Path(path) / child)
    _try_rmdir(folder)
    return not folder.exists()


def _try_rmdir(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # busy: a process in it is still dying
