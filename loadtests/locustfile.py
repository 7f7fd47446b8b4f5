"""The benchmark as a Locust program:

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 [--headless]

Locust gives its command line, console and web page. Its users and wait times are not used: they
are a closed loop, in which a slow answer delays the next request and so hides itself. A greenlet
runs the whole ladder, and generator.py starts another for each arrival. Where one core can't send
the load, `--processes N`, or `--master --expect-workers N` and N times `--worker`, share it.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent import Greenlet
from locust import User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import ValidationError

from loadtests.answer import Exchange, Row
from loadtests.benchmark import run
from loadtests.engine import Engine, LoadTestError
from loadtests.generator import PATHS
from loadtests.profile import Profile, ProfileError, describe, load_profile, with_trace
from loadtests.result import Verdict
from loadtests.workers import Worker, Workers

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "invalid": 3, "inconclusive": 3}
NO_VERDICT, USAGE = 3, 2
# Profile fields that are flags of the same name.
TRAFFIC = (
    *("endpoint", "mode", "budget_seconds", "step_seconds", "warmup_seconds", "arrival"),
    *("gamma_shape", "seed", "timeout_s"),
)
LIMITS = ("ttft_p95_ms", "itl_p95_ms", "error_rate", "required_rate")
log = logging.getLogger("loadtests")


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """The profile's fields as flags; they also show on Locust's web page."""
    add = parser.add_argument
    add("--load-profile", default="", help="JSON file with the whole profile, instead of flags")
    add("--out", default="", help="folder for result.json and rows.jsonl.gz")
    add("--model", default="", help="served name; by default the only one that is served")
    add("--endpoint", choices=sorted(PATHS), default="completions", help="API to load")
    add("--rates", default="1,2,4,8,16", help="ladder of arrival rates, req/s")
    add(
        "--mode",
        choices=["ladder", "search", "rate"],
        default="ladder",
        help="ladder: all rates; search: find λ*; rate: a verdict at --required-rate only",
    )
    add("--rate-range", default="", help="where to search, lowest and highest req/s, e.g. 1,64")
    add("--budget-seconds", type=float, default=600, help="of load, for search and rate")
    add("--step-seconds", type=float, default=30, help="least load at each rate")
    add("--warmup-seconds", type=float, default=5, help="load before each step, not counted")
    arrivals = ["poisson", "constant", "gamma", "trace"]
    add("--arrival", choices=arrivals, default="poisson", help="process of the arrivals")
    add("--gamma-shape", type=float, default=1.0, help="below 1: burstier than Poisson")
    add("--seed", type=int, default=1, help="of the arrivals")
    lengths = "a number, uniform:MIN:MAX, lognormal:MEDIAN:P95:MAX, or trace"
    add("--prompt-tokens", default="64", help=f"length of a prompt: {lengths}")
    add("--output-tokens", default="16", help=f"length of an answer: {lengths}")
    add("--trace", default="", help="JSON lines: timestamp, input_length, output_length, hash_ids")
    add("--trace-prefixes", action="store_true", help="equal hash_ids are equal text")
    add("--shared-prefix-tokens", type=int, default=0, help="common start of the prompts")
    add("--shared-prefixes", type=int, default=1, help="how many such starts there are")
    add("--turns", type=int, default=1, help="of each conversation, with endpoint chat")
    add("--think-s", type=float, default=5, help="least pause between two turns")
    add("--models", default="", help="names with weights, LoRA adapters too: base=3,adapter=1")
    add("--ttft-p95-ms", type=float, default=500, help="SLO")
    add("--itl-p95-ms", type=float, default=200, help="SLO")
    add("--error-rate", type=float, default=0.0, help="SLO: share that may fail")
    add("--required-rate", type=float, default=1, help="rate, req/s, at which the SLO must hold")
    add("--timeout-s", type=float, default=60, help="after this a request has failed")
    # For programs: one JSON event a line on stdout.
    add("--json-events", action="store_true", include_in_web_ui=False, help="print JSON events")


@events.init.add_listener  # type: ignore[untyped-decorator]
def set_up(environment: Environment, **_: Any) -> None:
    """Master and workers can talk from now on, and a test's start is the benchmark's."""
    options: Any = environment.parsed_options
    if options.profile:  # Locust would take it, and the flags' defaults be the load
        log.error(
            "--profile is Locust's own, a name for test runs. A file with the load is given as "
            f"--load-profile {options.profile}"
        )
        sys.exit(USAGE)
    runner = environment.runner
    on: Any = environment.events
    if isinstance(runner, WorkerRunner):
        worker = Worker(runner, lambda path: _on_end(environment, path))
        on.test_stop.add_listener(lambda **_: worker.stop())
        return
    environment.process_exit_code = NO_VERDICT  # that of an interrupted run
    benchmark = Benchmark(
        environment, Workers(runner) if isinstance(runner, MasterRunner) else None
    )
    on.test_start.add_listener(benchmark.start)
    on.test_stopping.add_listener(benchmark.stop)


class Replica(User):
    """Stands for the replica under test on Locust's page; it sends nothing by itself."""

    fixed_count = 1

    @task
    def wait_for_the_end(self) -> None:
        """The load comes from the generator's greenlets."""
        gevent.sleep(3600)


