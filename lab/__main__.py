"""`python -m lab build | up | status | env`: set the lab up, run one, see which run."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lab import lab as labs
from lab import model
from lab.programs.errors import SetupError

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 1 with one message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="set up what a lab needs, once: packages, programs, images")
    up = commands.add_parser("up", help="run a lab in the foreground until Ctrl-C")
    up.add_argument("--name", default="lab", help="several labs run side by side under names")
    up.add_argument("--gpus", type=int, default=4, help="how many GPUs to simulate")
    up.add_argument("--engine", choices=labs.ENGINES, default="simulator")
    up.add_argument("--port", type=int, default=0, help="of the API server; 0: any that is free")
    commands.add_parser("status", help="list the labs that run")
    env = commands.add_parser("env", help="shell settings for a lab: eval $(python -m lab env)")
    env.add_argument("--name", default="lab")
    options = parser.parse_args(argv)
    try:
        match options.command:
            case "build":
                build()
            case "up":
                return run(options.name, options.gpus, options.engine, options.port)
            case "status":
                status()
            case "env":
                settings(options.name)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it (`head`, `less`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 128 + signal.SIGPIPE
    except (labs.LabError, SetupError, model.ModelError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130
    return 0


def build() -> None:
    """Sets up what a lab needs, with a line for each step. Raises SetupError, ModelError."""
    began = time.monotonic()
    lock = threading.Lock()

    def progress(line: str) -> None:
        with lock:
            print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    labs.build(progress)
    progress("everything for a lab is there")


def run(name: str, gpus: int, engine: str, port: int) -> int:
    """A lab in the foreground. SIGINT and SIGTERM end it, with status 0 once it was up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    is_up = False
    try:
        with labs.start(name, gpus=gpus, engine=engine, port=port, progress=_print) as lab:
            is_up = True
            _print(describe(lab))
            _print("\nCtrl-C ends it.")
            while True:
                lab.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        _print(f"\nthe lab {name!r} has ended; nothing of it is left")
        return 0 if is_up else 130


def describe(lab: labs.Lab) -> str:
    """How to use a lab that is up."""
    simulated = "the GPUs" + (" and the engine" if lab.engine == "simulator" else "")
    return f"""
lab {lab.name!r}: a real one-node Kubernetes; simulated are {simulated}
  admin       {lab.kubeconfig}
  pipeline    {lab.promoter_kubeconfig}
  kubectl     {lab.kubectl}  (any other will do)
  Prometheus  {lab.prometheus}
  model hub   {lab.hub}
  a model     kubectl -n llm port-forward service/<model> 8000, once one is promoted

look at it:        export KUBECONFIG={lab.kubeconfig}
promote to it:     eval "$(.venv/bin/python -m lab env --name {lab.name})"
                   dagster job execute -m pipelines.definitions -j promote \\
                       --tags '{{"dagster/partition": "{labs.MODELS[lab.engine]}"}}'"""


def status() -> None:
    """Lists the labs that are up."""
    found = labs.running()
    for lab in found:
        print(f"{describe(lab)}\n  process     {lab.pid}")
    if not found:
        print("no lab is running; start one: python -m lab up")


def settings(name: str) -> None:
    """Shell settings to promote to the running lab, with the pipeline's own account and this
    checkout's programs. Raises LabError if there is none."""
    lab = labs.find(name)
    if lab is None:
        raise labs.LabError(
            f"no lab named {name!r} is up; start one: python -m lab up --name {name}"
        )
    print(f"export KUBECONFIG={lab.promoter_kubeconfig}")
    print(f"export PROMOTION_CLUSTER={labs.CLUSTERS[lab.engine]}")
    print(f"export DAGSTER_HOME=${{DAGSTER_HOME:-{ROOT / '.demo'}}}")
    print(f"export PYTHONWARNINGS='{labs.QUIET_DAGSTER}'")
    print(f"export PATH={ROOT / '.venv/bin'}:{lab.kubectl.parent}:$PATH")


def _print(line: str) -> None:
    print(line, flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
