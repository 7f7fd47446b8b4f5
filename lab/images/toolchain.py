"""A C++ compiler for an image: real vLLM compiles kernels for the CPU when it starts.

Its files are those of this machine's Debian packages, with all packages that these depend on.
"""

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.images.rootfs import RootFs
from lab.programs.errors import SetupError

PACKAGES = ("g++", "libnuma1", "libsqlite3-0", "libgomp1", "util-linux")  # vLLM asks lscpu
_NOT_COPIED = re.compile(r"/usr/share/(doc|doc-base|info|lintian|locale|man|bug|gdb)/")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """These packages and all that they depend on, with versions; SetupError if one is missing."""
    installed: dict[str, tuple[str, str]] = {}
    form = "${Package}\t${Version}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\n"
    for line in _query("-W", f"-f={form}").splitlines():
        name, version, status, needs = line.split("\t")
        if status == "installed":
            installed[name] = (version, needs)
    missing = sorted(set(packages) - installed.keys())
    if missing:
        raise SetupError(
            f"the image of the real engine needs {', '.join(missing)}: apt-get install them."
        )
    found: dict[str, str] = {}
    wanted = list(packages)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name], needs = installed[name]
        for alternatives in needs.split(","):
            names = [re.split(r"[ :(]", option.strip())[0] for option in alternatives.split("|")]
            wanted += [name for name in names if name in installed][:1]
    return dict(sorted(found.items()))


def fill(root: RootFs) -> None:
    """Copy the compiler's files, at their own paths."""
    for line in _query("-L", *versions()).splitlines():
        path = Path(line)
        if not _NOT_COPIED.match(line) and (path.is_symlink() or path.is_file()):
            root.add(path)


def _query(*arguments: str) -> str:
    command: Sequence[str] = ["dpkg-query", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"the real engine's image needs Debian's dpkg: {error}") from error
