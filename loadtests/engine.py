"""What the engine says about itself: version, models, metrics. Standard library only."""

import http.client
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

METRICS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
}
# Its value: a number of Prometheus' text format.
_SERIES = re.compile(
    r"^(vllm:\w+)(?:\{([^}]*)\})? (\d+(?:\.\d*)?(?:e[+-]?\d+)?|NaN|[+-]Inf)(?!\S)", re.MULTILINE
)


class LoadTestError(Exception):
    """The benchmark can't run. `name` for programs; the message says what and where, `next` what
    to do about it."""

    def __init__(self, name: str, message: str, next_step: str) -> None:
        super().__init__(message)
        self.name = name
        self.next_step = next_step


@dataclass(frozen=True)
class Sample:
    """One reading of /metrics, summed over the engine's cores; time in ns."""

    time_ns: int
    values: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        return self.values.get(f"vllm:{metric}", 0.0)

    def as_json(self) -> dict[str, Any]:
        """The row for rows.jsonl.gz."""
        return {"row": "server", **asdict(self)}


@dataclass(frozen=True)
class EngineFacts:
    """`root` is the path that the weights were loaded from."""

    version: str
    model: str
    root: str
    max_model_len: int | None
    server: str


def parse_metrics(text: str, model: str, time_ns: int) -> Sample:
    """The metrics that the benchmark needs, of the series labelled with `model`."""
    values: dict[str, float] = {}
    for name, labels, value in _SERIES.findall(text):
        if name in METRICS and f'model_name="{model}"' in labels:
            values[name] = values.get(name, 0.0) + float(value)
    return Sample(time_ns, values)


class Engine:
    """Plain requests to one engine, for everything but the load itself."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        parts = urlsplit(base_url)
        self.base_url = base_url.rstrip("/")
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.authority = parts.netloc  # with brackets, if it is an IPv6 address
        self._timeout_s = timeout_s

    def get(self, path: str) -> bytes:
        """The body of GET `path`. Raises LoadTestError."""
        return self._request("GET", path, None)[0]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer of POST `path`. Raises LoadTestError."""
        return self._json(path, self._request("POST", path, json.dumps(body))[0])

    def facts(self, model: str) -> EngineFacts:
        """Version and model. Raises LoadTestError if it is away or doesn't serve `model`."""
        data, server = self._request("GET", "/v1/models", None)
        entries = self._json("/v1/models", data).get("data")
        if not isinstance(entries, list) or not all(map(_is_model, entries)):
            raise self._not_an_engine("/v1/models", data, "no list of models")
        models = {entry["id"]: entry for entry in entries}
        if not model and len(models) == 1:
            model = next(iter(models))
        if model not in models:
            raise LoadTestError(
                "WrongModel",
                f"{self.base_url} serves {', '.join(models) or 'nothing'}, not {model!r}",
                "Give the served name of the model (`model` in a profile, --model).",
            )
        version = self._json("/version", self.get("/version")).get("version", "unknown")
        entry = models[model]
        return EngineFacts(
            str(version), model, str(entry.get("root")), entry.get("max_model_len"), server
        )

    def _json(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._not_an_engine(path, data, "no JSON object")
        return answer

    def _not_an_engine(self, path: str, data: bytes, what: str) -> LoadTestError:
        return LoadTestError(
            "NotAnEngine",
            f"{self.base_url}{path} answered {data[:80]!r}, which is {what}",
            "Check that base_url (--host) is a vLLM engine.",
        )

    def _request(self, method: str, path: str, body: str | None) -> tuple[bytes, str]:
        headers = {"Content-Type": "application/json"} if body else {}
        # A connection each: an idle one would be closed by the engine between two steps.
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise LoadTestError(
                "EngineUnreachable",
                f"{method} {self.base_url}{path}: {error or type(error).__name__}",
                "Check that the engine is ready and that this network reaches it.",
            ) from None
        finally:
            connection.close()
        if response.status != 200:
            raise LoadTestError(
                "EngineRefused",
                f"{method} {self.base_url}{path} answered {response.status}: "
                f"{data[:200].decode('utf-8', 'replace')}",
                "Look at the engine's log.",
            )
        return data, response.headers.get("Server", "unknown")


def _is_model(entry: Any) -> bool:
    """Whether it is one of /v1/models; not all servers say how long a prompt may be."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and isinstance(entry.get("max_model_len"), int | None)
    )
