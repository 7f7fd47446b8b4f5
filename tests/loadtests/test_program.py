"""The program as the Job runs it, against the engine simulator."""

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from loadtests.result import Result, load_result, parse_result, rows_from_events
from tests.loadtests.servers import FAST, ROOT, run_program, simulator, wait_for

SLO = {"ttft_p95_ms": 5000, "itl_p95_ms": 2000, "required_rate": 40}


def write_profile(folder: Path, url: str, **changes: Any) -> Path:
    fields: dict[str, Any] = {"base_url": url, "model": "m", "rates": [40], "step_seconds": 1}
    fields |= {"warmup_seconds": 0.3, "prompt_tokens": 64, "output_tokens": 16, "slo": SLO}
    fields |= {"timeout_s": 20, "metadata": {"simulated": ["engine"], "commit": "abc"}}
    path = folder / "profile.json"
    path.write_text(json.dumps({**fields, **changes}))
    return path


def benchmark(profile: Path) -> tuple[int, list[dict[str, Any]], Path]:
    """Exit status, events, and where the files are."""
    out = profile.parent / "out"
    ran = run_program("-m", "loadtests", "--profile", str(profile), "--out", str(out))
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()], out


def metric(url: str, name: str) -> float:
    """One number of the engine's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as page:
        found = re.search(rf"^{name}{{.*}} (\S+)", page.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def descendants(pid: int) -> list[int]:
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in descendants(child)]


def own_port() -> list[str]:
    """For master and workers, beside another run's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return ["--master-bind-port", port, "--master-port", port]


def test_slo_that_holds(tmp_path: Path) -> None:
    log = tmp_path / "tokens.jsonl"
    with simulator(
        tmp_path / "m", "--token-log", str(log), simulation={"service_curve": FAST}
    ) as engine:
        profile = write_profile(tmp_path, engine.url, rates=[20, 40])
        status, events, out = benchmark(profile)
        assert engine.stop() == 0
    assert status == 0, events
    result = load_result(out / "result.json")
    assert result.verdict == "pass"
    assert [step.rate_asked for step in result.steps] == [20, 40]
    assert result.capacity.at_least
    assert result.capacity.estimate == 40
    assert result.server["version"] == "0.30.0+simulator"
    assert result.server["server"] == "vllm-engine-simulator"
    assert result.server["root"] == str(tmp_path / "m")
    assert result.profile.simulated == ("engine",)
    last = result.steps[-1]
    assert (last.tokens_in_mean, last.tokens_out_mean, last.failed) == (64, 16, 0)
    assert last.server is not None
    assert last.server.prefix_hit_share == 0

    # The log of the Job carries it all.
    assert parse_result(events[-1]) == result
    packed = rows_from_events(events)
    assert packed == (out / "rows.jsonl.gz").read_bytes()
    assert any(event["event"] == "progress" for event in events)

    check_against_the_truth(packed, log, result)


