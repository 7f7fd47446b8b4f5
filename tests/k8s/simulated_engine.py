"""A candidate's Pods on the simulated node: what a kubelet reports, at a test's command."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from k8s.client import Client
from k8s.errors import NotFound
from k8s.manifests.release import ENGINE, GPU_CHECK, Release, engine_selector
from tests.k8s.simulated_node import Run, SimulatedNode, now_ns, patch_status

Obj = dict[str, Any]
DIGEST = "docker.io/vllm/vllm-openai@sha256:" + "c" * 64


@dataclass
class EnginePod:
    """One Pod of a slot. `runs`: of its engine, with the log of each."""

    client: Client
    name: str
    runs: list[Run] = field(default_factory=list)
    check: Obj = field(default_factory=dict)
    ready: bool = False
    _last: Obj = field(default_factory=dict)

    def check_ends(self, code: int = 0, *lines: str) -> None:
        """nvidia-smi has printed the lines and ended."""
        run = Run(f"simulated://{uuid.uuid4().hex}", [f"{now_ns()} {line}" for line in lines])
        self.runs.append(run)  # the node serves one log at a time
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}
        self.check = {"terminated": ended | {"containerID": run.container_id}}
        self._report({"waiting": {"reason": "PodInitializing"}})

    def waits(self, reason: str, message: str) -> None:
        """The engine's container can't be started."""
        self._report({"waiting": {"reason": reason, "message": message}})

    def starts(self, *lines: str) -> None:
        """The engine runs and writes these lines."""
        self.check = self.check or {"terminated": {"exitCode": 0, "reason": "Completed"}}
        self.runs.append(Run(f"simulated://{uuid.uuid4().hex}"))
        self.writes(*lines)
        self._report({"running": {"startedAt": _now()}})

    def writes(self, *lines: str) -> None:
        self.runs[-1].lines += [f"{now_ns()} {line}" for line in lines]

    def becomes_ready(self, ready: bool = True) -> None:
        self.ready = ready
        self._report({"running": {"startedAt": _now()}})

    def ends(self, code: int = 1, reason: str = "Error") -> None:
        """The engine ends; the kubelet waits before it starts it again."""
        self.runs[-1].ended = True
        self.ready = False
        ended = {"exitCode": code, "reason": reason, "containerID": self.runs[-1].container_id}
        self._last = {"terminated": ended}
        self._report({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}})

    def fails(self, reason: str) -> None:
        """The kubelet evicts the Pod, or doesn't admit it."""
        self.ready = False
        patch_status(self.client, self.name, {"phase": "Failed", "reason": reason})

    def _report(self, state: Obj) -> None:
        restarts = len([run for run in self.runs if run.ended])
        ready = "True" if self.ready else "False"
        engine = {
            "name": ENGINE,
            "image": "i",
            "imageID": f"docker-pullable://{DIGEST}",
            "ready": self.ready,
            "restartCount": restarts,
            "state": state,
            "lastState": self._last,
        }
        check = {"name": GPU_CHECK, "image": "i", "imageID": "i", "ready": True, "restartCount": 0}
        conditions = [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": ready, "lastTransitionTime": _now()},
        ]
        status = {
            "phase": "Running" if self.check else "Pending",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": conditions,
            "initContainerStatuses": [check | {"state": self.check, "lastState": {}}],
            "containerStatuses": [engine],
        }
        patch_status(self.client, self.name, status)


def unschedulable(client: Client, pod: str, message: str) -> None:
    """What the scheduler reports."""
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    patch_status(client, pod, {"phase": "Pending", "conditions": [condition]})


@contextlib.contextmanager
def playing(
    node: SimulatedNode, release: Release, script: Callable[[EnginePod], None]
) -> Iterator[list[EnginePod]]:
    """Put each Pod of the slot on the node and run the script for it, until the block ends."""
    over = threading.Event()
    pods: list[EnginePod] = []

    def play() -> None:
        while not over.wait(0.1):
            for pod in _waiting(node.client, release):
                engine = EnginePod(node.client, pod)
                node.pods[pod] = engine  # type: ignore[assignment]
                # A Pod that is replaced meanwhile is gone; its successor comes next.
                with contextlib.suppress(NotFound):
                    node._bind(pod)
                    pods.append(engine)
                    script(engine)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield pods
    finally:
        over.set()
        thread.join(timeout=10)


def _waiting(client: Client, release: Release) -> list[str]:
    return [
        pod["metadata"]["name"]
        for pod in client.list("Pod", labels=engine_selector(release.model, release.slot))
        if not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]
    ]


def comes_up(engine: EnginePod) -> None:
    """The script of a good candidate."""
    engine.check_ends(0, "index, name", "0, NVIDIA L4")
    engine.starts("INFO Starting vLLM")
    time.sleep(0.3)
    engine.becomes_ready()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
