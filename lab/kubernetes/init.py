"""The first process of the sandbox: `python -m lab.kubernetes.init STATE`.

Runs in new mount, pid, network, uts and ipc namespaces, turns them into a node (folders, sysctls,
network), says so by the file STATE/ready and then only reaps orphans. When it dies the kernel kills
every process of the sandbox and takes mounts and network down with it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from lab.kubernetes.addresses import NODE, NODE_IP, NODE_PREFIX

MS_BIND, MS_REC, MS_SHARED = 4096, 16384, 1 << 20

# Paths that the kubelet and the container runtime write to and can't be talked out of.
PRIVATE = ("/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log")

# The kubelet sets these for the whole machine; it is shown the values that it wants instead.
SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def mount(
    source: str, target: str, fstype: str | None, flags: int, data: str | None = None
) -> None:
    """mount(2). Raises OSError with source and target."""
    encoded = [None if a is None else os.fsencode(a) for a in (source, target, fstype)]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source}: {os.strerror(number)}", target)


def make_private_folders(state: Path) -> None:
    """Binds folders of the state over PRIVATE; missing mount points are made in here only."""
    _shadow(Path("/var/lib"), state)  # before anything is shared, or it would shadow itself
    mount("none", "/", None, MS_REC | MS_SHARED)
    for path in PRIVATE:
        private = state / "node" / path.lstrip("/")
        private.mkdir(parents=True, exist_ok=True)
        Path(path).mkdir(exist_ok=True)
        mount(str(private), path, None, MS_BIND)
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    for folder in ("/run/netns", "/run/containerd", "/run/tmp"):
        Path(folder).mkdir()


def _shadow(folder: Path, state: Path) -> None:
    """Puts a tmpfs with the same entries over the folder, so that new entries stay in here."""
    aside = state / "node" / "shadow"
    aside.mkdir(parents=True)
    mount(str(folder), str(aside), None, MS_BIND | MS_REC)
    entries = list(aside.iterdir())
    mount("tmpfs", str(folder), "tmpfs", 0, "mode=755")
    for entry in entries:
        here = folder / entry.name
        if entry.is_symlink():
            here.symlink_to(entry.readlink())
        elif entry.is_dir():
            here.mkdir()
            mount(str(entry), str(here), None, MS_BIND | MS_REC)


def show_wanted_sysctls(state: Path) -> None:
    """Binds files with the wanted values over SYSCTLS: nothing changes on the machine."""
    folder = state / "node" / "sysctl"
    folder.mkdir()
    for name, value in SYSCTLS.items():
        target = Path("/proc/sys", name)
        if target.exists():
            file = folder / name.replace("/", ".")
            file.write_text(value + "\n")
            mount(str(file), str(target), None, MS_BIND)


def make_network() -> None:
    """The node's address and default route, on a veth pair with both ends in here."""
    commands = f"""\
link set lo up
link add node0 type veth peer name node0p
link set node0 up
link set node0p up
addr add {NODE_IP}/{NODE_PREFIX} dev node0
route add default dev node0
"""
    subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True, timeout=10)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def reap() -> None:
    """Waits for orphans, for ever."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            signal.sigwait([signal.SIGCHLD])


def main() -> None:
    """Prepares the sandbox and stays."""
    state = Path(sys.argv[1])
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    socket.sethostname(NODE)
    make_private_folders(state)
    show_wanted_sysctls(state)
    make_network()
    (state / "ready").touch()
    reap()


if __name__ == "__main__":
    main()
