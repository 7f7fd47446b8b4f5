"""The system packages that the lab needs, from Debian's or Ubuntu's archive, and what else a
machine must have. Nothing is installed that is there already, whoever put it there."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lab import programs
from lab.programs import Progress
from lab.programs.errors import SetupError

WAY_OUT = (
    "Or use a cluster that you have: set KUBECONFIG (any cluster will do, `kind create cluster` "
    "too) and skip the lab; the README says how."
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES: Mapping[str, str] = {  # command: the package that has it
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "unshare": "util-linux",
    "mount": "mount",
    "busybox": "busybox-static",
}
MACHINES = ("x86_64", "aarch64")
CNI_PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
CNI_PACKAGE = "containernetworking-plugins"

POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = """\
#!/bin/sh
# Made by the set-up of vllm-promotion-pipeline while it installs packages: no service is started.
exit 101
"""
_NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc", "--fork")


def missing() -> list[str]:
    """The packages that are still to be installed."""
    packages = {name for tool, name in PACKAGES.items() if not shutil.which(tool, path=PATH)}
    if not any((folder / "ptp").exists() for folder in CNI_PLUGIN_FOLDERS):
        packages.add(CNI_PACKAGE)
    return sorted(packages)


def check() -> None:
    """Raises SetupError that names everything this machine lacks, and the way out."""
    found = problems()
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise SetupError(f"the lab can't be set up here:\n{lines}\n{WAY_OUT}")


def problems() -> list[str]:
    """One line for each thing that the set-up can't provide itself."""
    if sys.platform != "linux":
        return [f"it needs Linux, and this is {sys.platform}"]
    found = []
    if platform.machine() not in MACHINES:
        found.append(f"its images are for {' and '.join(MACHINES)}, not for {platform.machine()}")
    is_root = os.geteuid() == 0
    if not is_root:
        found.append("it needs root (namespaces, mounts, cgroups): run it with sudo")
    if missing() and not shutil.which("apt-get", path=PATH):
        found.append(
            f"not installed, and there is no apt-get to install them: {', '.join(missing())}"
        )
    if is_root and (refused := namespaces_refused()):
        found.append(f"no namespaces may be made here: {refused}")
    if "overlay" not in Path("/proc/filesystems").read_text():
        found.append("the kernel has no overlay file system: run `modprobe overlay`")
    if not programs.is_built() and (short := programs.disk_short()):
        found.append(short)
    return found


def namespaces_refused() -> str:
    """Why the kernel makes no namespaces for us; empty if it does."""
    unshare = shutil.which("unshare", path=PATH)
    if unshare is None:
        return ""  # it is installed with the packages
    trial = subprocess.run(
        [unshare, *_NAMESPACES, "true"], capture_output=True, text=True, timeout=10, check=False
    )
    return trial.stderr.strip() or "unshare failed" if trial.returncode else ""


def install(progress: Progress) -> None:
    """Install what is missing; instant when nothing is. Raises SetupError."""
    wanted = missing()
    if not wanted:
        return
    with programs.locked(programs.cache_folder() / "apt.lock", "installs packages", progress):
        wanted = missing()
        if not wanted:
            return
        progress(f"installing {', '.join(wanted)}, about 20 s")
        with _no_service_starts():
            if _apt("install", *wanted).returncode:  # perhaps no package lists yet, or old ones
                update = _apt("update")
                done = _apt("install", *wanted)
                if done.returncode:
                    said = (done.stderr.strip() or update.stderr.strip()).splitlines()[-3:]
                    raise SetupError(
                        f"apt-get could not install {', '.join(wanted)}:\n  " + "\n  ".join(said)
                    )
        if left := missing():
            raise SetupError(f"installed, and still not on PATH: {', '.join(left)}")
        progress("system packages installed")


def _apt(command: str, *packages: str) -> subprocess.CompletedProcess[str]:
    options = ["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    try:
        return subprocess.run(
            ["apt-get", command, "-q", *(options if packages else []), *packages],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": PATH},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"apt-get {command} took over 15 minutes; try again.") from None


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian's way to keep packages from starting their services: the lab runs its own containerd.

    A policy of the machine's own is left as it is.
    """
    ours = not POLICY.exists() or POLICY.read_text() == _POLICY_TEXT  # left by a killed set-up
    if not ours:
        yield
        return
    try:
        POLICY.write_text(_POLICY_TEXT)
        POLICY.chmod(0o755)
        yield
    finally:
        POLICY.unlink(missing_ok=True)
