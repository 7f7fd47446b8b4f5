"""Real vLLM on CPU for the lab: `python -m lab.vllm_cpu install | status`.

vLLM gets a virtual environment of its own in the cache, made by the Python that runs this, from
requirements-vllm.lock. It is no part of an image: the GPU plugin mounts it into Pods, as NVIDIA's
toolkit mounts drivers. The image has the same Python at the same path, and a compiler.
"""

import argparse
import functools
import hashlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import images, model, programs, system_packages
from lab.images import toolchain
from lab.programs import Progress
from lab.programs.errors import SetupError

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-vllm.lock"
ENTRY = Path(__file__).parent / "vllm-serve"
VERSION = "0.32.0+cpu"  # "+cpu": by this vLLM knows what it was built for
IMAGE = "vllm-cpu"
MOUNTED_AT = "/opt/vllm"
DISK_GB = 8.0  # 6 for the environment, and the wheels on their way there
START_SECONDS = 600.0  # on a machine that is much too busy; 30 s on an idle one
STOP_SECONDS = 60.0
TIED = ("setpriv", "--pdeathsig", "TERM")  # ends a process with this one, however this one ends
SERVED_NAME = "trial"
# Eager saves two minutes of compiling at each start, and costs no speed on one thread.
TRIAL_ARGS = ("--dtype=bfloat16", "--max-model-len=2048", "--enforce-eager")
QUESTION, ANSWER = "What is the capital of France? Answer with one word.", "Paris"

ENVIRONMENT: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is most of the machine
    # By default each engine pins its threads to the same cores, beside each other in a blue/green
    # rollout; one unpinned thread each can be moved by the kernel.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


# Where


def folder() -> Path:
    """The environment's folder; its name is a hash of all that it is made from."""
    digest = hashlib.sha256(f"{VERSION} {sys.version} {_python()}".encode())
    for path in (LOCK, ENTRY):
        digest.update(path.read_bytes())
    return programs.cache_folder() / "vllm" / digest.hexdigest()[:16]


def is_installed() -> bool:
    return _marker().exists()


def mounts() -> tuple[tuple[str, str], ...]:
    """(folder of the machine, where it is in a Pod with a GPU). Raises SetupError."""
    if not is_installed():
        raise SetupError("the real engine isn't installed: run `make vllm` (6 GB, 2 minutes).")
    return ((str(folder()), MOUNTED_AT),)


def image(progress: Progress) -> Path:
    """The archive of lab.local/vllm-cpu:1, made if it is missing. Raises SetupError."""
    return images.build_engine(IMAGE, (f"{MOUNTED_AT}/{ENTRY.name}",), ENVIRONMENT, progress)


def _marker() -> Path:
    return folder() / "installed"


def _python() -> Path:
    """The interpreter outside any virtual environment: the image has it at the same path."""
    base: str = getattr(sys, "_base_executable", sys.executable)
    return Path(base).resolve()


# Installation


def install(progress: Progress) -> Path:
    """Install the engine and let it answer a question; instant when that is done.

    May be interrupted at any point and called again: what is downloaded already stays. Raises
    SetupError, ModelError.
    """
    if is_installed():
        return folder()
    cache = programs.cache_folder()
    with programs.locked(cache / "vllm.lock", "installs vLLM", progress):
        if is_installed():
            return folder()
        uv = _find_uv()
        if problem := _problem():
            raise SetupError(f"vLLM can't be installed here: {problem}")
        _install_packages(progress)
        checkpoint = model.checkpoint(progress)
        started = time.monotonic()
        wheels = cache / "vllm-wheels"  # beside the environment, so that files are linked
        _make_environment(uv, wheels, progress)
        _try_out(checkpoint, progress)
        # Pods read it as another user, whatever the umask here and of vLLM's own files.
        subprocess.run(["chmod", "-R", "a+rX", str(folder())], check=True)
        _marker().write_text(f"{VERSION}\n")
        shutil.rmtree(wheels, ignore_errors=True)
        progress(f"vLLM {VERSION} installed in {time.monotonic() - started:.0f} s: {folder()}")
    return folder()


def _find_uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    found = found or shutil.which("uv")
    if found is None:
        raise SetupError(
            f"uv is missing beside {sys.executable}: `make setup` installs it from "
            "requirements-uv.lock."
        )
    return found


