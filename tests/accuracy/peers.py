"""The other load generators, each in an environment of its own in the cache: `make accuracy-peers`.

They are no part of this project's dependencies; what isn't installed is not compared.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lab import programs, vllm_cpu

ROOT = Path(__file__).parents[2]
# Distribution, version, oldest Python.
PEERS: Mapping[str, tuple[str, str, tuple[int, int]]] = {
    "guidellm": ("guidellm", "0.8.1", (3, 10)),
    "aiperf": ("aiperf", "0.13.0", (3, 10)),
    "inference_perf": ("inference-perf", "0.7.0", (3, 12)),
}


def folder(tool: str) -> Path:
    """The environment of a peer, which need not exist."""
    distribution, version, _ = PEERS[tool]
    return programs.cache_folder() / "peers" / f"{distribution}-{version}"


def installed() -> dict[str, str]:
    """Peers that can be run, with their versions. vLLM is the lab's real engine (`make vllm`)."""
    found = {
        tool: version
        for tool, (distribution, version, _) in PEERS.items()
        if (folder(tool) / "bin" / distribution).exists()
    }
    if vllm_cpu.is_installed():
        found["vllm"] = vllm_cpu.VERSION
    return found


def install() -> list[str]:
    """Installs all peers; what can't be, and why."""
    problems = []
    uv = str(Path(sys.executable).with_name("uv"))
    for tool, (distribution, version, python) in PEERS.items():
        if tool in installed():
            continue
        name = f"{distribution} {version}"
        if (interpreter := _python(python)) is None:
            wanted = ".".join(map(str, python))
            problems.append(f"{name} needs Python {wanted}: put a python{wanted} on the PATH")
            continue
        print(f"{name}: installing into {folder(tool)}", flush=True)
        target = str(folder(tool))
        for command in (
            [uv, "venv", "-q", "--clear", "-p", interpreter, target],
            [
                uv,
                "pip",
                "install",
                "-q",
                "-p",
                f"{target}/bin/python",
                f"{distribution}=={version}",
            ],
        ):
            if subprocess.run(command).returncode:
                problems.append(f"{name}: can't be installed, uv says why above")
                shutil.rmtree(target, ignore_errors=True)
                break
    if not vllm_cpu.is_installed():
        problems.append("vllm: install it with `make vllm` (6 GB)")
    return problems


def _python(oldest: tuple[int, int]) -> str | None:
    """An interpreter that is new enough: this one, one on the PATH, or one of pyenv's."""
    if sys.version_info[:2] >= oldest:
        return getattr(sys, "_base_executable", sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(oldest[1], oldest[1] + 3):
        found = sorted(pyenv.glob(f"{oldest[0]}.{minor}.*/bin/python{oldest[0]}.{minor}"))
        for candidate in (shutil.which(f"python{oldest[0]}.{minor}"), *map(str, found)):
            # pyenv's shims are there also for versions that are not chosen.
            if (
                candidate
                and not subprocess.run([candidate, "-c", ""], capture_output=True).returncode
            ):
                return candidate
    return None


def main() -> int:
    """Installs the peers and says which there are."""
    problems = install()
    for tool, version in installed().items():
        print(f"{tool} {version}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
