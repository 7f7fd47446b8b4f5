"""The never-ending client (client.py) as a Pod of a running lab."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog import ModelSpec
from lab.kubernetes.api import Obj, load
from lab.lab import Lab, LabError

MANIFEST = Path(__file__).with_name("client.yaml")
NAME = "traffic-client"
START_SECONDS = 60
STOP_SECONDS = 60
PORT = 8000  # of the model's Service


@dataclass(frozen=True)
class TrafficClient:
    """The running Pod. `stop` ends it and returns its summary (client.Tally.summary)."""

    lab: Lab
    namespace: str
    model: ModelSpec

    @classmethod
    def start(cls, lab: Lab, namespace: str, model: ModelSpec, *options: str) -> "TrafficClient":
        """Starts it against the model's Service, in place of one that an earlier run left, and
        returns when it has had its first answers. `options` are client.py's. Raises LabError."""
        client = cls(lab, namespace, model)
        client.kubectl("delete", "pod", NAME, "--ignore-not-found", "--grace-period=0", "--force")
        client.kubectl("apply", "-f", "-", stdin=json.dumps(pod(namespace, model, *options)))
        end = time.monotonic() + START_SECONDS
        while not any(line["requests"] for line in client.lines()):
            if time.monotonic() > end:
                state = client.kubectl("describe", "pod", NAME)[-1500:]
                raise LabError(f"the client got no answer in {START_SECONDS} s:\n{state}")
            time.sleep(0.5)
        return client

    def check_alive(self) -> None:
        """Raises LabError if the Pod doesn't run any more."""
        phase = self.kubectl("get", "pod", NAME, "-o", "jsonpath={.status.phase}")
        if phase != "Running":
            raise LabError(
                f"the client Pod is {phase or 'gone'}: {self.kubectl('logs', NAME)[-800:]}"
            )

    def stream(self, tokens: int) -> "subprocess.Popen[str]":
        """Asks beside that for one streamed answer, from the same Pod. The process ends when it
        has arrived or broken off, and prints what Client.stream returns."""
        command = client_command(self.namespace, self.model, "--stream", str(tokens))
        return subprocess.Popen(
            self._argv("exec", NAME, "--", *command), stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> dict[str, Any]:
        """Ends the Pod and returns its summary. Raises LabError."""
        following = subprocess.Popen(
            self._argv("logs", "-f", NAME, "--tail=5"), stdout=subprocess.PIPE, text=True
        )
        try:
            self.kubectl("delete", "pod", NAME, "--wait=false")
            out, _ = following.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"the client did not end within {STOP_SECONDS} s") from error
        finally:
            following.kill()
        for line in _parse(out):
            if line["event"] == "summary":
                return line
        raise LabError(f"the client left no summary; its last lines: {out[-500:]}")

    def lines(self) -> list[dict[str, Any]]:
        """What it has printed so far, one object a second."""
        argv = self._argv("logs", NAME, "--tail=100")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        return _parse(done.stdout)  # nothing, while the Pod starts

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Runs kubectl as the lab's admin; returns its output. Raises LabError."""
        done = subprocess.run(
            self._argv(*arguments), input=stdin, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise LabError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _argv(self, *arguments: str) -> list[str]:
        config = f"--kubeconfig={self.lab.kubeconfig}"
        return [str(self.lab.kubectl), config, "-n", self.namespace, *arguments]


def pod(namespace: str, model: ModelSpec, *options: str) -> Obj:
    """The Pod for a model's Service."""
    (made,) = load(MANIFEST.read_text())
    made["spec"]["containers"][0]["command"] = client_command(namespace, model, *options)
    made["metadata"]["namespace"] = namespace
    return made


def client_command(namespace: str, model: ModelSpec, *options: str) -> list[str]:
    """client.py for a model's Service."""
    url = f"http://{model.object_name}.{namespace}.svc:{PORT}"
    return ["python", "-m", "lab.client", url, model.served_name, *options]


def _parse(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"event"')]
