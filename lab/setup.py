"""Set-up on a fresh machine: the virtual environment from the lock files, then `lab build`.

Runs with the system's Python and the standard library alone, since nothing else is there yet.
Every step is idempotent and takes no time when it is done; interrupted, it goes on where it was.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lab import system_packages
from lab.programs.errors import SetupError

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
LOCKS = (ROOT / "requirements-uv.lock", ROOT / "requirements.lock")


def main() -> None:
    """Make .venv, then become `python -m lab build` in it; exits 1 with a message on failure.

    With --venv it is made alone. With --or-kubeconfig and KUBECONFIG set, a cluster is there
    already: no lab is built.
    """
    alone = "--venv" in sys.argv[1:]
    given = "--or-kubeconfig" in sys.argv[1:] and bool(os.environ.get("KUBECONFIG"))
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"set-up: this is Python {sys.version.split()[0]}, the lock file is for 3.11. "
            "Install python3.11 or say where it is: make PYTHON=/path/to/python3.11"
        )
    try:
        if not (alone or given):
            system_packages.check()
        environment()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"set-up: .venv could not be made: {error}")
    if given:
        print("set-up: KUBECONFIG names a cluster, so no lab is built")
    if alone or given:
        return
    python = str(VENV / "bin" / "python")
    os.chdir(ROOT)
    os.execv(python, [python, "-m", "lab", "build"])


def environment() -> None:
    """Bring .venv to what the lock files say. The marker is written last, so a cut is no harm."""
    marker = VENV / ".installed"
    wanted = hashlib.sha256(b"".join(lock.read_bytes() for lock in LOCKS)).hexdigest()
    if marker.exists() and marker.read_text() == wanted:
        return
    started = time.monotonic()
    print("set-up: .venv from requirements.lock, about 30 s", flush=True)
    python = str(VENV / "bin" / "python")
    if (
        not Path(python).exists()
        or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    ):
        make_venv()
    uv, lock = LOCKS
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
    ]
    subprocess.run([*pip, "-r", str(uv)], check=True)
    sync = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--require-hashes"]
    subprocess.run([*sync, "--python", python, "-r", str(lock)], check=True)
    marker.write_text(wanted)
    print(f"set-up: .venv is ready, {time.monotonic() - started:.0f} s", flush=True)


def make_venv() -> None:
    """`python -m venv`; Debian keeps the module's other half in a package of its own. Raises
    SetupError where that is missing and can't be installed from here."""
    make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise SetupError(
                f"{sys.executable} lacks the module ensurepip, so it can make no .venv. Install it "
                "(on Debian and Ubuntu: sudo apt-get install python3-venv), or name another "
                "Python 3.11: make venv PYTHON=/path/to/python3.11"
            )
        print("set-up: installing python3-venv", flush=True)
        apt = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "python3-venv"]
        if subprocess.run(apt, stdout=subprocess.DEVNULL).returncode:
            subprocess.run(["apt-get", "update", "-qq"], check=True)
            subprocess.run(apt, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(make, check=True)


if __name__ == "__main__":
    main()
