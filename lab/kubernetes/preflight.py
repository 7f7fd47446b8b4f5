"""What a lab needs, checked before anything starts."""

import shutil
from pathlib import Path

from lab import programs, system_packages
from lab.kubernetes.sandbox import LabError

FREE_BYTES = 3 << 30
BUILD = "run `python -m lab build` (make does it)"


def check(state: Path) -> None:
    """Raises LabError with everything that is missing for a lab in that folder, in one message."""
    found = problems(state)
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise LabError(f"the lab can't run here:\n{lines}\n{system_packages.WAY_OUT}")


def problems(state: Path) -> list[str]:
    """One line for each thing that is missing, with what to do."""
    found = system_packages.problems()
    if absent := system_packages.missing():
        found.append(f"not installed: {', '.join(absent)}; {BUILD}")
    if not programs.is_built():
        found.append(f"the lab's programs are not built yet; {BUILD}")
    place = existing(state)
    free = shutil.disk_usage(place).free
    if free < FREE_BYTES:
        found.append(
            f"{free >> 20} MiB are free in {place}, a lab needs {FREE_BYTES >> 20}: make room, or "
            "set XDG_CACHE_HOME to a folder on another disk"
        )
    return found


def existing(path: Path) -> Path:
    """The path or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path
