"""More load than one core can send: Locust's master deals a plan to its workers and merges rows.

The master draws the whole plan and deals request i to worker i mod n, so that the sum is the
asked process, whatever the number of workers. All start at one point in time. Each worker tells
its monotonic clock first; the offset to the master's is known to half the shortest round trip,
within which the clock is also assumed to run evenly for a window. That error shifts one worker's
arrivals against another's, and never a TTFT: all times of a row come from one clock. Workers of
one machine share that clock, and their offset is zero.

What comes back is raw rows. Lag, rate and CPU are checked for each worker alone.
Runs under gevent, in Locust's processes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
from gevent import Greenlet
from gevent.queue import Empty, Queue

from loadtests.answer import Exchange, Row
from loadtests.engine import Engine, LoadTestError
from loadtests.generator import PATHS, Generator, Offered
from loadtests.ladder import window_ns
from loadtests.plan import Planned, planned
from loadtests.profile import Profile, parse_profile
from loadtests.prompts import Tokens
from loadtests.verdict import Window, most_lag_ms, untrusted

if TYPE_CHECKING:  # importing Locust would patch sockets and threads, in tests too
    from locust.runners import MasterRunner, WorkerRunner

MESSAGE = "loadtests"
MISSING = "missing"  # Locust's state of a worker without heartbeats for three seconds
CLOCK_ROUNDS = 8
CLOCK_SECONDS = 15.0
# To hand out a plan, and to read and send the rows of a window: a fixed part and one a request.
TALK_SECONDS, TALK_SECONDS_A_REQUEST = 30.0, 0.01
START_NS = 300_000_000  # from the last worker that is ready to the start of the window
ROWS_A_MESSAGE = 200
log = logging.getLogger("loadtests")


@dataclass
class _Share:
    """One worker's part of a window. `ahead_ns`: its clock less the master's, ± `error_ns`."""

    name: str
    plan: list[Planned]
    ahead_ns: int = 0
    error_ns: int = 0
    rows: list[Row] = field(default_factory=list)
    end: int = 0
    cpu: float = 0.0
    problem: str = ""


class Workers:
    """The master's side."""

    def __init__(self, runner: "MasterRunner") -> None:
        self._runner = runner
        self._inbox: Queue[tuple[str, dict[str, Any]]] = Queue()
        self._ids: list[str] = []
        self._round = 0
        runner.register_message(MESSAGE, self._receive)

    def gather(self, expected: int) -> int:
        """Takes the workers that are connected for a new run; how many.

        Raises LoadTestError if they are fewer than `expected`.
        """
        self._ids = [client.id for client in self._runner.clients.all if self._lives(client.id)]
        if len(self._ids) < max(1, expected):
            raise LoadTestError(
                "WorkersMissing",
                f"{len(self._ids)} workers are connected, {max(1, expected)} are expected",
                "Start them (--worker --master-host …), then start the run.",
            )
        return len(self._ids)

    def offer(
        self, generator: Generator, plan: Sequence[Planned], rate: float, repeat: int
    ) -> Offered:
        """Has the workers send a plan. If one is lost meanwhile, the others finish."""
        self._round += 1
        count = len(self._ids)
        shares = {
            worker: _Share(_name(index, count, worker), list(plan[index::count]))
            for index, worker in enumerate(self._ids)
        }
        profile = generator.profile
        talk_s = TALK_SECONDS + TALK_SECONDS_A_REQUEST * len(plan)
        lost = self._set_clocks(shares)
        if not lost:
            for worker, share in shares.items():
                self._send(
                    worker,
                    do="plan",
                    profile=profile.model_dump_json(),
                    run=generator.run,
                    tokens=list(astuple(generator.tokens)),
                    rate=rate,
                    repeat=repeat,
                    plan=[one.as_json() for one in share.plan],
                )
            lost = self._await("ready", shares, talk_s, lambda _worker, _reply: True)
        start = time.perf_counter_ns() + START_NS
        end = start + window_ns(rate, profile)
        if lost:
            return Offered(start, end, (), 0.0, lost, lost=True)
        for worker, share in shares.items():
            self._send(worker, do="go", start=start + share.ahead_ns)

        def take(worker: str, reply: dict[str, Any]) -> bool:
            share = shares[worker]
            index = self._ids.index(worker)
            share.rows += [Row.from_json(row, index, -share.ahead_ns) for row in reply["rows"]]
            share.end, share.cpu = reply["end"] - share.ahead_ns, reply["cpu"]
            share.problem = reply["problem"]
            return bool(reply["last"])

        load_s = (end - time.perf_counter_ns()) / 1e9 + profile.timeout_s
        lost = self._await("rows", shares, load_s + talk_s, take)
        problems = [found for s in shares.values() if (found := _problem(s, rate, start, profile))]
        rows = sorted((row for s in shares.values() for row in s.rows), key=lambda r: r.scheduled)
        return Offered(
            start,
            max(end, *(share.end for share in shares.values())),
            tuple(rows),
            max(share.cpu for share in shares.values()),
            lost or "; ".join(problems),
            lost=bool(lost),
        )

    def _set_clocks(self, shares: dict[str, _Share]) -> str:
        """Each worker's clock against ours, by the quickest of some exchanges; who is lost."""
        for worker, share in shares.items():
            trips: list[tuple[int, int]] = []
            deadline = time.monotonic() + CLOCK_SECONDS
            while len(trips) < CLOCK_ROUNDS:
                asked = time.perf_counter_ns()
                self._send(worker, do="clock", asked=asked)
                now = self._clock(worker, asked)
                trip = time.perf_counter_ns() - asked
                if now is not None:
                    trips.append((trip, now - (asked + trip // 2)))
                elif not self._lives(worker) or time.monotonic() > deadline:
                    return f"{share.name} did not tell its clock within {CLOCK_SECONDS:g} s"
            trip, ahead = min(trips)
            share.error_ns = (trip + 1) // 2
            # Within the error it may be, and on one machine is, the same clock.
            share.ahead_ns = ahead if abs(ahead) > share.error_ns else 0
        return ""

    def _clock(self, worker: str, asked: int) -> int | None:
        """The answer to this very question; None if none came: it may not have listened yet."""
        until = time.monotonic() + 1.0
        while (left := until - time.monotonic()) > 0:
            try:
                sender, reply = self._inbox.get(timeout=left)
            except Empty:
                break
            if sender == worker and reply.get("asked") == asked:
                return int(reply["now"])
        return None

    def _await(
        self,
        kind: str,
        shares: dict[str, _Share],
        seconds: float,
        take: Callable[[str, dict[str, Any]], bool],
    ) -> str:
        """Until `take` has said of each worker that it is done, or it is lost: says why."""
        waiting = set(shares)
        deadline = time.monotonic() + seconds
        lost: list[str] = []

        def give_up(worker: str, why: str) -> None:
            waiting.discard(worker)
            lost.append(f"{shares[worker].name} {why}")

        while waiting:
            try:
                worker, reply = self._inbox.get(timeout=0.2)
            except Empty:
                for worker in sorted(waiting):
                    if not self._lives(worker):
                        give_up(worker, "died, or its connection did")
                    elif time.monotonic() > deadline:
                        give_up(worker, f"is late: no {kind} after {seconds:.0f} s")
                continue
            if worker not in waiting or reply.get("round") != self._round:
                continue  # of a window before
            if reply["re"] == "error":
                give_up(worker, f"failed: {reply['message']}")
            elif reply["re"] == kind and take(worker, reply):
                waiting.discard(worker)
        return "; ".join(lost)

    @property
    def alive(self) -> bool:
        """Whether any worker of this run is."""
        return any(self._lives(worker) for worker in self._ids)

    def _lives(self, worker: str) -> bool:
        client = self._runner.clients.get(worker)
        return client is not None and client.state != MISSING

    def _send(self, worker: str, **fields: Any) -> None:
        self._runner.send_message(MESSAGE, {**fields, "round": self._round}, worker)

    def _receive(self, msg: Any, **_: Any) -> None:
        self._inbox.put((msg.node_id, msg.data))


def _name(index: int, count: int, worker: str) -> str:
    return f"worker {index + 1} of {count} ({worker.rpartition('_')[0]})"


def _problem(share: _Share, rate: float, start: int, profile: Profile) -> str:
    """Why one worker's part of a window can't be trusted; empty if it can."""
    planned_here = sum(one.phase == "measure" for one in share.plan)
    if not share.rows or not planned_here:
        return ""  # it is lost, which has been said, or it had nothing to do
    if share.error_ns / 1e6 > most_lag_ms(profile.slo):
        return f"{share.name}: its clock is known to ± {share.error_ns / 1e6:.1f} ms only"
    first = start + int(profile.warmup_seconds * 1e9)
    end = start + window_ns(rate, profile)
    own_rate = planned_here / ((end - first) / 1e9)
    window = Window(own_rate, first, max(first + 1, share.end), tuple(share.rows), share.cpu, ())
    found = untrusted(window, profile) or share.problem
    return f"{share.name}: {found}" if found else ""


class Worker:
    """The worker's side: it does what the master says. `on_end`: from the API's path to what is
    called with each request that ended."""

    def __init__(
        self, runner: "WorkerRunner", on_end: Callable[[str], Callable[[Exchange], None]]
    ) -> None:
        self._runner = runner
        self._on_end = on_end
        self._busy: Greenlet | None = None
        self._ready: Callable[[int], Offered] | None = None
        runner.register_message(MESSAGE, self._receive)

    def stop(self) -> None:
        """Ends what it does for the master."""
        if self._busy is not None:
            self._busy.kill(block=False)

    def _receive(self, msg: Any, **_: Any) -> None:
        order = msg.data
        if order["do"] == "clock":  # at once: the round trip bounds the error
            self._reply(order, re="clock", asked=order["asked"], now=time.perf_counter_ns())
            return
        if order["do"] == "plan":
            self.stop()
        self._busy = gevent.spawn(self._try, order)

    def _try(self, order: dict[str, Any]) -> None:
        try:
            self._prepare(order) if order["do"] == "plan" else self._go(order)
        except Exception as error:
            log.exception("a worker failed")
            self._reply(order, re="error", message=f"{type(error).__name__}: {error}")

    def _prepare(self, order: dict[str, Any]) -> None:
        profile = parse_profile(order["profile"])
        rate, repeat = order["rate"], order["repeat"]
        engine = Engine(profile.base_url, profile.timeout_s)
        generator = Generator(profile, engine, self._on_end(PATHS[profile.endpoint]))
        generator.run, generator.tokens = order["run"], Tokens(*order["tokens"])
        ready = generator.prepare([planned(one) for one in order["plan"]], rate, repeat)
        self._ready = lambda start: generator.offer(ready, start, rate, repeat)
        self._reply(order, re="ready")

    def _go(self, order: dict[str, Any]) -> None:
        assert self._ready is not None, "the master sends a plan first"
        offered, self._ready = self._ready(order["start"]), None
        rows = offered.rows
        for at in range(0, max(1, len(rows)), ROWS_A_MESSAGE):
            self._reply(
                order,
                re="rows",
                rows=[row.as_json() for row in rows[at : at + ROWS_A_MESSAGE]],
                last=at + ROWS_A_MESSAGE >= len(rows),
                end=offered.end,
                cpu=offered.cpu,
                problem=offered.problem,
            )
            gevent.sleep(0)  # or its heartbeats would stay away

    def _reply(self, order: dict[str, Any], **fields: Any) -> None:
        self._runner.send_message(MESSAGE, {**fields, "round": order["round"]})