def check_against_the_truth(packed: bytes, log: Path, result: Result) -> None:
    """Every measured time against the simulator's own log of when it wrote the token."""
    written: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        written.setdefault(entry["id"], []).append(entry["ns"])
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    requests = [row for row in rows if row["row"] == "request"]
    valid = {step.rate_asked for step in result.steps}
    errors, gap_errors = [], []
    for row in requests:
        truth = written[f"{row['rate']:g}-{row['repeat']}-{row['number']}"]
        assert len(truth) == 16
        assert row["rate"] in valid
        read = [row["scheduled"] + at for at in row["chunk_ns"]]
        errors.append((row["first_content"] - truth[0]) / 1e6)
        gap_errors += [
            abs((read[i + 1] - read[i]) - (truth[i + 1] - truth[i])) / 1e6 for i in range(15)
        ]
    assert min(errors) > 0, "a token was read before it was written"
    # Generous, for a busy machine; the accuracy benchmark has the real bounds.
    assert sorted(errors)[len(errors) // 2] < 3
    assert sorted(gap_errors)[len(gap_errors) // 2] < 3


def test_slo_that_is_missed(tmp_path: Path) -> None:
    slow = {**FAST, "ttft_base_ms": 300}
    with simulator(tmp_path / "m", simulation={"service_curve": slow}) as engine:
        # 2 % of the TTFT SLO is what the generator may lag: kept wide by a bound on ITL alone.
        slo = {**SLO, "itl_p95_ms": 3}
        status, events, out = benchmark(write_profile(tmp_path, engine.url, slo=slo))
    assert status == 1, events
    result = load_result(out / "result.json")
    assert result.verdict == "fail"
    assert result.capacity.estimate == 0
    assert result.in_flight_at_capacity is None
    # 300 ms are waited for before the engine even queues a request.
    p50 = result.steps[0].ttft_ms.p50
    assert p50 is not None
    assert p50 > 300


def test_faults_are_misses_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    kinds = ("error_event", "only_done", "close_early", "status_503", "no_done")
    faults = [{"kind": kind, "share": 0.05} for kind in kinds]
    with simulator(
        tmp_path / "m", simulation={"service_curve": FAST, "requests": faults, "seed": 7}
    ) as engine:
        profile = write_profile(tmp_path, engine.url, warmup_seconds=0, step_seconds=4)
        status, events, out = benchmark(profile)
        sent = metric(engine.url, "vllm:simulated_posts_total")
    assert status == 1, events
    step = load_result(out / "result.json").steps[0]
    assert set(step.misses) == {"error_event", "empty", "closed_early", "http_503", "no_done"}
    assert step.failed == sum(step.misses.values())
    assert step.attainment <= 0.9
    assert step.scheduled == sent == 160


def test_an_engine_that_dies_under_load(tmp_path: Path) -> None:
    """All that was scheduled is counted, and what could be measured is kept."""
    slo = {**SLO, "ttft_p95_ms": 15_000}  # a lag of 2 % of it would end the window early
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        profile = write_profile(tmp_path, engine.url, step_seconds=3, slo=slo)
        out = tmp_path / "out"
        command = ["-m", "loadtests", "--profile", str(profile), "--out", str(out)]
        with subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as program:
            wait_for(lambda: metric(engine.url, "vllm:simulated_posts_total") > 30, 30)
            engine.process.kill()
            printed, _ = program.communicate(timeout=60)
    assert program.returncode == 1, printed
    result = load_result(out / "result.json")
    step = result.steps[0]
    assert step.scheduled == 120
    assert set(step.misses) <= {"connect", "closed_early", "reset"}
    assert step.misses["connect"] > 0
    assert 0 < step.failed < 120


def test_search_and_one_rate(tmp_path: Path) -> None:
    """The whole search against a real server; the answer itself is tested in virtual time."""
    curve = {**FAST, "max_num_seqs": 2}
    slo = {**SLO, "required_rate": 20, "ttft_p95_ms": 1000}
    fields: dict[str, Any] = {"rates": [], "slo": slo, "rate_range": [4, 90], "timeout_s": 10}
    fields |= {"warmup_seconds": 0.5, "budget_seconds": 20}
    with simulator(tmp_path / "m", simulation={"service_curve": curve}) as engine:
        profile = write_profile(tmp_path, engine.url, mode="search", **fields)
        _, events, out = benchmark(profile)
        result = load_result(out / "result.json")
        assert result.load_seconds <= 20
        assert result.next_step or result.capacity.estimate > 0
        rates = [step.rate_asked for step in result.steps]
        assert rates == sorted(set(rates))
        assert 20 in rates, events

        write_profile(tmp_path, engine.url, mode="rate", **fields)
        status, events, out = benchmark(profile)
    result = load_result(out / "result.json")
    assert [step.rate_asked for step in result.steps] == [20], events
    assert status == {"pass": 0, "fail": 1}.get(result.verdict, 3)


def test_server_that_is_away(tmp_path: Path) -> None:
    status, events, _ = benchmark(write_profile(tmp_path, "http://127.0.0.1:9"))
    assert status == 3
    assert events[-1]["event"] == "error"
    assert events[-1]["error"] == "EngineUnreachable"
    assert "http://127.0.0.1:9/v1/models" in events[-1]["message"]
    assert events[-1]["next"]


def test_wrong_profile_is_named_before_anything_starts(tmp_path: Path) -> None:
    status, events, _ = benchmark(write_profile(tmp_path, "http://127.0.0.1:9", rates=[3, 1]))
    assert status == 2
    assert events[-1]["error"] == "ProfileError"
    assert "profile.json: rates: the ladder must ascend" in events[-1]["message"]


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_by_sigterm(tmp_path: Path, workers: int) -> None:
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        profile = write_profile(tmp_path, engine.url, step_seconds=60, workers=workers)
        command = [sys.executable, "-m", "loadtests", "--profile", str(profile)]
        program = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert program.stdout
        assert "load starts" in program.stdout.readline()
        children = descendants(program.pid)
        assert len(children) == (1 if workers == 1 else 1 + workers)
        program.send_signal(signal.SIGTERM)
        last = json.loads(program.stdout.read().splitlines()[-1])
        assert program.wait(10) == 3
        program.stdout.close()
    assert (last["event"], last["error"]) == ("error", "Interrupted")
    assert not (tmp_path / "out" / "result.json").exists()
    for child in children:
        wait_for(lambda pid=child: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


@pytest.mark.parametrize("extra", [["--processes", "2"], []])
def test_locust_alone(tmp_path: Path, extra: list[str]) -> None:
    """As a person would: Locust's own command line, the model asked from the engine."""
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", *extra]
    arguments += ["--rates", "40", "--required-rate", "40", "--step-seconds", "1"]
    arguments += ["--warmup-seconds", "0", "--ttft-p95-ms", "5000", "--itl-p95-ms", "2000"]
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        ran = run_program(*arguments, "--host", engine.url, "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    assert load_result(tmp_path / "out" / "result.json").profile.model == "m"
    assert "PASS: at 40 req/s" in ran.stderr
    # Locust's own table has both.
    table = ran.stdout + ran.stderr
    assert "/v1/completions" in table
    assert "at 40 req/s" in table


def test_a_trace_with_its_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 100 * i, "input_length": 520 + i, "output_length": 3 + i % 4}
        | {"hash_ids": [i % 2, 10 + i]}
        for i in range(20)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"arrival": "trace", "prompt_tokens": "trace", "output_tokens": "trace"}
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        profile = write_profile(
            tmp_path, engine.url, **fields, trace={"path": "trace.jsonl", "prefixes": True}
        )
        status, events, out = benchmark(profile)
    # A cache that answers is what was asked for here.
    assert status == 0, events
    result = load_result(out / "result.json")
    assert result.server["prefix_share_asked"] == pytest.approx(0.95, abs=0.05)
    assert result.profile.trace is not None
    assert result.profile.trace.path == str(tmp_path / "trace.jsonl")
    packed = gzip.decompress((out / "rows.jsonl.gz").read_bytes()).splitlines()
    first = [row for row in map(json.loads, packed) if row["row"] == "request"][:20]
    assert [row["tokens_in"] for row in first] == [row["input_length"] for row in rows]
    assert [row["tokens_out"] for row in first] == [row["output_length"] for row in rows]


def test_traffic_by_flags(tmp_path: Path) -> None:
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    arguments += ["--rates", "40", "--required-rate", "40", "--step-seconds", "1"]
    arguments += ["--warmup-seconds", "1", "--ttft-p95-ms", "5000", "--itl-p95-ms", "2000"]
    arguments += ["--endpoint", "chat", "--turns", "2", "--think-s", "0.5"]
    arguments += ["--prompt-tokens", "lognormal:50:120:200", "--output-tokens", "uniform:2:9"]
    arguments += ["--shared-prefix-tokens", "32", "--models", "m=2"]
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        ran = run_program(*arguments, "--host", engine.url, "--out", str(tmp_path / "out"))
        assert ran.returncode == 0, ran.stderr
        wrong = run_program(*arguments, "--host", engine.url, "--output-tokens", "normal:3:4")
        away = run_program(*arguments, "--host", engine.url, "--models", "m=2,adapter=1")
    profile = load_result(tmp_path / "out" / "result.json").profile
    assert profile.prompt_tokens.model_dump() == {
        "lognormal": {"median": 50, "p95": 120, "max": 200}
    }
    assert profile.output_tokens.model_dump() == {"uniform": {"min": 2, "max": 9}}
    assert profile.models == {"m": 2}
    assert profile.conversations is not None
    assert wrong.returncode == 2
    assert "ProfileError: --output-tokens: must be a number, uniform" in wrong.stderr
    assert away.returncode == 3
    assert "WrongModel" in away.stderr
    assert "serves m, not 'adapter'" in away.stderr


def test_one_rate_by_flags(tmp_path: Path) -> None:
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--mode", "rate"]
    arguments += ["--rates", "3,30", "--required-rate", "20", "--step-seconds", "1"]
    arguments += ["--warmup-seconds", "1", "--ttft-p95-ms", "5000", "--itl-p95-ms", "2000"]
    arguments += ["--budget-seconds", "20"]
    with simulator(tmp_path / "m", simulation={"service_curve": FAST}) as engine:
        ran = run_program(*arguments, "--host", engine.url, "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    made = load_result(tmp_path / "out" / "result.json")
    assert (made.profile.mode, made.profile.budget_seconds) == ("rate", 20)
    assert {step.rate_asked for step in made.steps} == {20}


@pytest.mark.parametrize(
    "start", [["--headless"], ["--web-port", "0"], ["--headless", "--processes", "2"]]
)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--step-seconds", "-5"], "--step-seconds: must be greater than 0, got -5.0"),
        (["--host", "http://127.0.0.1:99999"], "--host: 'http://127.0.0.1:99999' is no address"),
        (["--out", "/dev/null"], "--out: [Errno 17] File exists: '/dev/null'"),
    ],
)
def test_wrong_flags_are_named_at_the_start(start: list[str], flags: list[str], says: str) -> None:
    """With a page too, before anybody opens it; workers end with their master."""
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", *start]
    arguments += own_port() if "--processes" in start else []
    ran = run_program(*arguments, "--host", "http://127.0.0.1:9", *flags)
    assert ran.returncode == 2, ran.stderr
    [line] = [line for line in ran.stderr.splitlines() if "/ERROR/" in line]
    assert f"ProfileError: {says}" in line
    assert line.endswith(". Correct the flags.")
    assert "Traceback" not in ran.stderr


def test_no_folders_are_made_for_a_mistyped_out(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "http://127.0.0.1:9")
    out = tmp_path / "nope" / "x"
    ran = run_program("-m", "loadtests", "--profile", str(profile), "--out", str(out))
    assert ran.returncode == 2, ran.stderr
    error = json.loads(ran.stdout)
    assert error["error"] == "OutError"
    assert f"No such file or directory: '{out}'" in error["message"]
    assert "in one that is there" in error["next"]
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    ran = run_program(*arguments, "--load-profile", str(profile), "--out", str(out))
    assert ran.returncode == 2, ran.stderr
    assert "ProfileError: --out: [Errno 2] No such file or directory" in ran.stderr
    assert "in one that is there" in ran.stderr
    assert not out.parent.exists()


def test_as_many_processes_as_the_profile_says(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "http://127.0.0.1:9", workers=2)
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    ran = run_program(*arguments, "--load-profile", str(profile))
    assert ran.returncode == 2, ran.stderr
    assert f"{profile}: workers: is 2, and Locust runs 1; give it --processes 2" in ran.stderr
    assert "Correct the profile." in ran.stderr
    arguments += own_port()
    ran = run_program(*arguments, "--load-profile", str(profile), "--processes", "3")
    assert ran.returncode == 2, ran.stderr
    assert f"{profile}: workers: is 2, and Locust runs 3; give it --processes 2" in ran.stderr
    ran = run_program(*arguments, "--load-profile", str(profile), "--processes", "2")
    assert ran.returncode == 3, ran.stderr
    assert "EngineUnreachable" in ran.stderr


def test_locusts_own_profile_is_not_taken_for_ours(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "http://127.0.0.1:9")
    arguments = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    ran = run_program(*arguments, "--profile", str(profile))
    assert ran.returncode == 2, ran.stderr
    assert f"--load-profile {profile}" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_what_assets_import_patches_nothing() -> None:
    code = (
        "import loadtests.picture, loadtests.report, loadtests.result, loadtests.verdict, sys\n"
        "print([m for m in ('locust', 'gevent', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    assert run_program("-c", code).stdout.strip() == "[]"
