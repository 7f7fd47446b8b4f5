"""Continuous batching: a waiting queue, running sequences, and steps that take stated time."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from lab.engine.metrics import Metrics
from lab.engine.settings import ServiceCurve

BLOCK = 16  # tokens of the KV cache that are shared or not, as in vLLM
CACHED_BLOCKS = 65536
# The loop's own timers are up to a millisecond late; the rest is slept through exactly.
COARSE_S = 0.0015


class Sequence:
    """One request within the engine. `emit(token, finish_reason)` is called for each token and
    returns False when nobody listens any more."""

    def __init__(
        self,
        prompt: list[str],
        tokens: Iterator[str],
        max_tokens: int,
        emit: Callable[[str, str | None], bool],
    ) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.emit = emit
        self.arrived = time.perf_counter()
        self.generated = 0
        self.finish_reason: str | None = None
        self.done = asyncio.Event()
        self.last_token_at = 0.0
        self.to_prefill = 0
        self._tokens = tokens
        self._next = next(tokens, None)

    def take(self) -> tuple[str, str | None]:
        """The next token, and why it is the last, if it is. An empty answer is one empty token."""
        token, self._next = self._next or "", next(self._tokens, None)
        self.generated += 1
        reason = None
        if self.generated >= self.max_tokens:
            reason = "length"
        elif self._next is None:
            reason = "stop"
        return token, reason

    @property
    def blocks(self) -> int:
        """KV cache blocks that it holds."""
        return -(-(len(self.prompt) + self.generated) // BLOCK)


class Batch:
    """The simulated engine core. Run `run()` as a task; it ends when cancelled."""

    def __init__(
        self, curve: ServiceCurve, max_num_seqs: int, metrics: Metrics, prefix_caching: bool
    ) -> None:
        self.curve = curve
        self.max_num_seqs = max_num_seqs
        self.metrics = metrics
        self.hung = False
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._wake = asyncio.Event()
        self._prefix_caching = prefix_caching
        self._cached: OrderedDict[tuple[int, tuple[str, ...]], None] = OrderedDict()

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return sum(sequence.blocks for sequence in self.running) / self.curve.kv_cache_blocks

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.metrics.prompt_tokens += len(sequence.prompt)
        sequence.to_prefill = len(sequence.prompt) - self._prefix_hit(sequence.prompt)
        self.waiting.append(sequence)
        self._wake.set()

    def abort(self, sequence: Sequence) -> None:
        """Drops a sequence whose client has gone, or that the shutdown cuts off."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._finish(sequence, "abort")

    async def run(self) -> None:
        """Steps for ever."""
        now = time.perf_counter()
        while True:
            if self.hung or not (self.running or self.waiting):
                self._wake.clear()
                await self._wake.wait()
                now = time.perf_counter()
                continue
            prefill = self._admit()
            curve = self.curve
            step_ms = (
                curve.decode_ms_per_step
                + curve.decode_ms_per_sequence * len(self.running)
                + curve.prefill_ms_per_token * prefill
            )
            # The next step starts when this one should have ended, so that delays don't add up,
            # unless the machine was away for longer than a step.
            now = max(now, time.perf_counter() - step_ms / 1e3) + step_ms / 1e3
            await _sleep_until(now)
            self._step()

    def _admit(self) -> int:
        """Moves waiting sequences to the batch; the prompt tokens to be prefilled now."""
        prefill = 0
        free = self.curve.kv_cache_blocks - sum(sequence.blocks for sequence in self.running)
        while self.waiting and len(self.running) < self.max_num_seqs:
            if self.waiting[0].blocks > free and self.running:
                break
            sequence = self.waiting.popleft()
            free -= sequence.blocks
            prefill += sequence.to_prefill
            sequence.to_prefill = 0
            self.running.append(sequence)
        return prefill

    def _step(self) -> None:
        for sequence in list(self.running):
            token, reason = sequence.take()
            alive = sequence.emit(token, reason)
            now = time.perf_counter()
            self.metrics.generation_tokens += 1
            if sequence.generated == 1:
                self.metrics.ttft.observe(now - sequence.arrived)
            else:
                self.metrics.itl.observe(now - sequence.last_token_at)
            sequence.last_token_at = now
            if not alive or reason:
                self.running.remove(sequence)
                self._finish(sequence, reason if alive and reason else "abort")
        # Out of blocks: the youngest gives up its own and is prefilled again later.
        while len(self.running) > 1 and self.kv_usage > 1:
            youngest = self.running.pop()
            youngest.to_prefill = len(youngest.prompt) + youngest.generated
            self.waiting.appendleft(youngest)
            self.metrics.preemptions += 1

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.metrics.finished[reason] += 1
        self.metrics.e2e.observe(time.perf_counter() - sequence.arrived)
        sequence.done.set()

    def _prefix_hit(self, prompt: list[str]) -> int:
        """Leading tokens of the prompt, in whole blocks, that were prefilled before."""
        if not self._prefix_caching:
            return 0
        self.metrics.prefix_queries += len(prompt)
        hit, parent, fresh = 0, 0, False
        # The last token is always computed, or there would be nothing to sample from.
        for end in range(BLOCK, len(prompt), BLOCK):
            key = (parent, tuple(prompt[end - BLOCK : end]))
            parent = hash(key)
            fresh = fresh or key not in self._cached
            if not fresh:
                hit = end
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > CACHED_BLOCKS:
            self._cached.popitem(last=False)
        self.metrics.prefix_hits += hit
        return hit


async def _sleep_until(at: float) -> None:
    coarse = at - time.perf_counter() - COARSE_S
    await asyncio.sleep(max(0.0, coarse))
    rest = at - time.perf_counter()
    if rest > 0:
        time.sleep(rest)
