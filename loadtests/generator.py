"""Offers load: open loop, at times drawn before, the clock read before anything is parsed.

Runs under gevent, in the Locust process.
"""

import gc
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Any

import gevent
from gevent import socket

from loadtests.answer import Exchange, Row, read_answer
from loadtests.clock import Alarm
from loadtests.connections import Connections
from loadtests.engine import Engine, LoadTestError, Sample, parse_metrics
from loadtests.ladder import window_ns
from loadtests.plan import Planned, Planner, Text
from loadtests.profile import Profile
from loadtests.prompts import Tokens, calibrated, text
from loadtests.verdict import Window, late_sends_that_spoil, most_lag_ms, stood_still

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SAMPLE_SECONDS = 0.5
START_NS = 20_000_000  # from now to the start of a window
CALIBRATION_WORDS = 8


@dataclass(frozen=True)
class Offered:
    """What came of a plan. Times in ns; `cpu`: share of one core that the generator used, of
    several workers the busiest one's. `problem`: why it can't be trusted, if so. `lost`: since a
    worker is gone, no further plan can be sent."""

    start: int
    end: int
    rows: tuple[Row, ...]
    cpu: float
    problem: str = ""
    lost: bool = False


class WorkerLost(LoadTestError):
    """A worker died or did not answer in time. `window`: what the others measured."""

    def __init__(self, message: str, window: Window) -> None:
        super().__init__("WorkerLost", message, "Look at the worker's log, then run it again.")
        self.window = window


# Sends the plan of a window: generator, plan, rate, repeat.
Offer = Callable[["Generator", Sequence[Planned], float, int], Offered]


