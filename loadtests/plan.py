"""What is sent and when: every request of a window, drawn before it starts, from the seed. Pure.

Two runs with one seed offer the same arrivals, lengths, models and turns. Only the words of the
prompts differ, since a prefix cache would know them from the first run.
"""

import heapq
import random
import secrets
from bisect import bisect
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from catalog.lengths import Lengths
from catalog.offered_load import requests_of_step
from catalog.trace import Recorded, read_trace
from loadtests.answer import Phase
from loadtests.arrivals import draw, even, replay
from loadtests.profile import Profile

# Of texts that can be told apart by their first three words (prompts.py).
KEYS = 256**3


@dataclass(frozen=True)
class Text:
    """`tokens` of text; of two with the same `key`, the shorter is the start of the longer."""

    key: int
    tokens: int


@dataclass(frozen=True)
class Planned:
    """One request. `at_ns` counts from the start of the window's warm-up.

    `messages`: the prompt; of a conversation's later `turn` (from 1) its history too, with user
    and assistant by turns. Each is a row of texts.
    """

    number: int
    at_ns: int
    phase: Phase
    model: str
    messages: tuple[tuple[Text, ...], ...]
    output_tokens: int
    turn: int = 1

    @property
    def prompt_tokens(self) -> int:
        """Those of the whole prompt, without what a chat template adds to each message."""
        return sum(text.tokens for message in self.messages for text in message)

    def as_json(self) -> dict[str, Any]:
        """For a worker; `planned` reads it."""
        return asdict(self)


def planned(fields: dict[str, Any]) -> Planned:
    """What as_json wrote."""
    messages = tuple(tuple(Text(**text) for text in message) for message in fields["messages"])
    return Planned(**{**fields, "messages": messages})


