"""Images that containerd has taken in once, for every lab to start with.

Importing and unpacking the archives costs 8 s of processor time and a gigabyte of writes. So it is
done once, in a sandbox with nothing but containerd, and containerd's folder is kept in the
cache. A lab gets hard links to all that is never written to again (blobs and unpacked layers) and
copies of the databases. Images that have changed since are imported on top by the lab itself.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from lab import images, programs
from lab.kubernetes import components
from lab.kubernetes.sandbox import LabError, Sandbox

NAME = "image-store"  # of the sandbox that makes it
IMPORT_SECONDS = 300.0
CONTENTS = "contents.json"  # written last


def folder() -> Path:
    """The store: containerd's folder and the list of what is in it."""
    return programs.cache_folder() / "image-store"


def locked(progress: Callable[[str], None]) -> AbstractContextManager[None]:
    """Nobody replaces the store meanwhile."""
    file = programs.cache_folder() / "image-store.lock"
    return programs.locked(file, "imports images", progress)


def contents() -> dict[str, str]:
    """The store's images: name to archive (the archives are named by their content)."""
    try:
        kept: dict[str, str] = json.loads((folder() / CONTENTS).read_text())
    except FileNotFoundError:
        return {}
    return kept if kept.pop("containerd", "") == _version() else {}


def build(archives: Mapping[str, Path], state: Path, progress: Callable[[str], None]) -> None:
    """Makes the store, if it lacks more than images with our own code in it. Raises LabError."""
    with locked(progress):
        kept = contents()
        # Our own code changes often and is a small layer: a lab imports that faster.
        if kept and lacking(archives, kept).keys() <= images.PYTHON.keys():
            return
        progress("importing the images into containerd, about 15 s")
        sandbox = Sandbox.start(NAME, state, {})
        try:
            _import_all(sandbox, archives)
        finally:
            sandbox.stop()


def _import_all(sandbox: Sandbox, archives: Mapping[str, Path]) -> None:
    components.write_containerd_configuration(sandbox.state)
    containerd = sandbox.spawn("containerd", components.containerd(sandbox.state))
    wait_for_containerd(sandbox, sandbox.check)
    for archive in archives.values():
        import_image(sandbox, archive)
    containerd.kill()
    new = folder().with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (sandbox.state / "node" / "var" / "lib" / "containerd").rename(new / "containerd")
    listed = {name: archive.name for name, archive in archives.items()}
    (new / CONTENTS).write_text(json.dumps(listed | {"containerd": _version()}))
    shutil.rmtree(folder(), ignore_errors=True)
    new.rename(folder())


def link_into(state: Path) -> None:
    """Gives a sandbox the store's containerd folder, before its containerd starts."""
    source, target = folder() / "containerd", state / "node" / "var" / "lib" / "containerd"
    try:
        with locked(lambda _: None):
            subprocess.run(["cp", "-al", f"{source}/.", target], check=True, timeout=IMPORT_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise LabError(f"the images can't be linked from {source} to {target}: {error}") from error
    for database in target.glob("*/*.db"):
        copy = database.with_suffix(".copy")
        shutil.copy2(database, copy)
        copy.rename(database)


def lacking(archives: Mapping[str, Path], kept: Mapping[str, str]) -> dict[str, Path]:
    """The images that are not in the store as they are now."""
    return {name: path for name, path in archives.items() if kept.get(name) != path.name}


def wait_for_containerd(sandbox: Sandbox, check: Callable[[], None]) -> None:
    """Until containerd answers. `check` may raise meanwhile. Raises LabError."""
    sandbox.wait_for(["ctr", "version"], "containerd", check)


def import_image(sandbox: Sandbox, archive: Path) -> None:
    """Takes an archive into containerd and unpacks it. Raises LabError."""
    argv = ["ctr", "-n", "k8s.io", "images", "import", str(archive)]
    sandbox.run(argv, timeout_s=IMPORT_SECONDS)


def _version() -> str:
    done = subprocess.run(["containerd", "--version"], capture_output=True, text=True, timeout=30)
    return done.stdout.strip()
