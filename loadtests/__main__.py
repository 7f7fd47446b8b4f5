"""`python -m loadtests --profile profile.json --out DIR`: the program of the benchmark Job.

Runs Locust as a process of its own, prints its progress, and leaves DIR/result.json and
DIR/rows.jsonl.gz. Exit status: 0 the SLO holds, 1 it doesn't, 3 no verdict (with the reason),
2 wrong usage.

`python -m loadtests compare A.json B.json`: is B worse than the accepted result A?
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtests.compare import compare, kept
from loadtests.profile import ProfileError, load_profile
from loadtests.result import Result, ResultError, load_result, rows_events

EXIT_CODES = {"pass": 0, "fail": 1, "invalid": 3, "inconclusive": 3}
NO_VERDICT, USAGE = 3, 2
WORKERS_START_SECONDS = "120"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class _Interrupted(Exception):
    pass


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark, or compares two; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status = _compare(given[1:]) if given[:1] == ["compare"] else _benchmark(given)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it (`head`, `less`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 128 + signal.SIGPIPE
    return status


def _benchmark(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="JSON file, see profile.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for result and raw rows")
    options = parser.parse_args(arguments)
    events = not sys.stdout.isatty()
    try:
        workers = load_profile(options.profile).workers or 1
        options.out.mkdir(exist_ok=True)
        for name in ("result.json", "rows.jsonl.gz"):  # never take an old one for this run's
            (options.out / name).unlink(missing_ok=True)
    except ProfileError as error:
        _error(events, "ProfileError", str(error), "Correct the profile.")
        return USAGE
    except OSError as error:
        _error(
            events,
            "OutError",
            f"--out: {error}",
            "Name a folder that can be written, in one that is there.",
        )
        return USAGE
    try:
        code = _run_locust(options.profile, options.out, workers, events)
    except (_Interrupted, KeyboardInterrupt):
        _error(events, "Interrupted", "the benchmark was stopped", "Run it again.")
        return NO_VERDICT
    if not (options.out / "result.json").exists():
        if code not in (USAGE, NO_VERDICT):  # these have said why
            _error(
                events,
                "LoadTestCrashed",
                f"Locust ended with status {code} and left no result",
                "Its last words are above.",
            )
        return code if code in (USAGE, NO_VERDICT) else NO_VERDICT
    result = load_result(options.out / "result.json")
    if events:
        for event in rows_events((options.out / "rows.jsonl.gz").read_bytes()):
            _print(event)
        _print({"event": "result", **result.model_dump(mode="json")})
    else:
        print(_summary(result, options.out))
    return EXIT_CODES[result.verdict]


def _compare(arguments: list[str]) -> int:
    """0: no regression, 1: one, 3: not comparable or without a verdict, 2: can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests compare",
        description="Is the second result worse than the first, beyond both intervals?",
    )
    parser.add_argument("before", type=Path, help="result.json, the accepted one")
    parser.add_argument("after", type=Path, help="result.json")
    options = parser.parse_args(arguments)
    try:
        results = {path: load_result(path) for path in (options.before, options.after)}
    except ResultError as error:
        print(error, file=sys.stderr)
        return USAGE
    for path, result in results.items():
        if result.verdict not in ("pass", "fail") or result.step_at_required_rate() is None:
            print(f"not compared: {path} is {result.verdict}: {result.reason}")
            return NO_VERDICT
    comparison = compare(kept(results[options.before]), kept(results[options.after]))
    print(comparison.sentence())
    return NO_VERDICT if comparison.differs else 1 if comparison.regressions else 0


def _run_locust(profile: Path, out: Path, workers: int, events: bool) -> int:
    """Locust's exit status; its events are passed on as they come."""
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless"]
    command += ["--users", "1", "--spawn-rate", "1", "--only-summary", "--loglevel", "WARNING"]
    command += ["--load-profile", str(profile), "--out", str(out), "--json-events"]
    if workers > 1:
        port = str(_free_port())
        command += ["--processes", str(workers), "--master-bind-host", "127.0.0.1"]
        command += ["--master-bind-port", port, "--master-port", port]
        command += ["--expect-workers-max-wait", WORKERS_START_SECONDS]
    locust = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        process_group=0,  # its workers too can be ended then
    )

    def stop(_signal: int, _frame: types.FrameType | None) -> None:
        raise _Interrupted

    # The first process of a container gets no default handler: SIGTERM would do nothing.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        assert locust.stdout is not None, "a pipe was asked for"
        for line in locust.stdout:
            _pass_on(line, events)
        return locust.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if locust.poll() is None:
            os.killpg(locust.pid, signal.SIGKILL)
            locust.wait()


def _free_port() -> int:
    """Where master and workers meet; Locust's own default may be another run's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _pass_on(line: str, events: bool) -> None:
    try:
        event = json.loads(line)
        name = event["event"]
    except (ValueError, KeyError, TypeError):
        print(line, end="", file=sys.stderr)
        return
    if events:
        _print(event)
    elif name == "error":
        _error(events, event["error"], event["message"], event["next"])
    else:
        print(event["message"], flush=True)


def _error(events: bool, name: str, message: str, next_step: str) -> None:
    if events:
        _print({"event": "error", "error": name, "message": message, "next": next_step})
    else:
        print(f"{name}: {message}\n{next_step}", file=sys.stderr)


def _print(event: Mapping[str, Any]) -> None:
    print(json.dumps(event, separators=(",", ":")), flush=True)


def _summary(result: Result, out: Path) -> str:
    lines = [
        f"{result.verdict.upper()}: {result.reason}",
        f"capacity of a replica: {result.capacity.text(result.profile.mode)}",
        f"limited by: {result.limited_by}",
    ]
    if result.profile.simulated:
        lines.append(f"simulated: {', '.join(result.profile.simulated)}")
    return "\n".join([*lines, f"result and raw rows: {out}"])


if __name__ == "__main__":
    sys.exit(main())
