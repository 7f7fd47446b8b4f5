"""The lab's programs, compiled from Go modules at pinned versions into a cache.

All of them are built from one module, lab/kubernetes/go, so that they share one version of each
package that they have in common, Kubernetes' libraries above all: it is compiled once and not for
each program. One `go build` keeps every core busy until the end. They are compiled without
inlining and debug information, which costs a little speed at run time and saves a quarter of the
compiler's. KEDA and Prometheus are cut down: see keda_cut.py and prometheus_cut.py.

To change a version: edit lab/kubernetes/go/go.mod, then run `python -m lab.programs`.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.programs import keda_cut, prometheus_cut
from lab.programs.errors import SetupError
from lab.programs.golang import find_go

Progress = Callable[[str], None]
"""Is given one line of text at a time."""

SOURCES = Path(__file__).parents[1] / "kubernetes" / "go"
DISK_GB = 7.0  # what a build needs while it runs: modules, compiled packages, programs

KEDA = "github.com/kedacore/keda/v2"
PROMETHEUS = "github.com/prometheus/prometheus"
CUT = {  # what our go.mod replaces by a folder: its name, and how it is cut down
    KEDA: ("keda", keda_cut.cut),
    PROMETHEUS: ("prometheus", prometheus_cut.cut),
}
CHECKSUMS = {  # of these, since go.sum can't hold them
    KEDA: "h1:SR60v8uIcelbveS8n/1jcl8tLdBBIbHMxmdOHw8tKqA=",
    PROMETHEUS: "h1:3IrVxQv6v5i/ZCGi6OrYeBhtCwaPTn6Z3DYruXoYm3M=",
}
OPERATOR = "github.com/prometheus-operator/prometheus-operator"

MAINS = {  # program: package
    "kubernetes": "./kubernetes",
    "gpu-plugin": "./gpu-plugin",
    "pause": "./pause",
    "coredns": "./coredns",
    "keda-operator": f"{KEDA}/cmd/keda-operator",
    "keda-adapter": f"{KEDA}/cmd/keda-adapter",
    "keda-webhooks": f"{KEDA}/cmd/keda-webhooks",
    "prometheus": f"{PROMETHEUS}/cmd/prometheus",
    "prometheus-operator": f"{OPERATOR}/cmd/operator",
    "prometheus-config-reloader": f"{OPERATOR}/cmd/prometheus-config-reloader",
}
KUBERNETES_NAMES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "etcd",
)
"""The program `kubernetes` is each of these, by the name that it is called under."""

TAGS = "netgo,osusergo,remove_all_sd,enable_kubernetes_sd"  # Prometheus discovers Pods, no clouds
COMPILER = "all=-l -dwarf=false"
PACKAGES_PER_CORE_SECOND = 8.0  # for the first estimate only
LINK_SECONDS = 15.0


def cache_folder() -> Path:
    """Where everything that set-up makes is kept: outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-promotion-lab"


def versions() -> dict[str, str]:
    """Version of each module that go.mod pins, by module."""
    text = (SOURCES / "go.mod").read_text(encoding="utf-8")
    return dict(re.findall(r"^\t([\w./-]+) (v\S+)", text, re.MULTILINE))


def title() -> str:
    """What is built, with versions, for people."""
    pinned = versions()
    prometheus = pinned[PROMETHEUS].removeprefix("v0.")  # module v0.312.0 is Prometheus 3.12.0
    return (
        f"Kubernetes {pinned['k8s.io/kubernetes'][1:]}, "
        f"etcd {pinned['go.etcd.io/etcd/server/v3'][1:]}, "
        f"KEDA {pinned[KEDA][1:]} (Prometheus trigger only), "
        f"Prometheus {prometheus[0]}.{int(prometheus[1:3])}.{prometheus.split('.')[1]}, "
        f"prometheus-operator {pinned[OPERATOR][1:]}, "
        f"CoreDNS {pinned['github.com/coredns/coredns'][1:]}"
    )


def folder() -> Path:
    """The built programs' folder; its name is a hash of all that they are built from."""
    digest = hashlib.sha256(repr((MAINS, KUBERNETES_NAMES, TAGS, COMPILER)).encode())
    sources = [path for pattern in ("*.go", "go.*") for path in SOURCES.rglob(pattern)]
    cuts = sorted(Path(__file__).parent.glob("*_cut.py"))
    # In an order that does not depend on where the checkout is.
    for source in (*sorted({*sources}), SOURCES.parent / "keda_manifests.py", *cuts):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return cache_folder() / "programs" / digest.hexdigest()[:16]


