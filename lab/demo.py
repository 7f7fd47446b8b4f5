"""`make demo`: promotions on the lab, told as a story that either went so or fails.

One model is promoted, a bad revision of it is refused while the first keeps answering, and a
third one takes over, all under a client that never stops asking. With the real engine the story
is a right revision and one whose server is healthy and answers nonsense.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog import ModelSpec
from catalog.load import catalog
from lab import lab as labs
from lab.client_pod import TrafficClient

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".demo"  # DAGSTER_HOME of the demo; `make ui` opens it
PROMOTION_SECONDS = 900


@dataclass(frozen=True)
class Act:
    """One promotion of the story: what is promoted, and how it must end."""

    title: str
    revision: str
    live: bool  # else it must be refused, by `gate`
    gate: str = ""


STORY = {
    "simulator": (
        Act("the first revision", "v1", live=True),
        Act(
            "a revision planted to be too slow for its SLO",
            "v2-slow",
            live=False,
            gate="ttft_benchmark",
        ),
        Act("a third revision, good again", "v3", live=True),
    ),
    "vllm": (
        Act("the right revision", "v1", live=True),
        Act(
            "a revision with damaged weights: healthy, but talks nonsense",
            "nonsense",
            live=False,
            gate="gpu_smoke_test",
        ),
    ),
}


class DemoFailed(Exception):
    """The story did not go as it must; the message says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Play the story. Returns 0 only if every act ended as it must and no request failed."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("--engine", choices=sorted(STORY), default="simulator")
    parser.add_argument("--lab", default="lab", help="name of the lab to use or start")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in a pipe too
    end_on_signals()
    started = time.monotonic()
    try:
        with a_lab(options.lab, options.engine) as lab:
            play(lab, options.engine)
        print(f"\ndemo: as planned, in {time.monotonic() - started:.0f} s.")
    except BrokenPipeError:  # who reads it (`head`, `less`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 128 + signal.SIGPIPE
    except (DemoFailed, labs.LabError) as error:
        print(f"\ndemo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


def end_on_signals() -> None:
    """SIGTERM and a closed terminal end what we started as Ctrl-C does, in the background too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def a_lab(name: str, engine: str) -> Iterator[labs.Lab]:
    """The running lab of that name, or one of our own that ends with us."""
    running = labs.find(name)
    if running is not None:
        if running.engine != engine:
            raise labs.LabError(
                f"the lab {name!r} that is running has the engine {running.engine!r}, not "
                f"{engine!r}: end it, or name another one (make … LAB=other)"
            )
        print(f"uses the lab {name!r} that is running")
        yield running
        return
    print("starts a lab (a real one-node Kubernetes in namespaces of its own)")
    with labs.start(name, engine=engine) as lab:
        yield lab


def play(lab: labs.Lab, engine: str) -> None:
    """Every act in turn, under a client that runs from the first promotion to the end."""
    model = catalog().model(labs.MODELS[engine])
    cluster = catalog().cluster(labs.CLUSTERS[engine])
    print(f"demo: simulated here: {', '.join(cluster.simulated)}; everything else is real")
    client: TrafficClient | None = None
    live = ""
    try:
        for number, act in enumerate(STORY[engine], 1):
            print(f"\n== {number}. Promote {act.title}: {model.name} at {act.revision}")
            run = promote(lab, model, cluster.name, act.revision)
            check(act, run)
            live = run.commit if act.live else live
            now = live_commit(lab, cluster.namespace, model)
            if now != live:
                raise DemoFailed(f"{live[:12]} should be live now, but {now[:12] or 'nothing'} is")
            print(f"   live now: {now[:12]}")
            if client is None:
                client = TrafficClient.start(lab, cluster.namespace, model)
            client.check_alive()
    finally:
        summary = client.stop() if client else None
    assert summary is not None
    print(
        f"\nclient: {summary['requests']} requests meanwhile, {summary['failures']} failures "
        f"({summary['resent']} resent, whose kept-alive connection had been closed); answered by "
        + ", ".join(f"{commit[:12]}: {n}" for commit, n in summary["revisions"].items())
    )
    if summary["failures"] or not summary["requests"]:
        raise DemoFailed(f"the client's requests failed: {json.dumps(summary)}")
    epilogue(model)


@dataclass(frozen=True)
class Run:
    """A promotion that ended: `dagster job execute`'s exit status and what each stage left."""

    status: int
    commit: str  # what the revision was resolved to; "" if it did not come to that
    stages: list[dict[str, Any]]
    log: Path


def promote(lab: labs.Lab, model: ModelSpec, cluster: str, revision: str) -> Run:
    """Run the real job as a CI pipeline would; each stage is printed as it ends."""
    prepare_home()
    config = HOME / f"revision-{revision}.yaml"
    config.write_text(f"ops: {{model_revision: {{config: {{revision: {revision}}}}}}}\n")
    command = ["dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "promote"]
    command += ["--tags", json.dumps({"dagster/partition": model.name})]
    command += ["--config", shown(config)]
    print("   $ " + shlex.join(command))
    reports = HOME / "reports" / model.name
    before = set(reports.glob("*"))
    log = HOME / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{revision}.log"
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(ROOT / ".venv/bin/dagster"), *command[1:]],
            cwd=ROOT,
            env=environment(lab, cluster),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            stages = follow(process, lambda: set(reports.glob("*")) - before, log)
        except BaseException:
            process.terminate()  # the run takes its candidate away before it ends
            process.wait(60)
            raise
    print(f"   exit status {process.returncode} after {time.monotonic() - started:.0f} s")
    print(f"   log: {shown(log)}")
    commit = ""
    for folder in set(reports.glob("*")) - before:
        if (folder / "report.html").exists():
            print(f"   report: {shown(folder / 'report.html')}")
        if (folder / "model_revision.json").exists():
            commit = str(json.loads((folder / "model_revision.json").read_text())["commit"])
    return Run(process.returncode, commit, stages, log)


def live_commit(lab: labs.Lab, namespace: str, model: ModelSpec) -> str:
    """The commit behind the model's Service, as the cluster says; "" if nothing is live."""

    def get(what: str, path: str) -> str:
        command = [str(lab.kubectl), f"--kubeconfig={lab.kubeconfig}", "-n", namespace, "get"]
        command += [what, "--ignore-not-found", "-o", f"jsonpath={{{path}}}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise DemoFailed(f"kubectl get {what}: {done.stderr.strip()}")
        return done.stdout

    slot = get(f"service/{model.object_name}", r".spec.selector.vllm-promotion\.io/slot")
    deployment = f"deployment/{model.object_name}-{slot}"
    return get(deployment, r".metadata.annotations.vllm-promotion\.io/commit") if slot else ""


def follow(
    process: "subprocess.Popen[bytes]", new: Callable[[], set[Path]], log: Path
) -> list[dict[str, Any]]:
    """Print each stage's line as it is written, until the run ends. Returns the stages.

    Raises DemoFailed after PROMOTION_SECONDS.
    """
    row = "   {:<17} {:>7}  {:<11}  {}"
    print(row.format("stage", "seconds", "outcome", "decided by"))
    stages: list[dict[str, Any]] = []
    deadline = time.monotonic() + PROMOTION_SECONDS
    ended = False
    while not ended:
        if time.monotonic() > deadline:
            raise DemoFailed(
                f"the promotion had not ended after {PROMOTION_SECONDS} s; {tail(log)}"
            )
        time.sleep(0.3)
        ended = process.poll() is not None
        files = [folder / "stages.jsonl" for folder in new()]
        lines = [line for f in files if f.exists() for line in f.read_text().splitlines()]
        for stage in map(json.loads, lines[len(stages) :]):
            stages.append(stage)
            seconds = f"{stage['seconds']:.1f}"
            print(row.format(stage["stage"], seconds, stage["outcome"], stage["decided_by"]))
    return stages


def check(act: Act, run: Run) -> None:
    """Raise DemoFailed unless the run ended as the act says."""
    last = run.stages[-1] if run.stages else {"stage": "nothing", "outcome": "ran"}
    ended = f"{last['stage']}: {last['outcome']}, exit status {run.status}"
    moved = any((s["stage"], s["outcome"]) == ("promoted_model", "passed") for s in run.stages)
    if act.live and (run.status != 0 or not moved):
        raise DemoFailed(f"{act.title} should be live, but {ended}\n{tail(run.log)}")
    if not act.live and (
        run.status == 0 or last["stage"] != act.gate or last["outcome"] != "refused"
    ):
        raise DemoFailed(
            f"{act.title} should be refused by {act.gate}, but {ended}\n{tail(run.log)}"
        )


def epilogue(model: ModelSpec) -> None:
    """Where to go from here."""
    print(
        f"""
reports:  {shown(HOME / "reports" / model.name)}/*/report.html
next:
  make ui      Dagster's UI with this history, on a lab
  make lab     keep a lab running; then, with the KUBECONFIG that it prints:
               kubectl -n llm get deploy,scaledobject,lease,configmap
               python -m k8s diff {model.name}     what a promotion would change
  your model   copy catalog/models/{model.name}.yaml, then dagster job execute as above
  your cluster copy catalog/clusters/eks-example.yaml, and see docs/own-cluster.md"""
    )


def environment(lab: labs.Lab, cluster: str) -> dict[str, str]:
    """What a shell must export to promote to the lab with the pipeline's own account."""
    return os.environ | {
        "KUBECONFIG": str(lab.promoter_kubeconfig),
        "PROMOTION_CLUSTER": cluster,
        "DAGSTER_HOME": str(HOME),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": labs.QUIET_DAGSTER,
    }


def prepare_home() -> None:
    """An instance of Dagster's own, beside nothing of the user's."""
    HOME.mkdir(exist_ok=True)
    (HOME / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")


def shown(path: Path) -> str:
    """The path as short as it can be from where the user stands."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    text = path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join("   | " + line for line in text)


if __name__ == "__main__":
    sys.exit(main())