def _problem() -> str:
    """What this machine lacks; empty if nothing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the lock file is for Linux on x86_64, this is {sys.platform}, {platform.machine()}"
    free = shutil.disk_usage(_existing(programs.cache_folder())).free / 1e9
    if free < DISK_GB:
        return (
            f"it needs {DISK_GB:.0f} GB in {programs.cache_folder()}, and {free:.1f} GB are free "
            "there: make room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    return ""


def _install_packages(progress: Progress) -> None:
    """The compiler that vLLM uses and its libraries, from the system's archive."""
    try:
        toolchain.versions()
    except SetupError:
        progress(f"installing {', '.join(toolchain.PACKAGES)}, about 30 s")
    else:
        return
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *toolchain.PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": system_packages.PATH}
    run = functools.partial(
        subprocess.run, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    try:
        if run(command).returncode:  # perhaps no package lists yet, or old ones
            run(["apt-get", "update", "-q"])
            done = run(command)
            if done.returncode:
                said = "\n  ".join(done.stderr.strip().splitlines()[-3:])
                raise SetupError(f"apt-get could not install them:\n  {said}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"the compiler can't be installed: {error}") from error
    toolchain.versions()


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _make_environment(uv: str, wheels: Path, progress: Progress) -> None:
    progress(f"installing vLLM {VERSION} with torch, 3 GB to download, about 1 to 5 min")
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    python = str(place / "bin" / "python")
    _run(
        [uv, "venv", "--quiet", "--allow-existing", "--python", str(_python()), str(place)], wheels
    )
    sync = [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", python, str(LOCK)]
    _run(sync, wheels)
    metadata = place / "overlay" / f"vllm-{VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    shutil.copyfile(ENTRY, place / ENTRY.name)
    (place / ENTRY.name).chmod(0o755)


def _run(command: Sequence[str], wheels: Path) -> None:
    """Run uv; what it says on stderr is in the SetupError."""
    done = subprocess.run(
        [*TIED, *command],
        env={**os.environ, "UV_CACHE_DIR": str(wheels), "UV_NO_PROGRESS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = "\n  ".join(done.stderr.strip().splitlines()[-12:])
        raise SetupError(
            f"uv failed:\n  {said}\nWhat is downloaded already is kept: the same command goes on."
        )


def _try_out(checkpoint: Path, progress: Progress) -> None:
    """Ask the engine a question. That also fills the caches that Pods only read.

    Python's compiled files, and what vLLM finds out about its model classes in a process of its
    own: together most of a start.
    """
    progress("letting the engine answer a question, about 60 s")
    warm = folder() / "warm"
    shutil.rmtree(warm, ignore_errors=True)
    with serve(checkpoint, TRIAL_ARGS, folder() / "trial") as engine:
        engine.wait_until_ready()
        answer = engine.ask(QUESTION)
    if ANSWER not in answer:
        raise SetupError(f"vLLM is installed, and answers {QUESTION!r} with {answer!r}.")
    shutil.copytree(folder() / "trial" / "cache" / "modelinfos", warm / "modelinfos")


# A server of one's own


@dataclass(frozen=True)
class Engine:
    """A vLLM server on loopback. `log` is what it says."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Until /health is 200. Raises SetupError with the end of the log."""
        deadline = time.monotonic() + seconds
        while not self.is_healthy():
            if self.process.poll() is not None:
                raise SetupError(f"vLLM ended with {self.process.returncode}:\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise SetupError(f"vLLM isn't ready after {seconds:.0f} s:\n{self.last_lines()}")
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        try:
            return self._request("GET", "/health", None)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(self, question: str, max_tokens: int = 32) -> str:
        """The greedy answer in a chat. Raises SetupError."""
        status, said = self._request(
            "POST",
            "/v1/chat/completions",
            {
                "model": SERVED_NAME,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": max_tokens,
            },
        )
        if status != 200:
            raise SetupError(f"vLLM answered {status}: {said[:500]!r}\n{self.last_lines()}")
        return str(json.loads(said)["choices"][0]["message"]["content"])

    def last_lines(self, count: int = 20) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join(f"  | {line}" for line in lines)

    def _request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextmanager
def serve(
    checkpoint: Path,
    args: Sequence[str],
    scratch: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Engine]:
    """A server of the installed engine, started as a Pod starts it; ended with all its processes.

    `scratch`: a folder for its log and its caches.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *TIED,
        str(folder() / ENTRY.name),
        str(checkpoint),
        "--served-model-name",
        SERVED_NAME,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "5", *args]
    log = scratch / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={
                "PATH": system_packages.PATH,
                "HOME": str(scratch),
                "VLLM_CACHE_ROOT": str(scratch / "cache"),
                **ENVIRONMENT,
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Engine(process, port, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, in time SIGKILL to what is left of the server's session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# The command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 1 with one message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m lab.vllm_cpu", description=__doc__)
    parser.add_argument("command", choices=("install", "status"))
    command = parser.parse_args(argv).command
    try:
        if command == "install":
            install(lambda line: print(f"vllm: {line}", flush=True))
        else:
            print(status())
    except (SetupError, model.ModelError) as error:
        print(f"vllm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def status() -> str:
    """What is installed and where, in a few lines."""
    if not is_installed():
        return f"vLLM {VERSION} isn't installed: run `make vllm`. It will be in {folder()}"
    lines = [f"vLLM {VERSION} for CPUs is installed in {folder()}"]
    others = [path for path in folder().parent.iterdir() if path != folder()]
    lines += [f"of another version of this project, can be deleted: {path}" for path in others]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
