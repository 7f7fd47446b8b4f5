"""What a machine must have for a lab, checked before anything starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lab.kubernetes.sandbox import LabError

FREE_BYTES = 3 << 30
TOOLS = ("unshare", "nsenter", "ip", "containerd", "ctr", "runc", "nft", "iptables", "conntrack")
WAY_OUT = (
    "Or use any cluster that you have: set KUBECONFIG (`kind create cluster` will do) and skip "
    "the lab."
)


def check(state: Path) -> None:
    """Raises LabError with everything that is missing, in one message."""
    missing = problems(state)
    if missing:
        lines = "\n".join(f"  - {line}" for line in missing)
        raise LabError(f"the lab can't run here:\n{lines}\n{WAY_OUT}")


def problems(state: Path) -> list[str]:
    """One line for each thing that is missing, with what to do."""
    if sys.platform != "linux":
        return [f"it needs Linux, this is {sys.platform}"]
    found = []
    if os.getuid() != 0:
        found.append("it needs root (namespaces, mounts, cgroups): run it with sudo")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        found.append(f"not installed: {', '.join(absent)}; run `python -m lab build`")
    elif os.getuid() == 0:
        argv = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "true"]
        trial = subprocess.run(argv, capture_output=True, text=True, timeout=10)
        if trial.returncode:
            found.append(f"no namespaces may be made here ({trial.stderr.strip()})")
    if "overlay" not in Path("/proc/filesystems").read_text():
        found.append("the kernel has no overlay file system: run `modprobe overlay`")
    free = shutil.disk_usage(_existing(state)).free
    if free < FREE_BYTES:
        found.append(
            f"{free >> 20} MiB are free in {_existing(state)}, {FREE_BYTES >> 20} are needed: make "
            "room, or set XDG_CACHE_HOME to a folder on another disk"
        )
    return found


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
