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
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import psutil  # type: ignore[import-untyped]  # as Locust does
from gevent import Greenlet
from locust import User, events, task
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.answer import Exchange, Row
from loadtests.benchmark import run
from loadtests.engine import Engine, LoadTestError
from loadtests.flags import EXAMPLE, add_options, profile_of
from loadtests.generator import PATHS
from loadtests.profile import Profile, ProfileError
from loadtests.result import Verdict
from loadtests.workers import Worker, Workers

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "invalid": 3, "inconclusive": 3}
NO_VERDICT, USAGE = 3, 2
log = logging.getLogger("loadtests")


events.init_command_line_parser.add_listener(add_options)  # type: ignore[no-untyped-call]


@events.init.add_listener  # type: ignore[untyped-decorator]
def set_up(environment: Environment, **_: Any) -> None:
    """Master and workers can talk from now on, and a test's start is the benchmark's."""
    options: Any = environment.parsed_options
    runner = environment.runner
    on: Any = environment.events
    if isinstance(runner, WorkerRunner):
        worker = Worker(runner, lambda path: _on_end(environment, path))
        on.test_stop.add_listener(lambda **_: worker.stop())
        return
    host = environment.host or ("" if options.headless else EXAMPLE)  # the page asks for it
    try:  # now, and not where somebody has opened the page, or all workers are there
        if options.profile:  # Locust would take it, and the flags' defaults be the load
            raise ProfileError(
                "--profile: is Locust's own, a name for test runs; a file with the load is "
                f"given as --load-profile {options.profile}"
            )
        alone = 1 if isinstance(runner, LocalRunner) else None
        _checked(options, host, options.processes or alone)
    except ProfileError as error:
        _say_wrong(options, error)
        for child in psutil.Process().children():
            # Those of --processes. Locust would let them look for their master for a minute, and
            # one that is told to quit while it starts doesn't.
            with suppress(psutil.NoSuchProcess):
                child.kill()
        sys.exit(USAGE)
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
        """Starts it beside Locust's test. The exit status is that of the last one on the page."""
        self._environment.process_exit_code = NO_VERDICT
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
            _say_wrong(options, error)
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
    count = 1 if workers is None else workers.gather(options.expect_workers)
    profile = _checked(options, environment.host, count)
    if not profile.model:
        model = Engine(profile.base_url, profile.timeout_s).facts("").model
        profile = profile.model_copy(update={"model": model})
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


def _checked(options: Any, host: str | None, processes: int | None) -> Profile:
    """The load, which so many processes are to send, if that is known yet, and the folder for the
    result is there. Raises ProfileError."""
    profile = profile_of(options, host, sys.argv)
    if processes and profile.workers and processes != profile.workers:
        raise ProfileError(
            f"{options.load_profile}: workers: is {profile.workers}, and Locust runs {processes}; "
            f"give it --processes {profile.workers}, or take workers out"
        )
    if options.out:  # else it would be noticed when all is measured
        try:
            Path(options.out).mkdir(exist_ok=True)
        except OSError as error:
            raise ProfileError(
                f"--out: {error}; name a folder that can be written, in one that is there"
            ) from None
    return profile


def _say_wrong(options: Any, error: ProfileError) -> None:
    in_file = options.load_profile and not str(error).startswith("--")
    what = "profile" if in_file else "flags"
    _say_error(options, "ProfileError", str(error), f"Correct the {what}.")


def _say_error(options: Any, name: str, message: str, next_step: str) -> None:
    if options.json_events:
        _event(event="error", error=name, message=message, next=next_step)
    else:
        log.error("%s: %s. %s", name, message, next_step)


def _event(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)
