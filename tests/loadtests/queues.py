"""Queues in virtual time, with a knee that is known by analysis: what the search is tested on."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from loadtests.arrivals import draw
from loadtests.profile import Profile
from loadtests.verdict import Window
from tests.loadtests.samples import make_profile, make_row


@dataclass(frozen=True)
class Queue:
    """`servers` that take `service_s` a request, first come, first served; Poisson arrivals. The
    first token comes `BASE_MS` after the service starts. `random_service`: exponential. `answer_s`,
    of one server with random service: its first token ends the service, and the rest of the answer
    takes so long, which keeps nobody waiting."""

    servers: int
    service_s: float
    limit_ms: float
    random_service: bool = False
    answer_s: float = 0.0

    def profile(self, required: float, lowest: float, highest: float, **changes: object) -> Profile:
        """A search on this queue."""
        fields = {
            "mode": "search",
            "rates": [],
            "rate_range": [lowest, highest],
            "warmup_seconds": 10 * self.service_s,
            "slo": {"ttft_p95_ms": self.limit_ms, "itl_p95_ms": 1e6, "required_rate": required},
        }
        return make_profile(**{**fields, **changes})

    def knee(self) -> float:
        """λ*: the rate at which 5 % wait too long."""
        low, high = 0.0, self.servers / self.service_s
        for _ in range(40):
            rate = (low + high) / 2
            low, high = (rate, high) if self.late(rate) < 0.05 else (low, rate)
        return low

    def late(self, rate: float) -> float:
        """Share of the requests that miss the limit, by analysis."""
        wait_s = (self.limit_ms - BASE_MS) / 1e3
        if self.answer_s:
            # The sojourn in M/M/1 is exponential (Kleinrock 1975, 3.2).
            return math.exp(-(1 / self.service_s - rate) * wait_s)
        tail = _mmc if self.random_service else _mdc
        return tail(rate, self.servers, self.service_s, wait_s)

    def measure(self, seed: int) -> "Callable[[float, int, float, float], Window]":
        """Offers load to it. One call is one window, from an empty queue."""
        rng = random.Random(seed)

        def window(rate: float, repeat: int, warmup_s: float, seconds: float) -> Window:
            self_seed = f"{seed} {rate!r} {repeat}"
            warm, count = round(warmup_s * rate), round(seconds * rate)
            times = draw("poisson", rate, warm, f"{self_seed} warmup")
            times += [warmup_s + at for at in draw("poisson", rate, count, self_seed)]
            free = [0.0] * self.servers
            rows = []
            for number, at in enumerate(times):
                start = max(at, free[0])
                service = self.service_s
                if self.random_service:
                    service = rng.expovariate(1 / service)
                heapq.heapreplace(free, start + service)
                wait_ms = (start - at) * 1e3
                if self.answer_s:
                    wait_ms, service = wait_ms + service * 1e3, self.answer_s
                phase = "warmup" if number < warm else "measure"
                rows.append(make_row(at * 1e3, wait_ms + BASE_MS, service * 1e3 / 3, phase=phase))
            end = warmup_s + count / rate
            return Window(rate, int(warmup_s * 1e9), int(end * 1e9), tuple(rows), 0.1, ())

        return window


BASE_MS = 1.0


def _mmc(rate: float, servers: int, service_s: float, wait_s: float) -> float:
    """P(W > t) of M/M/c: Erlang's C, then an exponential tail."""
    load = rate * service_s
    term, total = 1.0, 1.0
    for k in range(1, servers):
        term *= load / k
        total += term
    last = term * load / servers / (1 - load / servers)
    return last / (total + last) * math.exp(-(servers / service_s - rate) * wait_s)


def _mdc(rate: float, servers: int, service_s: float, wait_s: float) -> float:
    """P(W > t) of M/D/c (Franx 2001): from the number waiting, which a service time later is what
    is left of it and the arrivals since."""
    import numpy as np

    size = 400 + 40 * servers
    load = rate * service_s
    counts = np.arange(size)
    logs = counts * math.log(load) - load - np.cumsum(np.log(np.maximum(counts, 1)))
    arrivals = np.exp(logs)
    system = arrivals.copy()
    for _ in range(4000):
        left = np.concatenate([[system[: servers + 1].sum()], system[servers + 1 :]])
        after = np.convolve(left, arrivals)[:size]
        after /= after.sum()
        done = np.abs(after - system).max() < 1e-12
        system = after
        if done:
            break
    waiting = np.concatenate([[system[: servers + 1].sum()], system[servers + 1 :]]).cumsum()
    k = int(wait_s / service_s) + 1
    rest = rate * (k * service_s - wait_s)
    terms = np.exp(
        np.arange(k * servers) * math.log(max(rest, 1e-300))
        - rest
        - np.cumsum(np.log(np.maximum(np.arange(k * servers), 1)))
    )
    return 1 - float((terms * waiting[k * servers - 1 :: -1][: k * servers]).sum())