def program(name: str) -> Path:
    """The path of a built program, e.g. `kubelet`, `keda-operator`."""
    return folder() / "bin" / name


def is_built() -> bool:
    return folder().is_dir()


def build(progress: Progress) -> Path:
    """Build what is missing and return the folder; instant when nothing is.

    May be interrupted at any point and called again: packages already compiled are not compiled
    again. Two at once wait for each other. Raises SetupError.
    """
    target = folder()
    if target.is_dir():
        return target
    cache = cache_folder()
    with locked(cache / "programs.lock", "builds the lab's programs", progress):
        if target.is_dir():
            return target
        if short := disk_short():
            raise SetupError(short)
        started = time.monotonic()
        go = _Go(find_go(cache, progress), cache)
        _build(go, target, progress)
        # Compiled packages are ten times as large as the programs and of no use any more.
        shutil.rmtree(go.build_cache, ignore_errors=True)
        progress(f"programs built in {_minutes(time.monotonic() - started)}: {target}")
    return target


def manifests(name: str) -> Path:
    """A kubernetes List in JSON: `keda`, or `monitoring` (prometheus-operator's kinds)."""
    return folder() / f"{name}.json"


@contextmanager
def locked(path: Path, doing: str, progress: Progress) -> Iterator[None]:
    """Hold a lock file; if another process has it, say so and wait until that one is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another set-up {doing} already: waiting for it (it holds {path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Go:
    """The go command with the lab's caches."""

    command: Path
    cache: Path

    @property
    def build_cache(self) -> Path:
        return self.cache / "gobuild"

    def argv(self, *arguments: str) -> list[str]:
        """A go command that ends when we do, however we end."""
        setpriv = shutil.which("setpriv")  # of util-linux
        tied = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        return [*tied, str(self.command), *arguments]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "CGO_ENABLED": "0",
            "GO111MODULE": "on",
            "GOCACHE": str(self.build_cache),
            "GOFLAGS": "-modcacherw",
            "GOMODCACHE": str(self.cache / "mod"),
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
        }

    def run(self, *arguments: str, where: Path) -> str:
        """Standard output of a go command; SetupError with the end of what it complained."""
        done = subprocess.run(
            self.argv(*arguments),
            cwd=where,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise _failure(f"go {arguments[0]} {arguments[-1]}", done.stderr.splitlines())
        return done.stdout


def _build(go: _Go, target: Path, progress: Progress) -> None:
    # PyYAML comes with .venv; what is checked before that is there needs this module too.
    from lab.kubernetes import keda_manifests

    for interrupted in target.parent.glob("*.building"):
        shutil.rmtree(interrupted)
    work = target.with_name(target.name + ".building")
    (work / "bin").mkdir(parents=True)
    progress(f"building {title()}: fetching the sources, about 1 min")
    _sources(go, work / "go")
    # Also fetches every module that is needed. Stale: not compiled yet.
    to_compile = ("-f", "{{if .Stale}}{{.ImportPath}}{{end}}")
    found = go.run("list", "-deps", *to_compile, *_flags(), *MAINS.values(), where=work / "go")
    _compile(go, work, len(set(found.split())), progress)

    for name, objects in (
        ("keda", keda_manifests.keda(cache_folder() / "mod" / _module_path(KEDA))),
        ("monitoring", keda_manifests.monitoring(cache_folder() / "mod" / _module_path(OPERATOR))),
    ):
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        (work / f"{name}.json").write_text(json.dumps(listed), encoding="utf-8")
    for name in KUBERNETES_NAMES:
        (work / "bin" / name).symlink_to("kubernetes")
    (work / "bin" / "operator").rename(work / "bin" / "prometheus-operator")
    shutil.rmtree(work / "go")
    work.rename(target)


def tidy(progress: Progress) -> None:
    """Bring go.mod and go.sum up to date, after a version in go.mod was changed by hand."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    go = _Go(find_go(cache, progress), cache)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "go"
        _sources(go, work)
        go.run("mod", "tidy", where=work)
        for name in ("go.mod", "go.sum"):
            shutil.copyfile(work / name, SOURCES / name)


def _sources(go: _Go, target: Path) -> None:
    """Our Go module in a new folder, with what its go.mod replaces by folders in it."""
    shutil.copytree(SOURCES, target)
    for module in CUT:
        _cut_module(go, module, target)


def _cut_module(go: _Go, module: str, sources: Path) -> None:
    """Put the part of a module that the lab compiles where our go.mod says that it lies."""
    pinned = f"{module}@{versions()[module]}"
    name, cut = CUT[module]
    # From outside our module, which replaces this one by the folder that is made here.
    fetched = json.loads(go.run("mod", "download", "-json", pinned, where=go.cache))
    if fetched["Sum"] != CHECKSUMS[module]:
        raise SetupError(
            f"{pinned} has the checksum {fetched['Sum']}, not {CHECKSUMS[module]} as pinned in "
            "lab/programs/__init__.py: not built."
        )
    cut(Path(fetched["Dir"]), sources / name)


def _module_path(module: str) -> str:
    """Where a pinned module lies in a module cache (whose names have no capitals)."""
    return re.sub("[A-Z]", lambda c: "!" + c[0].lower(), f"{module}@{versions()[module]}")


def _flags() -> Sequence[str]:
    version = versions()["k8s.io/kubernetes"]
    major, minor, _ = version[1:].split(".")
    stamp = "-X k8s.io/component-base/version."
    return (
        "-trimpath",
        "-buildvcs=false",
        f"-tags={TAGS}",
        f"-gcflags={COMPILER}",
        f"-ldflags=-s -w {stamp}gitVersion={version} {stamp}gitMajor={major} "
        f"{stamp}gitMinor={minor}",
    )


def _compile(go: _Go, work: Path, packages: int, progress: Progress) -> None:
    cores = os.cpu_count() or 1
    expected = packages / (PACKAGES_PER_CORE_SECOND * cores) + LINK_SECONDS
    progress(f"compiling {packages} packages on {cores} cores, about {_minutes(expected)}")
    started = time.monotonic()
    with subprocess.Popen(
        go.argv("build", "-v", *_flags(), "-o", f"{work / 'bin'}/", *MAINS.values()),
        cwd=work / "go",
        env=go.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        said: list[str] = []  # a package as its compilation begins, or an error
        stream = running.stderr
        assert stream is not None
        reader = threading.Thread(target=lambda: said.extend(stream), daemon=True)
        reader.start()
        try:
            while running.poll() is None:
                _wait(running, 15)
                if running.poll() is None and said:
                    progress(_where(len(said), packages, time.monotonic() - started))
        except BaseException:
            running.terminate()
            raise
        reader.join(10)
    if running.returncode:
        errors = [line for line in said if not re.fullmatch(r"\S+\n", line)]
        errors.append(f"(exit status {running.returncode}{_out_of_memory(running.returncode)})")
        raise _failure("go build", errors)


def _out_of_memory(status: int) -> str:
    return ": killed, perhaps for lack of memory; 4 GB are needed" if status == -9 else ""


def _wait(running: subprocess.Popen[str], seconds: float) -> None:
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _where(done: int, packages: int, seconds: float) -> str:
    if done >= packages:
        return f"linking the lab's programs, {_minutes(seconds)} so far"
    left = seconds / done * (packages - done) + LINK_SECONDS
    return (
        f"compiling the lab's programs: {done / packages:.0%} ({done} of {packages} packages), "
        f"{_minutes(seconds)} so far, about {_minutes(left)} left"
    )


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def _failure(what: str, complained: Sequence[str]) -> SetupError:
    lines = [line.strip() for line in complained if line.strip()][-12:]
    text = "\n  ".join(lines)
    if "no space left on device" in text:
        return SetupError(f"the disk is full: {what} needs {DISK_GB:.0f} GB in {cache_folder()}.")
    return SetupError(
        f"{what} failed:\n  {text}\nWhat is compiled already is kept: the same command goes on."
    )


def disk_short() -> str:
    """Why a build wouldn't fit on the disk; empty if it does."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free / 1e9
    # What an interrupted build left in the cache needn't fit once more.
    there = sum(_size(cache / name) for name in ("mod", "gobuild")) if free < DISK_GB else 0.0
    if free + there >= DISK_GB:
        return ""
    return (
        f"building the lab's programs needs {DISK_GB:.0f} GB in {cache}, and {free:.1f} GB are "
        "free there: make room, or set XDG_CACHE_HOME to a folder on a larger disk"
    )


def _size(path: Path) -> float:
    """Gigabytes below a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e9
