"""A real hub on a real socket, and the unmodified client that talks to it."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from lab.hub import Hub, HubServer
from weights.events import Reporter
from weights.fetch import Fetched, Wanted, fetch
from weights.hub import connect
from weights.manifest import Selection
from weights.pace import Patience

ROOT = Path(__file__).parents[2]
REPO = "lab/model"
TEMPLATE = {"chat_template": "{{ messages[0]['content'] }}"}
QUICK = Patience(stall_s=20.0, attempts=3, first_wait_s=0.02)

Files = Mapping[str, bytes]


def tensors(*names: str, size: int = 64) -> bytes:
    """A safetensors file with these tensors."""
    return save({name: np.full((size,), len(name), np.float32) for name in names})


def index(**tensor_to_file: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": tensor_to_file}).encode()


def model(**more: bytes) -> dict[str, bytes]:
    """A small whole repository; `more` with __ for the dots of names."""
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer_config.json": json.dumps(TEMPLATE).encode(),
        "model.safetensors": tensors("a", "b"),
    }
    return files | {name.replace("__", "."): content for name, content in more.items()}


@dataclass
class World:
    """A hub with one repository, and a volume to fetch to."""

    server: HubServer
    root: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: Files, **more: Any) -> str:
        return self.server.hub.commit(REPO, dict(files), **more)

    def fetch(
        self,
        commit: str,
        *,
        token: str | None = None,
        chat: bool = False,
        patience: Patience = QUICK,
        rehash: bool = False,
        rehash_after_days: float = math.inf,
        **selection: Any,
    ) -> Fetched:
        """In this process. What it reported is in `events`, also when it raises."""
        out = io.StringIO()
        hub = connect({"HF_ENDPOINT": self.server.url, "HF_TOKEN": token or ""})
        chosen = Selection(**selection)
        wanted = Wanted(REPO, commit, chosen, chat, rehash, rehash_after_days)
        try:
            return fetch(wanted, self.root, hub, Reporter(out), patience)
        finally:
            self.events += [json.loads(line) for line in out.getvalue().splitlines()]

    def start(
        self, *arguments: str, under: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """`python -m weights …` as a process of its own, started by the program `under`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        home = str(self.root.parent / "home")
        return subprocess.Popen(
            [*under, sys.executable, "-m", "weights", *arguments],
            cwd=ROOT,
            env={**clean, "HF_ENDPOINT": self.server.url, "HF_HOME": home, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fetch_arguments(self, commit: str) -> tuple[str, ...]:
        return ("fetch", "--repo", REPO, "--commit", commit, "--root", str(self.root))

    def published(self, commit: str) -> dict[str, bytes]:
        """What a reader of the volume sees of the commit: nothing, or all of it."""
        folder = self.root / REPO / commit
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "MANIFEST.json"
        }

    def left_over(self) -> list[str]:
        """Everything beside published commits."""
        return [path.name for path in (self.root / REPO).glob(".*")]

    def gets(self, name: str) -> int:
        """How often a file's content was asked for."""
        return sum(r.method == "GET" and r.path.endswith(f"/{name}") for r in self.server.requests)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = tmp_path / "models"
    root.mkdir()
    with HubServer(Hub(tmp_path / "hub")) as server:
        yield World(server, root)
