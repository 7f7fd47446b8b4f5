"""A lab: a real one-node Kubernetes with everything that a promotion meets, in one call.

    with lab.start("mine") as it:
        ...  # KUBECONFIG=it.kubeconfig

It ends with the block, and also when this process is killed, and leaves nothing behind.
"""

import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import images, model, programs, relay, system_packages, vllm_cpu
from lab.kubernetes import bringup, components, image_store, preflight
from lab.kubernetes.addresses import API_PORT, HUB_PORT, NODE_IP, PROMETHEUS_IP, PROMETHEUS_PORT
from lab.kubernetes.bringup import CLUSTERS, Parts
from lab.kubernetes.sandbox import (
    MARKER,
    LabError,
    Sandbox,
    cgroup_of,
    clear,
    hold_name,
    is_running,
)
from lab.programs.errors import SetupError

__all__ = [
    "CLUSTERS",
    "ENGINES",
    "MODELS",
    "QUIET_DAGSTER",
    "Lab",
    "LabError",
    "build",
    "find",
    "running",
    "start",
]

ENGINES = tuple(CLUSTERS)
# The model of the catalog that fits each engine here.
MODELS = {"simulator": "smollm2-135m", "vllm": "smollm2-135m-cpu"}
# For PYTHONWARNINGS: at each command `dagster` advises `dg`, another package. These two alone.
QUIET_DAGSTER = ",".join(
    f"ignore:Function `{command}` is superseded"
    for command in ("job_execute_command", "dev_command")
)


@dataclass(frozen=True)
class Lab:
    """A running lab: where it can be reached. `state` is its folder, gone with it."""

    name: str
    engine: str
    gpus: int
    state: Path
    kubeconfig: Path  # admin
    promoter_kubeconfig: Path  # the pipeline's own account, with its rights alone
    kubectl: Path
    prometheus: str
    hub: str
    pid: int  # of the process whose end is the lab's end
    # Raises LabError when a part of the lab has ended.
    check: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def nvidia_smi(self) -> Path:
        """The stand-in that is mounted into Pods with a GPU: what it prints can be changed."""
        return self.state / "gpu" / "nvidia-smi"

    def models(self) -> Path:
        """The folder behind the volume of the weights."""
        return self.state / "models"


def states() -> Path:
    """The folder of the running labs' folders."""
    return programs.cache_folder() / "run"


def find(name: str = "lab") -> Lab | None:
    """The running lab of that name. None if there is none, or it is still starting."""
    file = states() / name / "lab.json"
    if not file.exists() or not is_running(name):
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None  # it is ending right now

    def check() -> None:
        if not is_running(name):
            raise LabError(f"the lab {name!r} has ended")

    for key in ("state", "kubeconfig", "promoter_kubeconfig", "kubectl"):
        values[key] = Path(values[key])
    return Lab(**values, check=check)


def running() -> list[Lab]:
    """All labs of this user that are up."""
    names = sorted(path.parent.name for path in states().glob("*/lab.json"))
    return [lab for name in names if (lab := find(name)) is not None]


