"""What is sent and when: every request of a window, drawn before it starts, from the seed. Pure.

Two runs with one seed offer the same arrivals, lengths, models and turns. Only the words of the
prompts differ, since a prefix cache would know them from the first run.
"""

import secrets
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.answer import Phase
from loadtests.arrivals import draw
from loadtests.ladder import requests_of_step
from loadtests.profile import Profile

# Of texts that can be told apart by their first three words (prompts.py).
KEYS = 256**3


@dataclass(frozen=True)
class Text:
    """`tokens` of text of its own; the same `key` is the same text."""

    key: int
    tokens: int


@dataclass(frozen=True)
class Planned:
    """One request. `at_ns` counts from the start of the window's warm-up."""

    number: int
    at_ns: int
    phase: Phase
    model: str
    prompt: tuple[Text, ...]
    output_tokens: int

    def as_json(self) -> dict[str, Any]:
        """For a worker; `planned` reads it."""
        return asdict(self)


def planned(fields: dict[str, Any]) -> Planned:
    """What as_json wrote."""
    return Planned(**{**fields, "prompt": tuple(Text(**text) for text in fields["prompt"])})


class Planner:
    """Draws the windows of one run."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        # Not from the seed: no two runs may share prompts.
        self._key = secrets.randbelow(KEYS)

    def key(self) -> int:
        """A new text's key."""
        self._key = (self._key + 0x9E3779) % KEYS
        return self._key

    def window(self, rate: float, repeat: int) -> list[Planned]:
        """Warm-up and measured window at `rate`, in the order of time."""
        profile = self.profile
        phases: list[tuple[Phase, float, int]] = [
            ("warmup", 0.0, round(profile.warmup_seconds * rate)),
            ("measure", profile.warmup_seconds, requests_of_step(rate, profile)),
        ]
        plan: list[Planned] = []
        for phase, offset, count in phases:
            seed = f"{profile.seed} {rate!r} {repeat} {phase}"
            for at in draw(profile.arrival, rate, count, seed, profile.gamma_shape):
                plan.append(
                    Planned(
                        number=len(plan),
                        at_ns=int((offset + at) * 1e9),
                        phase=phase,
                        model=profile.model,
                        prompt=(Text(self.key(), profile.prompt_tokens),),
                        output_tokens=profile.output_tokens,
                    )
                )
        return plan
