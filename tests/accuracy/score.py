"""How far a tool's numbers are from the server's log: matching, errors, quantiles. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

SETTLE_S = 2.0  # from the first request: connections open, caches fill


@dataclass(frozen=True)
class Truth:
    """What the server did with one request. `tokens`: (time in ns, tokens written then)."""

    id: str
    prompt: str
    arrived: int
    tokens: tuple[tuple[int, int], ...]
    fault: str

    @property
    def ttft_ms(self) -> float:
        """From the request's arrival to its first token."""
        return (self.tokens[0][0] - self.arrived) / 1e6

    @property
    def gaps_ms(self) -> list[float]:
        """Between tokens: the gap before a chunk is shared by the tokens that it brings."""
        gaps = []
        for (before, _), (now, count) in pairwise(self.tokens):
            gaps += [(now - before) / 1e6 / count] * count
        return gaps


@dataclass(frozen=True)
class Answer:
    """What a tool says about one request. `key`: the request's id, or its prompt. `gaps_ms`: its
    inter-token latencies as it reports them, one a token, one a chunk, or only their mean."""

    key: str
    failed: bool
    ttft_ms: float | None = None
    gaps_ms: Sequence[float] = ()


@dataclass(frozen=True)
class Score:
    """Errors in ms, of all requests that were answered well and that the tool took for good.

    `missing`: requests that the tool doesn't mention. `misjudged`: good ones that it counts as
    failed, or failed ones that it counts as good.
    """

    ttft_errors: Sequence[float]
    itl_errors: Sequence[float]
    achieved_rate: float
    missing: int
    misjudged: int
    arrivals: Sequence[int] = field(repr=False)


def read_truth(log: Mapping[str, Any]) -> list[Truth]:
    """The server's log."""
    return [
        Truth(
            id=entry["id"],
            prompt=prompt_of(entry["body"]),
            arrived=entry["arrived"],
            tokens=tuple((time_ns, count) for time_ns, count in entry["tokens"]),
            fault=entry["fault"],
        )
        for entry in log["requests"]
    ]


def prompt_of(body: str) -> str:
    """The prompt in the body of a request; of a chat, the text of its last message."""
    fields = json.loads(body)
    if "messages" not in fields:
        return str(fields["prompt"])
    content = fields["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def settled(truths: Iterable[Truth]) -> list[Truth]:
    """Those that arrived once the load had settled, in the order of arrival."""
    ordered = sorted(truths, key=lambda truth: truth.arrived)
    return [truth for truth in ordered if truth.arrived - ordered[0].arrived >= SETTLE_S * 1e9]


def score(truths: Sequence[Truth], answers: Iterable[Answer]) -> Score:
    """Compares a tool's answers with what the server did, request by request.

    `truths` are those to score: answers about others are passed over. The error of a TTFT is that
    of the duration: what the tool says, less what passed between the request's arrival at the
    server and the writing of its first token. So it has the tool's delays at both ends in it.
    """
    by_key = {answer.key: answer for answer in answers}
    ttft, itl = [], []
    missing = misjudged = 0
    for truth in truths:
        answer = by_key.get(truth.id) or by_key.get(truth.prompt)
        if answer is None:
            missing += 1
        elif answer.failed != bool(truth.fault) or (not answer.failed and answer.ttft_ms is None):
            misjudged += 1
        elif not answer.failed and answer.ttft_ms is not None:
            ttft.append(abs(answer.ttft_ms - truth.ttft_ms))
            itl += gap_errors(truth.gaps_ms, answer.gaps_ms)
    arrivals = [truth.arrived for truth in truths]
    return Score(ttft, itl, rate(arrivals), missing, misjudged, arrivals)


def gap_errors(true: Sequence[float], said: Sequence[float]) -> list[float]:
    """Of each gap that a tool reports. Where it reports others than those between tokens (a mean,
    or gaps between chunks), each is compared with the true mean between tokens."""
    if len(said) == len(true):
        return [abs(a - b) for a, b in zip(said, true, strict=True)]
    mean = sum(true) / len(true)
    return [abs(gap - mean) for gap in said]


def rate(arrivals: Sequence[int]) -> float:
    """Arrivals a second, between the first and the last."""
    if len(arrivals) < 2:
        return 0.0
    return (len(arrivals) - 1) / ((max(arrivals) - min(arrivals)) / 1e9)


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99, linearly interpolated; None where there are no values."""
    return {f"p{q}": quantile(values, q / 100) for q in (50, 95, 99)}


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile, linearly interpolated; None if there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = ordered[math.floor(at)]
    return round(below + (ordered[math.ceil(at)] - below) * (at - math.floor(at)), 4)


def poisson_p(arrivals: Sequence[int], asked: float) -> float:
    """The Kolmogorov-Smirnov test of the gaps between arrivals (ns) against the exponential law
    with mean 1/`asked` s: the probability of a distance as large, if that is their law.

    Asymptotic, with Stephens's correction (1970) for the number of gaps.
    """
    gaps = sorted((b - a) / 1e9 for a, b in pairwise(sorted(arrivals)))
    n = len(gaps)
    distance = 0.0
    for i, gap in enumerate(gaps):
        law = 1.0 - math.exp(-asked * gap)
        distance = max(distance, law - i / n, (i + 1) / n - law)
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:
        return 1.0
    total = sum((-1.0) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
