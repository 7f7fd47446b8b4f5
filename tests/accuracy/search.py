"""A search for λ* on the reference server's queue, whose knee is known by analysis (scenarios.py).

The peer's search doubles and bisects the rate; each rate is judged by the p95 of its own TTFTs, of
a load as long as one is told to take.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lab import model
from tests.accuracy.measure import MeasureError, printed, run, server
from tests.accuracy.scenarios import MODEL, PROMPT_TOKENS, SCENARIOS, TOKENS, knee
from tests.accuracy.tools import OURS, Load, aiperf

SCENARIO = SCENARIOS["knee"]
TTFT_MS = 20.0
assert SCENARIO.queue is not None
TRUE = knee(SCENARIO.queue, TTFT_MS)
# Where the search starts and how far it may go, as shares of λ*: nobody knows it before.
START, LOWEST, HIGHEST = 1 / 4, 1 / 8, 2.0
BUDGET_S = 240.0
# About what a bisection needs at each rate to be within 5 % in the end: 113,000 requests in all
# (docs/accuracy.md).
AIPERF_RATE_S = 30.0
MOST_S = 1500.0


@dataclass(frozen=True)
class Found:
    """What a search said. `highest_pass`: the highest rate that it called good, 0 if none.
    `load_seconds`: as the server saw it, so without what passed between the loads."""

    rate: float
    lower: float
    upper: float
    highest_pass: float
    load_seconds: float
    requests: int
    cpu_seconds: float


Said = tuple[float, float, float, float]


def search(tool: str, seed: int) -> Found:
    """Has `tool` search λ* once. Raises MeasureError."""
    command, read = SEARCHES[tool]
    with tempfile.TemporaryDirectory(prefix="accuracy-") as name:
        folder = Path(name)
        with server(SCENARIO, seed, folder / "truth.json") as port:
            load = Load(
                url=f"http://127.0.0.1:{port}",
                chat=False,
                rate=TRUE * START,
                count=0,
                seed=seed,
                tokenizer=model.checkpoint(print),
                folder=folder,
            )
            cpu = run(tool, command(load), folder, MOST_S)
        log = json.loads((folder / "truth.json").read_text())
        arrivals = sorted(request["arrived"] for request in log["requests"])
        try:
            said = read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MeasureError(f"{tool} found nothing: {error!r}\n{printed(folder)}") from None
    return Found(*said, loaded(arrivals), len(arrivals), cpu)


def loaded(arrivals: Sequence[int]) -> float:
    """Seconds in which requests came: between those (ns) that are less than a second apart."""
    return sum(gap for gap in (b - a for a, b in pairwise(arrivals)) if gap < 1e9) / 1e9


def _ours(load: Load) -> list[str]:
    profile = {
        "base_url": load.url,
        "model": MODEL,
        "mode": "search",
        "rate_range": [TRUE * LOWEST, TRUE * HIGHEST],
        "budget_seconds": BUDGET_S,
        "warmup_seconds": 2,
        "seed": load.seed,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": TOKENS,
        "timeout_s": 20,
        "slo": {"ttft_p95_ms": TTFT_MS, "itl_p95_ms": 250, "required_rate": load.rate},
        "metadata": {"simulated": ["engine: reference server"]},
    }
    path = load.folder / "profile.json"
    path.write_text(json.dumps(profile))
    return [sys.executable, "-m", "loadtests", "--profile", str(path), "--out", str(load.folder)]


def _read_ours(folder: Path) -> Said:
    result = json.loads((folder / "result.json").read_text())
    found = result["capacity"]
    passed = [step["rate_asked"] for step in result["steps"] if step["verdict"] == "pass"]
    return found["estimate"], found["lower"], found["upper"], max(passed, default=0.0)


def _aiperf(load: Load) -> list[str]:
    space = f"phases.profiling.rate:{TRUE * LOWEST:.0f},{TRUE * HIGHEST:.0f}:int"
    command = [*aiperf(load), "--benchmark-duration", f"{AIPERF_RATE_S:g}"]
    command += ["--search-space", space, "--search-planner", "monotonic-sla"]
    command += ["--search-metric", "request_throughput", "--search-direction", "maximize"]
    command += ["--search-max-iterations", "20"]
    return [*command, "--search-sla", f"time_to_first_token:p95:lt:{TTFT_MS:g}"]


def _read_aiperf(folder: Path) -> Said:
    [path] = folder.rglob("search_history.json")
    ends = json.loads(path.read_text())["boundary_summary"]
    good, bad = (ends[end]["value"] for end in ("feasible_max", "infeasible_min"))
    return (good + bad) / 2, good, bad, good


SEARCHES: Mapping[str, tuple[Callable[[Load], list[str]], Callable[[Path], Said]]] = {
    OURS: (_ours, _read_ours),
    "aiperf": (_aiperf, _read_aiperf),
}