class Benchmark:
    """Runs with Locust's test, in a greenlet of the master or of the only process."""

    def __init__(self, environment: Environment, workers: Workers | None) -> None:
        self._environment = environment
        self._workers = workers
        self._greenlet: Greenlet | None = None

    def start(self, **_: Any) -> None:
        """Starts it beside Locust's test."""
        self._greenlet = gevent.spawn(self._run)

    def stop(self, **_: Any) -> None:
        """Ends it with Locust's test, whoever stopped that."""
        if self._greenlet is None or self._greenlet is gevent.getcurrent():
            return
        if self._workers is not None and not self._workers.alive:
            lost = LoadTestError("WorkersLost", "every worker died", "Look at their logs.")
            self._greenlet.kill(lost, block=False)
        else:
            self._greenlet.kill(block=False)

    def _run(self) -> None:
        environment = self._environment
        options = environment.parsed_options
        code = NO_VERDICT
        try:
            code = _benchmark(environment, options, self._workers)
        except ProfileError as error:
            _say_error(options, "ProfileError", str(error), "Correct the profile.")
            code = USAGE
        except LoadTestError as error:
            _say_error(options, error.name, str(error), error.next_step)
        except Exception:
            log.exception("the benchmark failed")
        environment.process_exit_code = code
        runner = environment.runner
        assert runner is not None, "it has started this"
        runner.stop() if environment.web_ui else runner.quit()


def _on_end(environment: Environment, path: str) -> Callable[[Exchange], None]:
    """Tells Locust's statistics of a request as it ends."""
    fire: Any = environment.events.request.fire

    def on_end(exchange: Exchange) -> None:
        # Cheap, while load runs; what the bytes mean is read when the window is over.
        failure = exchange.failure
        if failure is None and exchange.response.status != 200:
            status = exchange.response.status
            failure = "closed_early" if status is None else f"http_{status}"
        end = exchange.end or exchange.scheduled
        fire(
            request_type="POST",
            name=path,
            response_time=(end - exchange.scheduled) / 1e6,
            response_length=0,
            exception=RuntimeError(failure) if failure else None,
            context={},
        )

    return on_end


def _benchmark(environment: Environment, options: Any, workers: Workers | None) -> int:
    if options.out:  # else it would be noticed when all is measured
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(f"--out: {error}; name a folder that can be written") from None
    profile = _profile(environment.host, options)
    count = 1 if workers is None else workers.gather(options.expect_workers)
    profile = profile.model_copy(update={"workers": count if count > 1 else None})
    fire: Any = environment.events.request.fire

    def on_row(row: Row) -> None:
        fire(
            request_type="TTFT",
            name=f"at {row.rate:g} req/s",
            response_time=0.0 if row.error else row.ttft_ms,
            response_length=0,
            exception=RuntimeError(row.error) if row.error else None,
            context={},
        )

    def progress(message: str, numbers: dict[str, Any]) -> None:
        if options.json_events:
            _event(event="progress", message=message, **numbers)
        else:
            log.info(message)

    offer = None if workers is None else workers.offer
    on_end = _on_end(environment, PATHS[profile.endpoint])
    result, rows = run(profile, progress, on_end, on_row, offer)
    if options.out:
        folder = Path(options.out)
        (folder / "rows.jsonl.gz").write_bytes(rows)
        (folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")
    if not options.json_events:
        capacity = result.capacity.text(profile.mode)
        log.info("%s: %s", result.verdict.upper(), result.reason)
        log.info("capacity %s, limited by %s", capacity, result.limited_by)
    return EXIT_CODES[result.verdict]


def _profile(host: str | None, options: Any) -> Profile:
    """From the file or from the flags. Raises ProfileError, and LoadTestError if the engine has
    to be asked for the model and is away."""
    if options.load_profile:
        profile = load_profile(Path(options.load_profile))
        return profile.model_copy(update={"base_url": host}) if host else profile
    if not host:
        raise ProfileError("--host: the engine's address is missing, e.g. http://127.0.0.1:8000")
    try:
        given = {
            "base_url": host,
            "model": options.model or "unknown",
            "rates": [float(rate) for rate in options.rates.split(",")],
            "rate_range": [float(rate) for rate in options.rate_range.split(",") if rate] or None,
            "slo": {name: getattr(options, name) for name in LIMITS},
            **{name: getattr(options, name) for name in TRAFFIC},
            **_traffic(options),
        }
        profile = with_trace(Profile.model_validate(given), Path.cwd(), "flags")
    except ValidationError as error:
        raise ProfileError(describe(error, "flags")) from None
    except ValueError as error:
        raise ProfileError(f"flags: {error}; write e.g. --rates 1,2,4") from None
    if options.model:
        return profile
    model = Engine(profile.base_url, profile.timeout_s).facts("").model
    return profile.model_copy(update={"model": model})


def _traffic(options: Any) -> dict[str, Any]:
    """The fields of a profile that one flag, or several, stand for in short. Raises ValueError."""
    trace = {"path": options.trace, "prefixes": options.trace_prefixes}
    shared = {"tokens": options.shared_prefix_tokens, "count": options.shared_prefixes}
    weights = [one.partition("=") for one in options.models.split(",") if one]
    return {
        "prompt_tokens": _lengths(options.prompt_tokens),
        "output_tokens": _lengths(options.output_tokens),
        "trace": trace if options.trace else None,
        "shared_prefix": shared if options.shared_prefix_tokens else None,
        "conversations": {"turns": options.turns, "think_s": options.think_s}
        if options.turns > 1
        else None,
        "models": {name: weight or 1 for name, _, weight in weights} or None,
    }


def _lengths(given: str) -> Any:
    """64, uniform:8:64, lognormal:200:900:4000 or trace, as the profile has it."""
    law, *numbers = given.split(":")
    names = {"uniform": ("min", "max"), "lognormal": ("median", "p95", "max")}.get(law, ())
    if names and len(names) == len(numbers):
        return {law: {name: int(number) for name, number in zip(names, numbers, strict=True)}}
    return int(given) if given.isdigit() else given


def _say_error(options: Any, name: str, message: str, next_step: str) -> None:
    if options.json_events:
        _event(event="error", error=name, message=message, next=next_step)
    else:
        log.error("%s: %s. %s", name, message, next_step)


def _event(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)
