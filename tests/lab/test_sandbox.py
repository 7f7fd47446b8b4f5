"""The sandbox: what it gives, and that nothing of it is left, however it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import relay
from lab.kubernetes import cgroups
from lab.kubernetes.addresses import NODE, NODE_IP
from lab.kubernetes.sandbox import MARKER, ROOT, LabError, Sandbox, hold_name, make_state
from tests.lab.traces import Traces

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def sandbox(name: str, tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox.start(name, tmp_path / name, {})
    yield made
    made.stop()


# A parent that starts a sandbox with a program and a relay in it, says so and waits to be killed.
PARENT = """
import sys, time
from pathlib import Path
from lab import relay
from lab.kubernetes.sandbox import Sandbox
sandbox = Sandbox.start(sys.argv[1], Path(sys.argv[2]), {relay.listen(0): "127.0.0.1:1"})
sandbox.spawn("sleeper", ["sleep", "1000"])
sandbox.run(["mkdir", "-p", f"/sys/fs/cgroup/memory/{sandbox.cgroup}/a/b"], timeout_s=10)
print(sandbox.init, sandbox._keeper.pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def parent(name: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    argv = [sys.executable, "-c", PARENT, name, str(tmp_path / name)]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    init, keeper = map(int, process.stdout.readline().split())
    yield process, init, keeper
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()


@needs_root
def test_has_a_network_of_its_own(sandbox: Sandbox) -> None:
    links = sandbox.run(["ip", "-o", "link"], timeout_s=10).splitlines()
    assert {line.split()[1].partition("@")[0].strip(":") for line in links} == {
        "lo",
        "node0",
        "node0p",
    }
    assert NODE_IP in sandbox.run(["ip", "-o", "-4", "addr"], timeout_s=10)
    assert sandbox.run(["hostname"], timeout_s=10).strip() == NODE


@needs_root
def test_writes_of_a_node_stay_inside(sandbox: Sandbox) -> None:
    outside = {folder: Path(folder).exists() for folder in ("/var/lib/kubelet", "/var/log/pods")}
    sandbox.run(["mkdir", "-p", "/var/lib/kubelet/x", "/var/log/pods/x", "/run/x"], timeout_s=10)
    assert {folder: Path(folder).exists() for folder in outside} == outside
    assert not Path("/run/x").exists()
    assert (sandbox.state / "node/var/lib/kubelet/x").is_dir()


@needs_root
def test_shows_sysctls_without_setting_them(sandbox: Sandbox) -> None:
    path = Path("/proc/sys/vm/overcommit_memory")
    before = path.read_text()
    assert sandbox.run(["cat", str(path)], timeout_s=10) == "1\n"
    sandbox.run(["sh", "-c", f"echo 2 > {path}"], timeout_s=10)
    assert path.read_text() == before


@needs_root
def test_still_sees_what_is_in_var_lib(sandbox: Sandbox) -> None:
    entries = {path.name for path in Path("/var/lib").iterdir()}
    seen = sandbox.run(["ls", "-A", "/var/lib"], timeout_s=10).split()
    assert entries - set(seen) == {e for e in entries if Path("/var/lib", e).is_file()}


@needs_root
def test_stop_leaves_nothing(name: str, tmp_path: Path) -> None:
    sandbox = Sandbox.start(name, tmp_path / name, {relay.listen(0): "127.0.0.1:1"})
    traces = Traces.of(sandbox.init, tmp_path / name, f"{MARKER}-{name}")
    sandbox.spawn("sleeper", ["sleep", "1000"])
    assert traces.left(), "the traces of a running sandbox are not seen: this test can't fail"
    began = time.monotonic()
    sandbox.stop()
    assert traces.left() == []
    assert time.monotonic() - began < 5


@needs_root
@pytest.mark.parametrize("victim", ["parent", "parent's group", "keeper and parent"])
def test_sigkill_leaves_nothing(
    victim: str,
    name: str,
    tmp_path: Path,
    parent: tuple[subprocess.Popen[str], int, int],
) -> None:
    process, init, keeper = parent
    traces = Traces.of(init, tmp_path / name, f"{MARKER}-{name}")
    if victim == "keeper and parent":
        # Both at once: the kernel ends the processes; the folders go when the name is used again.
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        traces.wait_until_no_process(10)
        Sandbox.start(name, tmp_path / name, {}).stop()
    elif victim == "parent":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    traces.wait_until_gone(10)


@needs_root
def test_keeper_killed_is_noticed_and_cleaned_up_after(name: str, tmp_path: Path) -> None:
    sandbox = Sandbox.start(name, tmp_path / name, {})
    traces = Traces.of(sandbox.init, tmp_path / name, f"{MARKER}-{name}")
    assert sandbox._keeper is not None
    sandbox._keeper.kill()
    sandbox._keeper.wait(timeout=10)
    with pytest.raises(LabError, match="keeper was killed"):
        sandbox.check()
    sandbox.stop()
    traces.wait_until_gone(10)


@needs_root
def test_two_side_by_side(tmp_path: Path) -> None:
    names = [f"test-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    one, two = (Sandbox.start(name, tmp_path / name, {}) for name in names)
    try:
        one.run(["sh", "-c", "echo one > /run/who"], timeout_s=10)
        two.run(["sh", "-c", "echo two > /run/who"], timeout_s=10)
        traces = Traces.of(one.init, one.state, one.cgroup)
        one.stop()
        assert traces.left() == []
        assert two.run(["cat", "/run/who"], timeout_s=10) == "two\n"
        assert two.run(["hostname"], timeout_s=10).strip() == NODE
    finally:
        one.stop()
        two.stop()


@needs_root
def test_a_program_that_ends_is_named_with_the_end_of_its_log(sandbox: Sandbox) -> None:
    program = sandbox.spawn("grumbler", ["sh", "-c", "echo out of cheese; exit 3"])
    program.process.wait(timeout=10)
    with pytest.raises(LabError, match=r"(?s)grumbler ended with status 3.*out of cheese"):
        sandbox.check()


@needs_root
def test_a_command_that_fails_says_what_it_said(sandbox: Sandbox) -> None:
    with pytest.raises(LabError, match="ls /nowhere"):
        sandbox.run(["ls", "/nowhere"], timeout_s=10)
    with pytest.raises(LabError, match="took more than 0 s"):
        sandbox.run(["sleep", "10"], timeout_s=0.2)


@needs_root
def test_the_relay_reaches_the_inside_and_nothing_else(name: str, tmp_path: Path) -> None:
    listening = relay.listen(0)
    port = listening.getsockname()[1]
    sandbox = Sandbox.start(name, tmp_path / name, {listening: f"{NODE_IP}:4000"})
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as refused:
            assert refused.recv(1) == b"", "nothing listens inside: the relay must cut"
        serve = "import socket; s=socket.create_server(('10.123.0.10',4000)); c,_=s.accept(); \
data=b''.join(iter(lambda: c.recv(65536), b'')); c.sendall(data[::-1]); c.close()"
        sandbox.spawn("server", [sys.executable, "-c", serve])
        wait_for_listener(sandbox, 4000)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"x" * 300_000 + b"y")
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer == b"y" + b"x" * 300_000
    finally:
        sandbox.stop()


def wait_for_listener(sandbox: Sandbox, port: int) -> None:
    end = time.monotonic() + 10
    while f":{port:04X} " not in sandbox.run(["cat", "/proc/net/tcp"], timeout_s=10):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_name_in_use_is_refused(name: str) -> None:
    with hold_name(name), pytest.raises(LabError, match=f"a lab named '{name}' is running already"):
        hold_name(name)
    hold_name(name).close()


def test_a_folder_that_is_not_a_labs_is_left_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "thesis.tex").touch()
    with pytest.raises(LabError, match=f"{state} is in use"):
        make_state(state)
    assert (state / "thesis.tex").exists()


def test_a_folder_that_a_killed_lab_left_is_taken(tmp_path: Path) -> None:
    make_state(tmp_path / "state")
    (tmp_path / "state" / "rest").touch()
    make_state(tmp_path / "state")
    assert not (tmp_path / "state" / "rest").exists()


MOUNTS = """\
30 24 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 24 8:1 / /home rw - ext4 /dev/cgroup rw
"""


def test_finds_every_cgroup_hierarchy() -> None:
    found = cgroups.hierarchies(MOUNTS)
    assert found == [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/memory")]


@needs_root
def test_cgroups_are_made_and_removed_with_all_below(name: str) -> None:
    cgroups.make(name)
    folders = [root / name for root in cgroups.hierarchies()]
    assert folders
    assert all(folder.is_dir() for folder in folders)
    for folder in folders:
        (folder / "pods" / "one").mkdir(parents=True)
    assert cgroups.remove(name) == []
    assert not any(folder.exists() for folder in folders)


@needs_root
def test_a_busy_cgroup_is_reported(name: str) -> None:
    cgroups.make(name)
    sleeper = subprocess.Popen(["sleep", "100"])
    busy = cgroups.hierarchies()[-1] / name
    try:
        (busy / "cgroup.procs").write_text(str(sleeper.pid))
        assert cgroups.remove(name, deadline_s=0.2) == [busy]
    finally:
        sleeper.kill()
        sleeper.wait(timeout=10)
        assert cgroups.remove(name) == []