@dataclass
class _Conversation:
    model: str
    turn: int = 1
    history: list[tuple[Text, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Drawn:
    """What stands for each arrival before it is known whose turn it is."""

    at_s: float
    phase: Phase
    prompt_tokens: int
    output_tokens: int
    model: str
    beginning: int
    recorded: Recorded | None


class Planner:
    """Draws the windows of one run.

    `repeated_tokens` of the `tokens` planned so far stood at the start of an earlier prompt too.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.tokens = self.repeated_tokens = 0
        # Not from the seed: no two runs may share prompts.
        self._key = secrets.randbelow(KEYS)
        trace = profile.trace
        self._trace = read_trace(Path(trace.path), profile.arrival)[0] if trace else ()
        shared = profile.shared_prefix
        self._beginnings = [self.key() for _ in range(shared.count)] if shared else []
        self._blocks: dict[int, int] = {}  # keys of a trace's blocks
        self._sent: dict[int, int] = {}  # how much of each text

    def key(self) -> int:
        """A new text's key."""
        self._key = (self._key + 0x9E3779) % KEYS
        return self._key

    @property
    def longest(self) -> int:
        """Tokens of the longest request that there may be, prompt and answer, but for what a
        chat template adds."""
        profile = self.profile
        if profile.prompt_tokens.trace and profile.output_tokens.trace:
            return max(row.prompt_tokens + row.output_tokens for row in self._trace)
        prompt, output = profile.prompt_tokens.most, profile.output_tokens.most
        if profile.prompt_tokens.trace:
            prompt = max(row.prompt_tokens for row in self._trace)
        if profile.output_tokens.trace:
            output = max(row.output_tokens for row in self._trace)
        turns = profile.conversations.turns if profile.conversations else 1
        return turns * (prompt + output) + (
            profile.shared_prefix.tokens if profile.shared_prefix else 0
        )

    def window(self, rate: float, repeat: int) -> list[Planned]:
        """Warm-up and measured window at `rate`, in the order of time."""
        drawn = list(self._draw(rate, repeat))
        plan = self._turns(drawn, rate, repeat) if self.profile.conversations else self._plan(drawn)
        for one in plan:
            self._count(one)
        return plan

    def _draw(self, rate: float, repeat: int) -> Iterator[_Drawn]:
        profile = self.profile
        warmup = round(profile.warmup_seconds * rate)
        measured = requests_of_step(rate, profile.step_seconds, profile.slo)
        first = repeat * (warmup + measured)  # in the trace: each window goes on in it
        phases: list[tuple[Phase, float, int]] = [
            ("warmup", 0.0, warmup),
            ("measure", profile.warmup_seconds, measured),
        ]
        for phase, offset, count in phases:
            seed = f"{profile.seed} {rate!r} {repeat} {phase}"
            if profile.arrival == "trace":
                times = replay([row.at_s for row in self._trace], rate, count, first)
            else:
                times = draw(profile.arrival, rate, count, seed, profile.gamma_shape)
            size = len(self._trace)
            records = [self._trace[(first + n) % size] if size else None for n in range(count)]
            first += count
            prompts = [record.prompt_tokens for record in records if record]
            outputs = [record.output_tokens for record in records if record]
            drawn = zip(
                times,
                _lengths(profile.prompt_tokens, prompts, count, f"{seed} prompt"),
                _lengths(profile.output_tokens, outputs, count, f"{seed} output"),
                self._models(count, f"{seed} model"),
                even(count, f"{seed} prefix"),
                records,
                strict=True,
            )
            for at, prompt, output, model, share, record in drawn:
                beginning = int(share * len(self._beginnings))
                yield _Drawn(offset + at, phase, prompt, output, model, beginning, record)

    def _models(self, count: int, seed: str) -> list[str]:
        weights = self.profile.models or {self.profile.model: 1.0}
        names, ends = list(weights), list(accumulate(weights.values()))
        return [names[bisect(ends, share * ends[-1])] for share in even(count, seed)]

    def _plan(self, drawn: list[_Drawn]) -> list[Planned]:
        return [
            Planned(
                number=number,
                at_ns=int(one.at_s * 1e9),
                phase=one.phase,
                model=one.model,
                messages=(self._prompt(one),),
                output_tokens=one.output_tokens,
            )
            for number, one in enumerate(drawn)
        ]

    def _prompt(self, one: _Drawn, turn: int = 1) -> tuple[Text, ...]:
        """The message that a request adds to the conversation, if it is in one."""
        own = Text(self.key(), one.prompt_tokens)
        shared, trace = self.profile.shared_prefix, self.profile.trace
        if shared is not None and turn == 1:
            return Text(self._beginnings[one.beginning], shared.tokens), own
        if trace is None or not trace.prefixes or one.recorded is None:
            return (own,)
        texts, left = [], one.prompt_tokens
        for block in one.recorded.blocks:
            if left <= 0:
                break
            if block not in self._blocks:
                self._blocks[block] = self.key()
            texts.append(Text(self._blocks[block], min(left, trace.block_tokens)))
            left -= trace.block_tokens
        return (*texts, Text(own.key, left)) if left > 0 else tuple(texts)

    def _turns(self, drawn: list[_Drawn], rate: float, repeat: int) -> list[Planned]:
        """Conversations over the arrivals: of those whose pause is over, the one that waits
        longest goes on, and if there is none, a new one begins. The first of a window are amidst
        one already, any turn as likely, so that prompts are as long at its start as later."""
        talk = self.profile.conversations
        assert talk is not None, "conversations are asked for"
        rng = random.Random(f"{self.profile.seed} {rate!r} {repeat} turns")
        waiting: list[tuple[float, int, _Conversation]] = []
        plan: list[Planned] = []
        for number, one in enumerate(drawn):
            if waiting and waiting[0][0] <= one.at_s:
                conversation = heapq.heappop(waiting)[2]
            else:
                conversation = _Conversation(one.model)
                before = rng.randrange(talk.turns) if one.at_s < talk.think_s else 0
                for _ in range(before):
                    self._say(conversation, one)
            history, turn = tuple(conversation.history), conversation.turn
            new = self._say(conversation, one)
            plan.append(
                Planned(
                    number=number,
                    at_ns=int(one.at_s * 1e9),
                    phase=one.phase,
                    model=conversation.model,
                    messages=(*history, new),
                    output_tokens=one.output_tokens,
                    turn=turn,
                )
            )
            if turn < talk.turns:
                heapq.heappush(waiting, (one.at_s + talk.think_s, number, conversation))
        return plan

    def _say(self, conversation: _Conversation, one: _Drawn) -> tuple[Text, ...]:
        """Adds a turn, and what stands in for its answer; the turn's own message."""
        new = self._prompt(one, conversation.turn)
        conversation.history += [new, (Text(self.key(), one.output_tokens),)]
        conversation.turn += 1
        return new

    def _count(self, one: Planned) -> None:
        self.tokens += one.prompt_tokens
        if not self.profile.shares_prefixes:
            return
        same = True  # as an earlier prompt, up to here
        for text in (text for message in one.messages for text in message):
            before = self._sent.get(text.key, 0)
            self.repeated_tokens += min(before, text.tokens) if same else 0
            same = same and before >= text.tokens
            self._sent[text.key] = max(before, text.tokens)


def _lengths(law: Lengths, recorded: list[int], count: int, seed: str) -> list[int]:
    return recorded if law.trace else [law.at(share) for share in even(count, seed)]
