"""The lab's container images, made from this machine without Docker and without a registry.

An image is an OCI archive for `ctr images import`. Its layers are files of this machine: the
running Python at the same path, the shared libraries that it needs, busybox for a shell, packages
of the virtual environment, our own code; or a program that the lab built. Order, times and owners
in a layer are fixed, so the same content has the same digest.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from lab import programs
from lab.images import toolchain
from lab.images.oci import Config, Layer, read_layer, write_archive, write_layer
from lab.images.rootfs import RootFs
from lab.programs import Progress
from lab.programs.errors import SetupError
from lab.system_packages import PATH

ROOT = Path(__file__).parents[2]
APP = Path("/app")
SITE_PACKAGES = Path("/opt/site-packages")
ENVIRONMENT = {
    "PATH": PATH,
    "PYTHONPATH": f"{APP}:{SITE_PACKAGES}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    "HOME": "/tmp",
}

STATIC: Mapping[str, Mapping[str, str]] = {  # image: path in it: program; the first is run
    "pause": {"/pause": "pause"},
    "coredns": {"/coredns": "coredns"},
    "keda": {
        "/keda": "keda-operator",
        "/keda-adapter": "keda-adapter",
        "/keda-admission-webhooks": "keda-webhooks",
    },
    "prometheus": {"/bin/prometheus": "prometheus"},
    "prometheus-operator": {
        "/operator": "prometheus-operator",
        "/bin/prometheus-config-reloader": "prometheus-config-reloader",
    },
}
PYTHON: Mapping[str, tuple[Sequence[str], Sequence[str], Config]] = {  # packages, our code, config
    "promotion-jobs": (
        ("huggingface_hub", "locust", "pydantic", "pyyaml"),
        ("catalog", "loadtests", "weights"),
        Config(environment=ENVIRONMENT, working_dir=str(APP)),
    ),
    "vllm-simulator": (
        (),
        ("lab/__init__.py", "lab/client.py", "lab/engine"),
        Config(("python", "-m", "lab.engine"), ENVIRONMENT, str(APP)),
    ),
}


def build(progress: Progress) -> dict[str, Path]:
    """Build what is missing; the archive of each image, by its name after `lab.local/`.

    Instant when nothing is missing. Needs the programs, and busybox. Raises SetupError.
    """
    return {**build_python(progress), **build_static(progress)}


def build_python(progress: Progress) -> dict[str, Path]:
    """The images with Python in them; they need no program of the lab's."""
    with programs.locked(folder() / "lock", "makes the images", progress):
        return {name: _python_image(name, progress) for name in PYTHON}


def build_static(progress: Progress) -> dict[str, Path]:
    """The images of the programs that the lab built."""
    with programs.locked(folder() / "lock", "makes the images", progress):
        return {name: _static_image(name) for name in STATIC}


def build_engine(
    name: str, entrypoint: Sequence[str], environment: Mapping[str, str], progress: Progress
) -> Path:
    """An image for the real engine: Python and a C++ compiler, of which the engine makes use.

    The engine itself, some gigabytes, is mounted into its Pods; `entrypoint` names it there.
    """
    with programs.locked(folder() / "lock", "makes the images", progress):
        packages = [f"{package} {version}" for package, version in toolchain.versions().items()]
        layers = [
            _layer("python", _python_key(), _fill_python, progress),
            _layer("toolchain", _key(*packages), toolchain.fill, progress),
        ]
        config = Config(tuple(entrypoint), {**ENVIRONMENT, "PYTHONPATH": "", **environment})
        return _archive(name, layers, config)


def reference(name: str) -> str:
    """How a Pod names the image."""
    return f"lab.local/{name}:1"


def folder() -> Path:
    return programs.cache_folder() / "images"


def _python_image(name: str, progress: Progress) -> Path:
    packages, code, config = PYTHON[name]
    layers = [_layer("python", _python_key(), _fill_python, progress)]
    if packages:
        wanted = closure(packages)
        layers.append(
            _layer(
                f"packages-of-{name}",
                _key(*(f"{package.name} {package.version}" for package in wanted)),
                lambda root: _fill_packages(root, wanted),
                progress,
            )
        )
    files = sorted(_code(code))
    layers.append(
        _layer(
            f"code-of-{name}",
            _key(*(f"{path} {_digest(ROOT / path)}" for path in files)),
            lambda root: _fill_code(root, files),
        )
    )
    return _archive(name, layers, config)


