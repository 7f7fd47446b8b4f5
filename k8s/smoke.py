"""The smoke test of a candidate: GPU truth, health, name, known answers, moving counters."""

from collections.abc import Callable
from dataclasses import dataclass

from k8s.client import Client
from k8s.gpus import Gpu
from k8s.manifests import Release
from k8s.rollout import Rollout


@dataclass(frozen=True)
class Answer:
    """What the engine gave to a known prompt. `text` None: no text at all."""

    prompt: str
    expect: str
    text: str | None
    tokens: int
    ok: bool


@dataclass(frozen=True)
class SmokeReport:
    """All that was looked at. `failures`: a sentence each; none means passed."""

    gpus: tuple[Gpu, ...]
    driver: str
    health: int
    model_id: str
    model_root: str
    answers: tuple[Answer, ...]
    tokens_advanced: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def summary(self) -> str:
        """One line for the gate."""
        raise NotImplementedError


def smoke_test(
    client: Client,
    release: Release,
    rollout: Rollout,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> SmokeReport:
    """Ask the candidate's Pod. A failing candidate gives a report with failures, no error."""
    raise NotImplementedError