class Generator:
    """Load for one engine. `on_end` is called for each request that has ended."""

    def __init__(
        self,
        profile: Profile,
        engine: Engine,
        on_end: Callable[[Exchange], None],
        offer: Offer | None = None,
    ):
        """`offer`: who sends the plans, if not this process."""
        self.profile = profile
        self.engine = engine
        self.path = PATHS[profile.endpoint]
        self.run = secrets.token_hex(4)  # marks the texts of this run's prompts
        self.tokens = Tokens()
        self._offer: Offer = offer or Generator.offer_here
        self.samples: list[Sample] = []
        # Resolved once: a name look-up takes longer than some first tokens.
        family = socket.AF_UNSPEC
        try:
            found = socket.getaddrinfo(engine.host, engine.port, family, socket.SOCK_STREAM)
        except OSError as error:
            raise LoadTestError(
                "EngineUnreachable",
                f"{engine.base_url}: {engine.host} can't be resolved: {error}",
                "Correct base_url (--host).",
            ) from None
        self.family, self.address = found[0][0], found[0][4]
        self._on_end = on_end
        self._readings: list[tuple[int, bytes]] = []
        self._late_ns = int(most_lag_ms(profile.slo) * 1e6)

    @cached_property
    def planner(self) -> Planner:
        """Draws the plans; a worker is given its part of one, and needs none."""
        return Planner(self.profile)

    def calibrate(self) -> None:
        """Learns from the engine how many tokens a word is.

        Raises LoadTestError if it doesn't answer, or if no prompt can be as short as asked.
        """
        few, many = (
            (words, self._count_tokens(text(self.run, self.planner.key(), words)))
            for words in (CALIBRATION_WORDS, CALIBRATION_WORDS + 64)
        )
        self.tokens = calibrated(few, many)
        shortest = self.tokens.template + 3 * self.tokens.per_word
        lengths = self.profile.prompt_tokens
        if not lengths.trace and shortest > lengths.most + 1:
            raise LoadTestError(
                "PromptTooShort",
                f"prompt_tokens is at most {lengths.most}, but the chat template alone has "
                f"{self.tokens.template:.0f}",
                f"Ask for {shortest:.0f} tokens or more, or for endpoint completions.",
            )

    def _count_tokens(self, prompt: str) -> int:
        """By vLLM's /tokenize, so that the engine sees no completion that was not scheduled."""
        body = self._body(self.profile.model, [prompt])
        count = self.engine.post("/tokenize", body).get("count")
        if not isinstance(count, int):
            raise LoadTestError(
                "NotAnEngine",
                f"{self.engine.base_url}/tokenize answered without a count",
                "Check that base_url (--host) is a vLLM engine.",
            )
        return count

    def window(self, rate: float, repeat: int) -> Window:
        """Warm-up and one measured window at `rate`, without a break between them.

        Returns when the last request has ended or timed out. Ends early, with the requests that
        were sent, once so many left late that the window can't count any more. Raises WorkerLost.
        """
        plan = self.planner.window(rate, repeat)
        sampler = gevent.spawn(self._sample)
        try:
            offered = self._offer(self, plan, rate, repeat)
        finally:
            sampler.kill()
        first = offered.start + int(self.profile.warmup_seconds * 1e9)
        window = Window(
            rate,
            first,
            offered.end,
            offered.rows,
            offered.cpu,
            self._take_samples(),
            offered.problem,
        )
        if offered.lost:
            raise WorkerLost(offered.problem, window)
        return window

    def prepare(
        self, plan: Sequence[Planned], rate: float, repeat: int
    ) -> list[tuple[Exchange, bytes]]:
        """The requests of a plan, ready to send; `scheduled` counts from the window's start."""
        ready = []
        for one in plan:
            ready.append(
                (
                    Exchange(
                        one.number, one.at_ns, one.phase, one.model, one.output_tokens, one.turn
                    ),
                    self._request(one, f"{rate:g}-{repeat}-{one.number}"),
                )
            )
            if len(ready) % 100 == 0:
                gevent.sleep(0)  # as a worker it must show that it lives
        gc.collect()  # now, when nothing waits for it
        return ready

    def offer_here(self, plan: Sequence[Planned], rate: float, repeat: int) -> Offered:
        """Offers a whole plan from this process."""
        ready = self.prepare(plan, rate, repeat)
        return self.offer(ready, time.perf_counter_ns() + START_NS, rate, repeat)

    def offer(
        self, ready: list[tuple[Exchange, bytes]], start: int, rate: float, repeat: int
    ) -> Offered:
        """Sends each request at its time after `start`, and returns when all have ended."""
        gc.disable()  # a collection stops all greenlets for milliseconds
        for exchange, _ in ready:
            exchange.scheduled += start
        measured = sum(exchange.phase == "measure" for exchange, _ in ready)
        end = start + window_ns(rate, self.profile)
        hopeless, late, sent = late_sends_that_spoil(measured), 0, 0
        connections = Connections(
            self.family, self.address, self.profile.timeout_s, self._late_ns, self._on_end
        )
        alarm = Alarm()
        cpu_at: list[tuple[int, float]] = []
        try:
            for exchange, request in ready:
                if exchange.phase == "measure" and not cpu_at:
                    cpu_at.append((time.perf_counter_ns(), time.process_time()))
                    connections.stood_still_ns = 0
                alarm.wait_until(exchange.scheduled)
                if late >= hopeless:
                    end = exchange.scheduled
                    break
                connections.send(exchange, request)
                sent += 1
                if exchange.phase == "measure" and _lag(exchange) > self._late_ns:
                    late += 1
            alarm.wait_until(end)
            cpu_at.append((time.perf_counter_ns(), time.process_time()))
            connections.wait()
        finally:
            connections.close()
            alarm.close()
            gc.enable()
        (wall_0, cpu_0), (wall_1, cpu_1) = cpu_at[0], cpu_at[-1]
        rows = []
        for exchange, _ in ready[:sent]:
            rows.append(read_answer(exchange, rate, repeat))
            if len(rows) % 100 == 0:
                gevent.sleep(0)
        cpu = (cpu_1 - cpu_0) / max(1e-9, (wall_1 - wall_0) / 1e9)
        still = stood_still(connections.stood_still_ns, wall_1 - wall_0)
        return Offered(start, end, tuple(rows), cpu, still)

    def _body(self, model: str, messages: list[str]) -> dict[str, Any]:
        if self.profile.endpoint != "chat":
            return {"model": model, "prompt": " ".join(messages)}
        roles = cycle(("user", "assistant"))
        return {
            "model": model,
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(roles, messages, strict=False)
            ],
        }

    def _request(self, one: Planned, name: str) -> bytes:
        body = {
            **self._body(one.model, self._messages(one)),
            # Always sent: a model's generation_config.json may say otherwise.
            "temperature": 0,
            "max_tokens": one.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        data = json.dumps(body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.engine.authority}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"X-Request-Id: {name}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def _messages(self, one: Planned) -> list[str]:
        """What the engine counts as about the planned tokens, a chat's template included, which
        goes off the end of the first message. (No text has fewer than three words.)"""
        first = one.messages[0][-1]

        def words(part: Text) -> int:
            tokens = part.tokens - (self.tokens.template if part is first else 0)
            return round(tokens / self.tokens.per_word)

        return [
            " ".join(text(self.run, part.key, words(part)) for part in message)
            for message in one.messages
        ]

    def _sample(self) -> None:
        """Reads /metrics every half second, over a connection of its own; parsed later."""
        engine = Engine(self.engine.base_url, self.profile.timeout_s)
        while True:
            try:
                text = engine.get("/metrics")
                self._readings.append((time.perf_counter_ns(), text))
            except LoadTestError:
                pass  # a gap in the samples; what counts are the requests
            gevent.sleep(SAMPLE_SECONDS)

    def _take_samples(self) -> tuple[Sample, ...]:
        samples = tuple(
            parse_metrics(text.decode("utf-8", "replace"), self.profile.model, time_ns)
            for time_ns, text in self._readings
        )
        self._readings.clear()
        self.samples += samples
        return samples


def _lag(exchange: Exchange) -> int:
    return (exchange.sent or 0) - exchange.scheduled
