"""Several workers: the sum is what one process would offer, and a bad worker is named."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtests.engine import LoadTestError
from loadtests.plan import Planner
from loadtests.result import Result, load_result, unpack_rows
from loadtests.workers import Workers, _problem, _Share
from tests.loadtests.samples import make_profile, make_row
from tests.loadtests.servers import FAST, ROOT, Simulator, simulator, wait_for

# A window ends early where the lag is beyond 2 % of the TTFT: no matter of these tests.
SLO = {"ttft_p95_ms": 50_000, "itl_p95_ms": 20_000, "required_rate": 40}
TESTED = (0, 3)  # a busy machine may leave no window to be trusted
LOCUST = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Simulator]:
    log = str(tmp_path / "tokens.jsonl")
    with simulator(
        tmp_path / "m", "--token-log", log, simulation={"service_curve": FAST}
    ) as running:
        yield running


def write_profile(folder: Path, url: str, **changes: Any) -> Path:
    fields: dict[str, Any] = {"base_url": url, "model": "m", "rates": [40], "step_seconds": 1.5}
    fields |= {"warmup_seconds": 0.5, "prompt_tokens": 64, "output_tokens": 8, "slo": SLO}
    path = folder / "profile.json"
    path.write_text(json.dumps({**fields, "timeout_s": 60, **changes}))
    return path


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program with its output in a pipe, ended after the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = unpack_rows((folder / "rows.jsonl.gz").read_bytes())
    return [row for row in rows if row["row"] == "request"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def check_that_all_was_sent(
    result: Result, rows: list[dict[str, Any]], workers: int, clock_ms: float = 0
) -> None:
    """The rows of the first window are the plan that the seed gives, dealt out in turn."""
    assert (result.profile.workers or 1) == workers
    plan = Planner(result.profile).window(40.0, 0)
    sent = sorted((row for row in rows if row["repeat"] == 0), key=lambda row: int(row["number"]))
    assert [row["number"] for row in sent] == [one.number for one in plan]
    assert [row["worker"] for row in sent] == [one.number % workers for one in plan]
    start = sent[0]["scheduled"] - plan[0].at_ns
    times = [row["scheduled"] - start for row in sent]
    assert times == pytest.approx([one.at_ns for one in plan], abs=clock_ms * 1e6)


def metric(url: str, name: str) -> float:
    """One number of the engine's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as page:
        found = re.search(rf"^{name}{{.*}} (\S+)", page.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def check_against_the_truth(log: Path, rows: list[dict[str, Any]]) -> None:
    """The first token of each row against when the simulator wrote it, by the same clock."""
    written: dict[str, int] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        written.setdefault(entry["id"], entry["ns"])
    errors = [
        (row["first_content"] - written[f"{row['rate']:g}-{row['repeat']}-{row['number']}"]) / 1e6
        for row in rows
    ]
    assert abs(sorted(errors)[len(errors) // 2]) < 100, errors


@pytest.mark.parametrize("workers", [1, 3])
def test_the_sum_is_what_one_process_would_send(
    tmp_path: Path, engine: Simulator, workers: int
) -> None:
    profile = write_profile(tmp_path, engine.url, workers=workers)
    out = tmp_path / "out"
    with running(
        sys.executable, "-m", "loadtests", "--profile", str(profile), "--out", str(out)
    ) as program:
        printed, _ = program.communicate(timeout=60)
    assert program.returncode in TESTED, printed
    assert engine.stop() == 0  # it has written its log then
    rows = rows_of(out)
    check_that_all_was_sent(load_result(out / "result.json"), rows, workers)
    check_against_the_truth(tmp_path / "tokens.jsonl", rows)
    prompts = {row["number"] for row in rows}
    assert len(prompts) == 80


def can_shift_clocks() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.call(
        [unshare, "--time", "--monotonic", "9", "--fork", "true"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.skipif(not can_shift_clocks(), reason="needs the right to make a time namespace")
def test_a_worker_whose_clock_shows_another_time(tmp_path: Path, engine: Simulator) -> None:
    """As on another machine: each has a monotonic clock of its own."""
    profile = write_profile(tmp_path, engine.url)
    out, port = tmp_path / "out", str(free_port())
    worker = [*LOCUST, "--worker", "--master-port", port]
    with (
        running(
            *LOCUST,
            *("--master", "--headless", "--expect-workers", "2"),
            *("--master-bind-port", port, "--load-profile", str(profile), "--out", str(out)),
        ) as master,
        running(*worker),
        running("unshare", "--time", "--monotonic", "100000", "--fork", "--kill-child", *worker),
    ):
        printed, _ = master.communicate(timeout=60)
    assert master.returncode in TESTED, printed
    assert engine.stop() == 0  # it has written its log then
    rows = rows_of(out)
    check_that_all_was_sent(load_result(out / "result.json"), rows, 2, clock_ms=100)
    for index in (0, 1):
        share = [row for row in rows if row["worker"] == index]
        check_against_the_truth(tmp_path / "tokens.jsonl", share)


@contextmanager
def two_workers_at_load(
    folder: Path, engine: Simulator, out: Path, **profile: object
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program, and the process id of Locust's master, once requests arrive."""
    written = write_profile(folder, engine.url, workers=2, **{"step_seconds": 5, **profile})
    with running(
        sys.executable, "-m", "loadtests", "--profile", str(written), "--out", str(out)
    ) as program:
        wait_for(lambda: metric(engine.url, "vllm:simulated_posts_total") > 0, 30)
        [locust] = children(program.pid)
        yield program, locust


def test_a_worker_that_dies_makes_the_result_invalid(tmp_path: Path, engine: Simulator) -> None:
    out = tmp_path / "out"
    with two_workers_at_load(tmp_path, engine, out) as (program, locust):
        os.kill(children(locust)[1], signal.SIGKILL)
        printed, _ = program.communicate(timeout=60)
    assert program.returncode == 3, printed
    result = load_result(out / "result.json")
    assert result.verdict == "invalid"
    assert "of 2 (" in result.reason
    assert "died, or its connection did" in result.reason
    assert result.steps[-1].verdict == "invalid"
    assert 0 < result.steps[-1].scheduled < 200


def test_without_any_worker_there_is_no_result(tmp_path: Path, engine: Simulator) -> None:
    with two_workers_at_load(tmp_path, engine, tmp_path / "out") as (program, locust):
        for worker in children(locust):
            os.kill(worker, signal.SIGKILL)
        printed, _ = program.communicate(timeout=60)
    assert program.returncode == 3, printed
    assert "WorkerLost" in printed or "WorkersLost" in printed
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_worker_that_stood_still_is_named(tmp_path: Path, engine: Simulator) -> None:
    """Its window does not count; another one may."""
    strict = {**SLO, "ttft_p95_ms": 5000}
    out = tmp_path / "out"
    with two_workers_at_load(tmp_path, engine, out, step_seconds=3, slo=strict) as (
        program,
        locust,
    ):
        worker = children(locust)[1]
        wait_for(lambda: metric(engine.url, "vllm:simulated_posts_total") > 30, 30)
        os.kill(worker, signal.SIGSTOP)
        time.sleep(1.5)  # less than what Locust takes for death
        os.kill(worker, signal.SIGCONT)
        printed, _ = program.communicate(timeout=90)
    step = load_result(out / "result.json").steps[0]
    said = [reason for reason in step.discarded if "of 2 (" in reason]
    assert any(": the generator lagged" in reason for reason in said), printed


def started(page: int) -> bool:
    form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1}).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/swarm", form, 10) as answer:
            return bool(json.load(answer)["success"])
    except OSError:
        return False


def connected(page: int) -> int:
    """How many workers the master's page shows."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/stats/requests", None, 10) as answer:
            return len(json.load(answer)["workers"])
    except OSError:
        return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_web_page_stops_and_starts_it(tmp_path: Path, engine: Simulator, workers: int) -> None:
    port, page = str(free_port()), free_port()
    profile = write_profile(tmp_path, engine.url, step_seconds=3)
    out = tmp_path / "out"
    command = [*LOCUST, "--web-host", "127.0.0.1", "--web-port", str(page), "--out", str(out)]
    if workers:
        command += ["--processes", str(workers)]
        command += ["--master-bind-port", port, "--master-port", port]

    def posts() -> float:
        return metric(engine.url, "vllm:simulated_posts_total")

    def still() -> bool:
        before = posts()
        time.sleep(0.5)  # 20 requests, were there load
        return posts() == before

    with running(*command, "--load-profile", str(profile)) as locust:
        wait_for(lambda: connected(page) == workers, 30)
        wait_for(lambda: started(page), 20)
        wait_for(lambda: posts() > 20, 20)
        urllib.request.urlopen(f"http://127.0.0.1:{page}/stop", b"", 60).close()
        wait_for(still, 20)
        assert not (out / "result.json").exists()
        wait_for(lambda: started(page), 20)
        wait_for(lambda: (out / "result.json").exists(), 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/stats/requests", None, 10) as answer:
            shown = {row["name"] for row in json.load(answer)["stats"]}
        locust.send_signal(signal.SIGTERM)
        locust.wait(20)
    assert load_result(out / "result.json").steps[0].scheduled >= 120
    assert shown >= {"at 40 req/s", "/v1/completions"}


def share(lag_ms: float, late: int, count: int = 200) -> tuple[_Share, Any]:
    profile = make_profile(warmup_seconds=0, step_seconds=count / 4, slo={"ttft_p95_ms": 500})
    part = _Share("worker 2 of 2 (node)", Planner(profile).window(4, 0)[1::2])
    part.rows = [
        make_row(i * 500, lag_ms=lag_ms if i < late else 0.1) for i in range(len(part.plan))
    ]
    part.end = int(len(part.plan) * 0.5e9)
    return part, profile


def test_each_worker_is_checked_alone() -> None:
    # 2 % of this worker's requests are late: 1 % of all, which the pooled p99 would let pass.
    late, profile = share(lag_ms=40, late=2)
    assert _problem(late, 4, 0, profile).startswith("worker 2 of 2 (node): the generator lagged")
    good, profile = share(lag_ms=40, late=0)
    assert _problem(good, 4, 0, profile) == ""
    good.cpu = 0.9
    assert "worker 2 of 2 (node): the generator used 90%" in _problem(good, 4, 0, profile)


def test_a_clock_that_is_not_known_well_enough() -> None:
    part, profile = share(lag_ms=0, late=0)
    part.error_ns = 30_000_000
    assert "its clock is known to ± 30.0 ms only" in _problem(part, 4, 0, profile)


def test_missing_workers_are_said() -> None:
    runner: Any = SimpleNamespace(
        clients=SimpleNamespace(all=[SimpleNamespace(id="a_1", state="ready")], get=lambda _: None),
        register_message=lambda *_: None,
    )
    with pytest.raises(LoadTestError, match="0 workers are connected, 2 are expected"):
        Workers(runner).gather(2)