@contextmanager
def start(
    name: str = "lab",
    *,
    gpus: int = 4,
    engine: str = "simulator",
    port: int = 0,
    progress: Callable[[str], None] = print,
) -> Iterator[Lab]:
    """Starts a lab and yields it when all of it works; ends it without a trace after the block.

    `engine`: "simulator", or "vllm" for the real one (Pods with a GPU get its environment).
    `port`: of the API server on loopback; Prometheus is at the next one and the hub at the one
    after; 0 takes free ones. `progress` gets the lines of the timeline. Raises LabError with the
    part that failed and the end of its log.
    """
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?", name):
        raise LabError(f"{name!r} can't be a lab's name: lower-case letters, digits and - only")
    if engine not in ENGINES:
        raise LabError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    began = time.monotonic()

    def ready(what: str) -> None:
        progress(f"{time.monotonic() - began:5.1f} s  {what}")

    state = states() / name
    preflight.check(state)
    hold_name(name).close()
    sweep()
    inside = (
        f"{NODE_IP}:{API_PORT}",
        f"{PROMETHEUS_IP}:{PROMETHEUS_PORT}",
        f"{NODE_IP}:{HUB_PORT}",
    )
    with ExitStack() as stack:
        sockets = [stack.enter_context(listening) for listening in listen(port)]
        api_port, prometheus_port, hub_port = (s.getsockname()[1] for s in sockets)
        mounts = engine_mounts(engine)
        parts = built_parts(engine, progress)
        sandbox = Sandbox.start(name, state, dict(zip(sockets, inside, strict=True)))
        stack.callback(sandbox.stop)
        ready("sandbox")
        lab = Lab(
            name=name,
            engine=engine,
            gpus=gpus,
            state=state,
            kubeconfig=state / "admin.kubeconfig",
            promoter_kubeconfig=state / "promoter.kubeconfig",
            kubectl=parts.programs / "kubectl",
            prometheus=f"http://127.0.0.1:{prometheus_port}",
            hub=f"http://127.0.0.1:{hub_port}",
            pid=os.getpid(),
            check=sandbox.check,
        )
        node = components.Node(
            state=state,
            programs=parts.programs,
            cgroup=sandbox.cgroup,
            gpus=gpus,
            mounts=mounts,
        )
        bringup.bring_up(
            sandbox, node, parts, engine=engine, api_port=api_port, hub=lab.hub, ready=ready
        )
        write(lab)
        ready("the lab is up")
        yield lab


def sweep() -> None:
    """Removes what labs left that were killed together with their keepers."""
    for state in states().glob("*"):
        if (state / MARKER).exists() and not is_running(state.name):
            clear(state, cgroup_of(state.name))


def listen(port: int) -> list[socket.socket]:
    """Sockets for API server, Prometheus and hub, at port, port + 1 and port + 2, or free ones.
    Raises LabError if one is in use."""
    sockets: list[socket.socket] = []
    for offset in range(3):
        wanted = port + offset if port else 0
        try:
            sockets.append(relay.listen(wanted))
        except OSError as error:
            for made in sockets:
                made.close()
            raise LabError(
                f"port {wanted} of 127.0.0.1 can't be used ({error.strerror}); the lab wants "
                f"{port} to {port + 2}: give it another --port, or none for free ones"
            ) from error
    return sockets


def write(lab: Lab) -> None:
    """Writes lab.json, by which `find` knows that the lab is up."""
    values = {f.name: getattr(lab, f.name) for f in dataclasses.fields(lab) if f.name != "check"}
    new = lab.state / "lab.json.new"
    new.write_text(json.dumps(values, default=str, indent=1))
    new.rename(lab.state / "lab.json")


def build(progress: Callable[[str], None]) -> None:
    """Everything that a lab needs and that is not there yet, independent parts beside each other;
    seconds when all of it is there. Raises SetupError or ModelError."""
    system_packages.check()
    with ThreadPoolExecutor() as pool:

        def packages_and_images() -> None:
            system_packages.install(progress)
            images.build_python(progress)

        work: list[Future[Any]] = [
            pool.submit(packages_and_images),
            pool.submit(programs.build, progress),
            pool.submit(model.checkpoint, progress),
        ]
        for future in work:
            future.result()
    archives = images.build(progress)
    if vllm_cpu.is_installed():
        archives[vllm_cpu.IMAGE] = vllm_cpu.image(progress)
    image_store.build(archives, states() / image_store.NAME, progress)


def built_parts(engine: str, progress: Callable[[str], None]) -> Parts:
    """What `build` built; images whose code has changed since are made anew. Raises LabError."""
    try:
        archives = images.build(progress)
        if engine == "vllm":
            archives[vllm_cpu.IMAGE] = vllm_cpu.image(progress)
    except SetupError as error:
        raise LabError(str(error)) from error
    return Parts(
        programs=programs.folder() / "bin",
        images=archives,
        keda=programs.manifests("keda"),
        monitoring=programs.manifests("monitoring"),
    )


def engine_mounts(engine: str) -> tuple[tuple[str, str], ...]:
    """What the GPU plugin mounts into Pods beside nvidia-smi: the real engine. Raises LabError."""
    if engine != "vllm":
        return ()
    try:
        return vllm_cpu.mounts()
    except SetupError as error:
        raise LabError(str(error)) from error
