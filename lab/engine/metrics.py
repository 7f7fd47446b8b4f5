"""vLLM's metrics, by their real names, in Prometheus's text format."""

import time
from bisect import bisect_left
from collections import Counter

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Histogram:
    """Counts by upper bound, as Prometheus keeps them; values in seconds."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._buckets, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """The series of this histogram."""
        out, total = [], 0
        for bound, count in zip((*self._buckets, "+Inf"), self._counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{{labels},le="{bound}"}} {float(total)}')
        return [*out, f"{name}_sum{{{labels}}} {self._sum}", f"{name}_count{{{labels}}} {total}.0"]


class Metrics:
    """Everything that the simulator counts; the gauges are read from the batch."""

    def __init__(self, model: str) -> None:
        self._labels = f'engine="0",model_name="{model}"'
        self._started = time.time()
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.posts = 0
        self.finished: Counter[str] = Counter()
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(E2E_BUCKETS)

    def render(self, running: int, waiting: int, kv_usage: float) -> str:
        """The page of /metrics."""
        gauges = {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": kv_usage,
        }
        counters = {
            "num_preemptions_total": self.preemptions,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "prefix_cache_queries_total": self.prefix_queries,
            "prefix_cache_hits_total": self.prefix_hits,
            # Not vLLM's: requests for completions, answered or refused.
            "simulated_posts_total": self.posts,
        }
        histograms = {
            "time_to_first_token_seconds": self.ttft,
            "inter_token_latency_seconds": self.itl,
            "e2e_request_latency_seconds": self.e2e,
        }
        out = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                out += self._head(name, kind)
                out.append(f"vllm:{name}{{{self._labels}}} {float(value)}")
        out += self._head("request_success_total", "counter")
        for reason in ("stop", "length", "abort", "error", "repetition"):
            labels = f'{self._labels},finished_reason="{reason}"'
            out.append(f"vllm:request_success_total{{{labels}}} {float(self.finished[reason])}")
        for name, histogram in histograms.items():
            out += self._head(name, "histogram")
            out += histogram.lines(f"vllm:{name}", self._labels)
        out += ["# TYPE process_start_time_seconds gauge"]
        out += [f"process_start_time_seconds {self._started}", ""]
        return "\n".join(out)

    @staticmethod
    def _head(name: str, kind: str) -> list[str]:
        return [f"# HELP vllm:{name} Simulated.", f"# TYPE vllm:{name} {kind}"]
