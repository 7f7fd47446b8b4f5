"""`make accuracy`: how right this project's times are, and those of the other load generators.

Each tool loads the reference server (server.py), whose log is the truth; client and server have a
core each. Leaves .accuracy/results.json and .accuracy/picture.png, prints a table, and exits with
status 1 if a limit is missed, which it names.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from catalog.offered_load import MOST_RATE
from tests.accuracy.measure import (
    CLIENT_CORE,
    ROOT,
    Beside,
    MeasureError,
    Run,
    measure,
    pinned,
    real_time,
)
from tests.accuracy.picture import picture
from tests.accuracy.scenarios import SCENARIOS
from tests.accuracy.score import poisson_p, quantiles
from tests.accuracy.search import SEARCHES, TRUE, search
from tests.accuracy.tools import OURS, TOOLS, available

OUT = ROOT / ".accuracy"
RATES = (50.0, 300.0, 1000.0, 1500.0)
FIXED_SECONDS = 8.0
BEHAVIOUR_RATE, BEHAVIOUR_SECONDS = 50.0, 7.0
# What a tool makes of an error doesn't depend on the moment; how late its clock is does.
REPEATS = {"fixed": 5, "several_tokens": 5}
# A tool that falls this far short of a rate is not asked for a higher one.
SENT_LEAST = 0.9
PLANTED, PLANTED_RUNS = "planted", 20
HOGS = 24
SATURATING_RATE = 30000.0
PAUSE_S, PAUSE_EVERY_S = 1.0, 1.0
# Limits, in ms and requests/s.
TTFT_P99_MS = ITL_P99_MS = 0.5
SHARE_OF_BEST_PEER = 1 / 3
TOP_RATE, TOP_TTFT_P99_MS = 1500.0, 5.0
RATE_OFF = 0.01
KS_LEVEL = 0.05
# Searches for λ*: how many, of the peer fewer since each takes minutes.
SEEDS, SEEDS_OF_PEER = 20, 3
FOUND_OFF, PASS_OFF = 0.05, 0.02
SHARE_OF_PEERS_LOAD = 1 / 2

Row = dict[str, Any]


def main() -> int:
    """Measures, judges, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help="of those that are installed")
    parser.add_argument("--scenarios", default=",".join([*SCENARIOS, PLANTED]))
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument("--repeats", type=int, help="of all; by default fewer where no time counts")
    options = parser.parse_args()
    found = available()
    if wrong := _wrong(options, found):
        print(wrong, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running
    if (os.cpu_count() or 1) < 2:
        print("make accuracy needs two cores: one for the server, one for the tool")
        return 2
    tools = [tool for tool in options.tools.split(",") if tool in found]
    for tool in TOOLS:
        if tool not in found:
            print(f"{tool} isn't installed and not compared (make accuracy-peers)")
    versions = {
        **found,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "scheduling": "real-time" if real_time() else "as others",
    }
    rates = [float(rate) for rate in options.rates.split(",")]
    scenarios = options.scenarios.split(",")
    rows: list[Row] = []
    for row in _measured(tools, scenarios, rates, options.repeats):
        rows.append({**row, "versions": versions})
        _save(rows)
    print(_table(rows))
    (OUT / "picture.png").write_bytes(picture(rows))
    print(f"{OUT / 'results.json'}, {OUT / 'picture.png'}")
    missed = list(_missed(rows))
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def _wrong(options: argparse.Namespace, found: Mapping[str, str]) -> str:
    """What can't be measured of what was asked for, in a line; empty if all can."""
    for flag, asked, known in (
        ("--tools", options.tools, list(TOOLS)),
        ("--scenarios", options.scenarios, [*SCENARIOS, PLANTED]),
    ):
        if unknown := [name for name in asked.split(",") if name not in known]:
            return f"{flag}: no {', '.join(map(repr, unknown))}; there are: {', '.join(known)}"
    if not set(options.tools.split(",")) & set(found):
        return (
            f"--tools: {options.tools} isn't installed (make accuracy-peers); there are: "
            f"{', '.join(found)}"
        )
    try:
        rates = [float(rate) for rate in options.rates.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= MOST_RATE for rate in rates):
        return f"--rates: must be numbers above 0, at most {MOST_RATE}; got {options.rates!r}"
    if options.repeats is not None and options.repeats < 1:
        return f"--repeats: must be 1 or more, got {options.repeats}"
    return ""


def _measured(
    tools: Sequence[str], scenarios: Sequence[str], rates: Sequence[float], repeats: int | None
) -> Iterator[Row]:
    short: dict[str, float] = {}  # tool: the rate that it fell short of
    for name in scenarios:
        if name == PLANTED:
            if OURS in tools:
                yield from _planted()
            continue
        if name == "knee":
            for repeat in range(repeats or SEEDS):
                for tool in (tool for tool in SEARCHES if tool in tools):
                    if tool == OURS or repeat < SEEDS_OF_PEER:
                        yield _searched(tool, repeat)
            continue
        fixed = name == "fixed"
        for rate in rates if fixed else [BEHAVIOUR_RATE]:
            for repeat in range(repeats or REPEATS.get(name, 1)):
                # In alternating order, so that what the machine does beside it falls on all.
                for tool in tools if repeat % 2 == 0 else tools[::-1]:
                    if fixed and rate > short.get(tool, rate):
                        continue
                    seconds = FIXED_SECONDS if fixed else BEHAVIOUR_SECONDS
                    row = _row(tool, name, rate, repeat, seconds)
                    if fixed and row["achieved_rate"] < SENT_LEAST * rate:
                        short[tool] = rate
                    yield row


def _row(
    tool: str,
    scenario: str,
    rate: float,
    repeat: int,
    seconds: float,
    beside: Beside | None = None,
    named: str = "",
) -> Row:
    started = time.monotonic()
    row: Row = {"tool": tool, "scenario": named or scenario, "rate": rate, "repeat": repeat}
    try:
        run = measure(tool, SCENARIOS[scenario], rate, seconds, repeat + 1, beside)
    except MeasureError as error:
        print(f"{tool} {scenario} {rate:g} req/s: {error}", flush=True)
        return {**row, **_numbers(None), "error": str(error)}
    row |= _numbers(run)
    if scenario == "fixed":
        row["poisson_p"] = round(poisson_p(run.score.arrivals, rate), 4)
    p99 = row["ttft_error_ms"]["p99"]
    print(
        f"{tool} {row['scenario']} {rate:g} req/s #{repeat}: TTFT error p99 {p99} ms, ITL "
        f"{row['itl_error_ms']['p99']} ms, sent {row['achieved_rate']:g}/s, missing "
        f"{row['missing']}, misjudged {row['misjudged']} {row.get('verdict', '')} "
        f"({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return row


def _numbers(run: Run | None) -> Row:
    if run is None:
        nothing = quantiles([])
        return {"ttft_error_ms": nothing, "itl_error_ms": nothing, "achieved_rate": 0.0} | {
            "cpu_seconds": 0.0,
            "missing": 0,
            "misjudged": 0,
        }
    said = {"verdict": run.verdict, "reason": run.reason} if run.verdict else {}
    return {
        "ttft_error_ms": quantiles(run.score.ttft_errors),
        "itl_error_ms": quantiles(run.score.itl_errors),
        "achieved_rate": round(run.score.achieved_rate, 3),
        "cpu_seconds": round(run.cpu_seconds, 2),
        "server_cpu_seconds": round(run.server_cpu_seconds, 2),
        "scored": len(run.score.ttft_errors),
        "missing": run.score.missing,
        "misjudged": run.score.misjudged,
        **said,
    }


def _searched(tool: str, repeat: int) -> Row:
    row: Row = {"tool": tool, "scenario": "knee", "rate": TRUE, "repeat": repeat}
    try:
        found = search(tool, repeat + 1)
    except MeasureError as error:
        print(f"{tool} knee: {error}", flush=True)
        return {**row, **_numbers(None), "error": str(error)}
    print(
        f"{tool} knee #{repeat}: {found.rate:.1f} req/s ({found.rate / TRUE - 1:+.1%}), between "
        f"{found.lower:.1f} and {found.upper:.1f}, {found.load_seconds:.0f} s of load, "
        f"{found.requests} requests",
        flush=True,
    )
    row |= _numbers(None) | {"found": found.rate, "lower": found.lower, "upper": found.upper}
    row |= {"highest_pass": found.highest_pass, "load_seconds": round(found.load_seconds, 1)}
    row |= {"cpu_seconds": round(found.cpu_seconds, 2)}
    return {**row, "achieved_rate": round(found.requests / max(found.load_seconds, 1e-9), 3)}


def _planted() -> Iterator[Row]:
    """Runs of ours that are too slow to be right: each must say so."""
    for number in range(PLANTED_RUNS):
        kind = ("hog", "pauses", "saturated")[number % 3]
        scenario, rate, seconds = "fixed", 300.0, 4.0
        beside: Beside | None = _hogs if kind == "hog" else _pauses
        if kind == "saturated":
            # Most are refused at once, which costs the server less than the client.
            scenario, rate, beside = "queue", SATURATING_RATE, None
        yield _row(OURS, scenario, rate, number, seconds, beside, named=f"planted_{kind}")


@contextmanager
def _hogs(_pid: int) -> Iterator[None]:
    """CPU hogs beside the tool, on its core."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it never outlives this program
    command = [*pinned(CLIENT_CORE, alone=False), sys.executable, "-c", code]
    # In sessions of their own, as other users' programs would be.
    hogs = [subprocess.Popen(command, start_new_session=True) for _ in range(HOGS)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@contextmanager
def _pauses(pid: int) -> Iterator[None]:
    """Stops the tool's processes for 1 s, again and again."""
    ended = threading.Event()

    def send(name: str) -> None:
        # To the whole session: ours runs Locust in a process group of its own.
        subprocess.run(["pkill", f"-{name}", "-s", str(pid)], check=False)

    def pause() -> None:
        while not ended.wait(PAUSE_EVERY_S):
            send("STOP")
            time.sleep(PAUSE_S)
            send("CONT")

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _missed(rows: Sequence[Row]) -> Iterator[str]:
    """The limits that are not kept, of those that these rows can tell."""
    for tool, scenario, rate in sorted({(r["tool"], r["scenario"], r["rate"]) for r in rows}):
        if any(r.get("error") for r in _of(rows, tool, scenario, rate)) and tool == OURS:
            yield f"{scenario} at {rate:g} req/s: a run of ours left no result"
    at_300 = _of(rows, OURS, "fixed", 300.0)
    if at_300:
        p99 = _median(at_300, "ttft_error_ms")
        if p99 is None or p99 > TTFT_P99_MS:
            yield f"TTFT error p99 at 300 req/s is {p99} ms, limit {TTFT_P99_MS} ms"
        peers = {r["tool"] for r in rows if r["tool"] != OURS}
        theirs = {t: _median(_of(rows, t, "fixed", 300.0), "ttft_error_ms") for t in peers}
        known = {tool: value for tool, value in theirs.items() if value is not None}
        if known and p99 is not None:
            best = min(known, key=lambda tool: known[tool])
            if p99 > SHARE_OF_BEST_PEER * known[best]:
                yield f"TTFT error p99 at 300 req/s is {p99} ms, over 1/3 of {best}'s {known[best]}"
        if (gap := _median(at_300, "itl_error_ms")) is None or gap > ITL_P99_MS:
            yield f"ITL error p99 at 300 req/s is {gap} ms, limit {ITL_P99_MS} ms"
    if several := _of(rows, OURS, "several_tokens", BEHAVIOUR_RATE):
        gap = _median(several, "itl_error_ms")
        if gap is None or gap > ITL_P99_MS:
            yield f"ITL error p99 with several tokens a chunk is {gap} ms, limit {ITL_P99_MS} ms"
    if top := _of(rows, OURS, "fixed", TOP_RATE):
        p99, sent = (
            _median(top, "ttft_error_ms"),
            statistics.median(r["achieved_rate"] for r in top),
        )
        if p99 is None or p99 >= TOP_TTFT_P99_MS or sent < (1 - RATE_OFF) * TOP_RATE:
            yield f"at {TOP_RATE:g} req/s TTFT error p99 is {p99} ms at {sent:g} req/s sent"
    yield from _missed_by_searches(rows)
    for rate in {row["rate"] for row in rows if "poisson_p" in row and row["tool"] == OURS}:
        # One in twenty of real Poisson processes is below this level: the median isn't.
        p = statistics.median(r["poisson_p"] for r in _of(rows, OURS, "fixed", rate))
        if p < KS_LEVEL:
            yield f"arrivals at {rate:g} req/s are not Poisson, p = {p}"
    for row in rows:
        where = f"{row['scenario']} at {row['rate']:g} req/s, repeat {row['repeat']}"
        if row["tool"] != OURS or row.get("error"):
            continue
        if row["scenario"].startswith("planted_"):
            if row["verdict"] != "invalid":
                yield f"{where}: {row['verdict']}, where it was too slow to be right"
            continue
        if row["scenario"] == "knee":
            continue
        if row["missing"] or row["misjudged"]:
            yield f"{where}: {row['missing']} requests missing, {row['misjudged']} misjudged"
        off = abs(row["achieved_rate"] / row["rate"] - 1)
        if row["scenario"] == "fixed" and off > RATE_OFF:
            yield f"{where}: {row['achieved_rate']:g} req/s came"


def _missed_by_searches(rows: Sequence[Row]) -> Iterator[str]:
    loads: dict[str, list[float]] = {}
    for row in rows:
        if row["scenario"] != "knee" or row.get("error"):
            continue
        loads.setdefault(row["tool"], []).append(row["load_seconds"])
        if row["tool"] != OURS:
            continue
        if abs(row["found"] / TRUE - 1) > FOUND_OFF:
            yield f"λ* is {TRUE:.1f} req/s, repeat {row['repeat']} found {row['found']:.1f}"
        if row["highest_pass"] > (1 + PASS_OFF) * TRUE:
            yield f"λ* is {TRUE:.1f} req/s, repeat {row['repeat']} passed {row['highest_pass']:.1f}"
    ours, peer = (statistics.median(loads.get(t, [0.0])) for t in (OURS, "aiperf"))
    if ours and peer and ours > SHARE_OF_PEERS_LOAD * peer:
        yield f"a search for λ* takes {ours:.0f} s of load, over 1/2 of aiperf's {peer:.0f}"


def _of(rows: Sequence[Row], tool: str, scenario: str, rate: float) -> list[Row]:
    wanted = (tool, scenario, rate)
    return [row for row in rows if (row["tool"], row["scenario"], row["rate"]) == wanted]


def _median(rows: Sequence[Row], name: str, quantile: str = "p99") -> float | None:
    """Over the repeats: one in which the machine was busy with others doesn't decide."""
    values = [row[name][quantile] for row in rows if row[name][quantile] is not None]
    return round(statistics.median(values), 3) if values else None


def _table(rows: Sequence[Row]) -> str:
    """Medians over the repeats."""
    lines = [
        f"{'scenario':16} {'req/s':>6} {'tool':15} {'TTFT error p50/p95/p99 ms':>30} "
        f"{'ITL error p50/p95/p99 ms':>30} {'sent/s':>8} {'CPU s':>6} {'missing':>8} {'wrong':>6}"
    ]
    searched = [row for row in rows if row["scenario"] == "knee" and not row.get("error")]
    rows = [row for row in rows if row["scenario"] != "knee"]
    seen = dict.fromkeys((r["scenario"], r["rate"], r["tool"]) for r in rows)
    for scenario, rate, tool in seen:
        of = _of(rows, tool, scenario, rate)
        errors = [
            "/".join(str(_median(of, name, q)) for q in ("p50", "p95", "p99"))
            for name in ("ttft_error_ms", "itl_error_ms")
        ]
        sent, cpu, missing, wrong = (
            statistics.median(r[name] for r in of)
            for name in ("achieved_rate", "cpu_seconds", "missing", "misjudged")
        )
        lines.append(
            f"{scenario:16} {rate:6g} {tool:15} {errors[0]:>30} {errors[1]:>30} {sent:8.1f} "
            f"{cpu:6.1f} {missing:8g} {wrong:6g}"
        )
    for tool in dict.fromkeys(row["tool"] for row in searched):
        of = [row for row in searched if row["tool"] == tool]
        off = [abs(row["found"] / TRUE - 1) for row in of]
        lines.append(
            f"λ* of a queue, {TRUE:.1f} req/s by analysis: {tool} within {FOUND_OFF:.0%} in "
            f"{sum(e <= FOUND_OFF for e in off)} of {len(off)}, largest error {max(off):.1%}, "
            f"{sum(row['lower'] <= TRUE <= row['upper'] for row in of)} intervals hold it, "
            f"{statistics.median(row['load_seconds'] for row in of):.0f} s of load"
        )
    return "\n".join(lines)


def _save(rows: Sequence[Row]) -> None:
    OUT.mkdir(exist_ok=True)
    (OUT / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