def _static_image(name: str) -> Path:
    files = STATIC[name]
    root = programs.folder().name  # names what all programs are built from
    layer = _layer(name, _key(root, *files), lambda root: _fill_static(root, files))
    return _archive(name, [layer], Config((next(iter(files)),)))


def _archive(name: str, layers: Sequence[Layer], config: Config) -> Path:
    key = _key(repr(config), *(layer.digest for layer in layers))
    path = folder() / name / f"{key}.tar"
    if not path.exists():
        write_archive(path, reference(name), layers, config)
        _delete_others(path, "*.tar")
    return path


def _layer(
    name: str, key: str, fill: Callable[[RootFs], None], progress: Progress | None = None
) -> Layer:
    """The layer of this name and key, made by `fill` if it isn't there yet."""
    path = folder() / "layers" / f"{name}-{key}.tar"
    there = read_layer(path)
    if there:
        return there
    if progress:
        progress(f"making the images' layer {name}, about 15 s")
    root = RootFs(path.with_suffix(".root"))
    try:
        fill(root)
        layer = write_layer(root.root, path)
    except OSError as error:
        raise SetupError(f"the images' layer {name} can't be made: {error}") from error
    finally:
        shutil.rmtree(root.root, ignore_errors=True)
    _delete_others(path, f"{name}-{'?' * len(key)}.tar")
    return layer


def _delete_others(kept: Path, pattern: str) -> None:
    for other in kept.parent.glob(pattern):
        if other != kept:
            other.unlink()
            other.with_suffix(".sha256").unlink(missing_ok=True)


def _key(*parts: str) -> str:
    """Names a layer by what goes into it: the parts, and how this package puts them together."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What goes into the layers


def _fill_static(root: RootFs, files: Mapping[str, str]) -> None:
    for path, program in files.items():
        root.put(programs.program(program), Path(path))
    root.finish()


def _interpreter() -> Path:
    base: str = getattr(sys, "_base_executable", sys.executable)  # outside any virtual environment
    return Path(base).resolve()


def _library() -> Path:
    return Path(os.__file__).parent


def _busybox() -> Path:
    found = shutil.which("busybox", path=PATH)
    if found is None:
        raise SetupError("the images need busybox: install busybox-static (`python -m lab build`).")
    return Path(found)


def _python_key() -> str:
    files = (_interpreter(), _busybox(), Path("/etc/ssl/certs/ca-certificates.crt"))
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _key(sys.version, repr(stats))


def _fill_python(root: RootFs) -> None:
    """Python at the path where it is on this machine, its libraries, a shell."""
    python, library, busybox = _interpreter(), _library(), _busybox()
    root.add(python)
    root.add_tree(library, library)
    root.compile()
    root.finish()
    for name in ("python", "python3"):
        root.link(f"usr/local/bin/{name}", str(python))
    root.put(busybox, Path("/usr/bin/busybox"))
    for applet in root.output_of(busybox, "--list").split():
        root.link(f"usr/bin/{applet}", "busybox")
    extensions = root.inside(library).glob("lib-dynload/*.so")
    root.add_libraries_of([python, busybox, *extensions])


def closure(names: Iterable[str]) -> list[metadata.Distribution]:
    """These installed packages and all that they need, sorted; SetupError if one is missing."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[str] = set()
    wanted = [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        name = requirement.name.lower().replace("_", "-")
        if (asked := f"{name} {sorted(requirement.extras)}") in seen:
            continue
        seen.add(asked)
        try:
            found[name] = distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            raise SetupError(
                f"{requirement.name} isn't installed in {sys.prefix}: run `make` again."
            ) from None
        for line in distribution.requires or ():
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                wanted.append(needed)
    return [found[name] for name in sorted(found)]


def _fill_packages(root: RootFs, packages: Iterable[metadata.Distribution]) -> None:
    for package in packages:
        for file in package.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                root.put(Path(str(package.locate_file(file))), SITE_PACKAGES / file)
    root.compile()
    root.add_libraries_of(root.root.rglob("*.so"))


def _code(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(ROOT))


def _fill_code(root: RootFs, files: Iterable[str]) -> None:
    for path in files:
        root.put(ROOT / path, APP / path)
    root.compile()
