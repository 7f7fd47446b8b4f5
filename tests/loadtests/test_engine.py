"""What a server says that is no engine, and what a metric is."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from loadtests.engine import Engine, EngineFacts, LoadTestError, parse_metrics
from tests.loadtests.servers import run_program
from tests.loadtests.test_program import benchmark, write_profile
from tests.web import Answer, serving

ENTRY = {"id": "m", "root": "/models/m", "max_model_len": 4096}


def pages(of: Mapping[str, bytes]) -> AbstractContextManager[str]:
    """A web server with these; its address."""
    return serving(lambda path: Answer(of[path]) if path in of else Answer(b"", 404))


def facts(models: bytes, version: bytes = b'{"version": "1"}', model: str = "m") -> EngineFacts:
    with pages({"/v1/models": models, "/version": version}) as url:
        return Engine(url, 10).facts(model)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>hello</html>",
        b"",
        b"[]",
        b"null",
        b'{"a":' * 100_000,
        b"{}",
        b'{"error": {"message": "nope"}}',
        b'{"data": null}',
        b'{"data": {"id": "m"}}',
        b'{"data": "m"}',
        b'{"data": [1]}',
        b'{"data": [null]}',
        b'{"data": [{}]}',
        b'{"data": [{"id": ["m"]}]}',
        b'{"data": [{"id": "m", "max_model_len": "x"}]}',
        b'{"data": [{"id": "m", "max_model_len": [1]}]}',
    ],
)
@pytest.mark.parametrize("model", ["m", ""])
def test_what_is_no_engine_is_named(answer: bytes, model: str) -> None:
    with pytest.raises(LoadTestError, match="/v1/models answered b") as raised:
        facts(answer, model=model)
    assert raised.value.name == "NotAnEngine"
    assert "--host" in raised.value.next_step


def test_a_version_that_is_none() -> None:
    models = json.dumps({"data": [ENTRY]}).encode()
    with pytest.raises(LoadTestError, match="/version answered b") as raised:
        facts(models, b"[1]")
    assert raised.value.name == "NotAnEngine"
    assert facts(models, b"{}").version == "unknown"


def test_other_servers_need_not_say_how_long_a_prompt_may_be() -> None:
    assert facts(b'{"data": [{"id": "m"}]}').max_model_len is None
    assert facts(json.dumps({"data": [ENTRY]}).encode()).max_model_len == 4096


def test_the_programs_say_it_without_a_trace(tmp_path: Path) -> None:
    with pages({"/v1/models": b"{}"}) as url:
        status, events, _ = benchmark(write_profile(tmp_path, url))
        ran = run_program("-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "-H", url)
    assert (status, events[-1]["error"]) == (3, "NotAnEngine")
    assert ran.returncode == 3
    assert f"NotAnEngine: {url}/v1/models answered b'{{}}'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_only_numbers_are_metrics() -> None:
    name = 'vllm:num_requests_running{model_name="m",engine="%d"} %s\n'
    values = ["1.0", "2", "3e+00", "many", "1.2.3", ""]
    text = "".join(name % pair for pair in enumerate(values))
    assert parse_metrics(text, "m", 0)["num_requests_running"] == 6
