"""A root filesystem put together from files of this machine, for a layer of an image."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lab.images.oci import USER

CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
# Parts of Python's library that no program in these images imports.
NOT_COPIED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}


class RootFs:
    """A root filesystem that is being put together in a folder from files of this machine."""

    def __init__(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.root = root

    def inside(self, path: Path | str) -> Path:
        return self.root / str(path).lstrip("/")

    def add(self, path: Path) -> None:
        """Copy one file to its own path, with the symbolic links that lead to it.

        Of a folder, only the folder itself.
        """
        place = self._walk(path)
        if place is None or self.inside(place).exists():
            return
        if place.is_dir():
            self.inside(place).mkdir()
        else:
            shutil.copyfile(place, self.inside(place))
            mode = 0o755 if place.stat().st_mode & stat.S_IXUSR else 0o644
            self.inside(place).chmod(mode)

    def _walk(self, path: Path) -> Path | None:
        """Make the folders and links on the way to `path`; the real path of the file it names."""
        current = Path("/")
        rest = list(path.parts[1:])
        for _ in range(200):  # a chain of links this long is a loop
            if not rest:
                return current
            step = rest.pop(0)
            if step == "..":
                current = current.parent
                continue
            current = current / step
            here = self.inside(current)
            if current.is_symlink():
                target = current.readlink()
                if not here.is_symlink():
                    here.symlink_to(target)
                rest = [*target.parts[1 if target.is_absolute() else 0 :], *rest]
                current = Path("/") if target.is_absolute() else current.parent
            elif rest and not here.is_dir():
                here.mkdir()
        return None

    def add_tree(self, source: Path, target: Path) -> None:
        """Copy a folder of Python, without tests and caches."""
        for folder, names, files in os.walk(source):
            names[:] = sorted(name for name in names if name not in NOT_COPIED)
            place = self.inside(target / Path(folder).relative_to(source))
            place.mkdir(parents=True, exist_ok=True)
            for name in sorted(files):
                if not name.endswith((".a", ".pyc")):
                    self.put(Path(folder, name), target / Path(folder).relative_to(source) / name)

    def put(self, source: Path, target: Path) -> None:
        """Copy one file to another path."""
        place = self.inside(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        place.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)

    def write(self, target: str, text: str) -> None:
        place = self.inside(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def link(self, name: str, target: str) -> None:
        place = self.inside(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() and not place.is_symlink():
            place.symlink_to(target)

    def add_libraries_of(self, binaries: Iterable[Path]) -> None:
        """Copy the shared libraries that dynamic executables and libraries need (by ldd)."""
        for library in sorted(shared_libraries(binaries)):
            self.add(library)

    @staticmethod
    def output_of(*command: Path | str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def compile(self) -> None:
        """Compile all Python here, unchecked: the files of an image don't change."""
        command = [sys.executable, "-m", "compileall", "-q", "-j", "0"]
        command += ["--invalidation-mode", "unchecked-hash", "-s", str(self.root), "-p", "/"]
        # Some packages ship templates that are no Python: what can't be compiled stays as it is.
        subprocess.run([*command, self.root], stdout=subprocess.DEVNULL, check=False)

    def finish(self) -> None:
        """What every image has: /tmp, users, name resolution, CA certificates."""
        self.inside("tmp").mkdir(exist_ok=True)
        self.inside("tmp").chmod(0o1777)
        self.write("etc/passwd", f"root:x:0:0::/:/bin/sh\nlab:x:{USER}:{USER}::/tmp:/bin/sh\n")
        self.write("etc/group", f"root:x:0:\nlab:x:{USER}:\n")
        self.write("etc/nsswitch.conf", "hosts: files dns\n")
        for bundle in map(Path, CA_BUNDLES):
            if bundle.exists():
                self.put(bundle, Path("/etc/ssl/certs/ca-certificates.crt"))
                break
        self.inside("usr/bin").mkdir(parents=True, exist_ok=True)
        self.link("bin", "usr/bin")


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """The libraries that the loader would take, transitively; those of a package itself not."""
    needed: set[Path] = set()
    for binary in binaries:
        said = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
        found = re.findall(r"(?:=> |^\s+)(/\S+) \(0x", said, re.MULTILINE)
        needed.update(Path(path) for path in found)
    return needed
