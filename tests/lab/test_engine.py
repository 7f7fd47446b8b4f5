"""The engine simulator: vLLM's flags, API and metrics, and the faults that it plays."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.model import adapter_files
from tests.loadtests.servers import FAST, ROOT, Simulator, make_model, simulator

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream; [DONE] as text."""
        found = re.findall(rb"data: (.*)\n\n", self.body)
        return ["[DONE]" if data == b"[DONE]" else json.loads(data) for data in found]

    @property
    def text(self) -> str:
        """The streamed text."""
        choices = [choice for event in self.events[:-1] for choice in event.get("choices", [])]
        return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def ask(engine: Simulator, path: str, body: Any = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=10)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, headers)
    response = connection.getresponse()
    answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, b"")
    answer.body = response.read()
    connection.close()
    return answer


def metrics(engine: Simulator) -> dict[str, float]:
    """Every series, by name and labels as printed."""
    page = ask(engine, "/metrics").body.decode()
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def series(name: str, **labels: str) -> str:
    extra = "".join(f',{key}="{value}"' for key, value in labels.items())
    return f'vllm:{name}{{engine="0",model_name="m"{extra}}}'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    folder = tmp_path_factory.mktemp("model")
    with simulator(folder, "--max-model-len=2048", simulation={"service_curve": FAST}) as running:
        yield running


def run(*arguments: str, timeout_s: float = 10) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lab.engine", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


# Flags and weights


def test_unknown_flag_ends_it_as_in_vllm(tmp_path: Path) -> None:
    ran = run(str(make_model(tmp_path)), "--speculate-wildly")
    assert ran.returncode == 2
    assert "error: unrecognized arguments: --speculate-wildly" in ran.stderr


def test_flags_of_the_catalog_are_known(tmp_path: Path) -> None:
    flags = ["--dtype=bfloat16", "--max-model-len=1024", "--gpu-memory-utilization=0.92"]
    flags += ["--tensor-parallel-size", "2", "--shutdown-timeout", "20", "--enforce-eager"]
    with simulator(tmp_path / "m", *flags, simulation={}) as running:
        assert ask(running, "/v1/models").json["data"][0]["max_model_len"] == 1024
        assert "tensor parallel 2" in "".join(running.log)


def make_adapter(folder: Path, rank: int = 4) -> Path:
    folder.mkdir()
    for name, content in adapter_files().items():
        (folder / name).write_bytes(content.replace(b'"r": 4', f'"r": {rank}'.encode()))
    return folder


def test_adapters_are_served_by_their_names(tmp_path: Path) -> None:
    sql, legal = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", rank=32)
    flags = ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "2"]
    flags += ["--lora-modules", f"sql={sql}", f"legal={legal}"]
    with simulator(tmp_path / "m", *flags, simulation={"service_curve": FAST}) as running:
        base, *cards = ask(running, "/v1/models").json["data"]
        assert base["parent"] is None
        assert [(c["id"], c["root"], c["parent"]) for c in cards] == [
            ("sql", str(sql), "m"),
            ("legal", str(legal), "m"),
        ]
        body = {"messages": QUESTION, "max_tokens": 20}
        answer = ask(running, "/v1/chat/completions", body | {"model": "legal"}).json
        assert answer["model"] == "legal"
        assert answer["choices"][0]["message"]["content"].startswith("[simulated] [legal] ")
        plain = ask(running, "/v1/chat/completions", body | {"model": "m"}).json
        assert "legal" not in plain["choices"][0]["message"]["content"]
        assert ask(running, "/v1/chat/completions", body | {"model": "other"}).status == 404


@pytest.mark.parametrize(
    ("flags", "spoiled", "said"),
    [
        ([], "", "LoRA is not enabled"),
        (["--enable-lora"], "folder", "Loading lora sql failed: No adapter found"),
        (["--enable-lora"], "adapter_config.json", "can't read"),
        (["--enable-lora"], "adapter_model.safetensors", "doesn't contain tensors"),
        (["--enable-lora"], "rank", "LoRA rank 32 is greater than max_lora_rank 16."),
    ],
)
def test_adapters_that_vllm_would_not_load(
    tmp_path: Path, flags: list[str], spoiled: str, said: str
) -> None:
    adapter = make_adapter(tmp_path / "a", rank=32 if spoiled == "rank" else 4)
    if spoiled.startswith("adapter_"):
        (adapter / spoiled).unlink()
    path = tmp_path / "nothing" if spoiled == "folder" else adapter
    ran = run(str(make_model(tmp_path / "m")), *flags, "--lora-modules", f"sql={path}")
    assert ran.returncode == 1
    assert said in ran.stdout


def test_longer_than_the_model_allows(tmp_path: Path) -> None:
    ran = run(str(make_model(tmp_path)), "--max-model-len", "9000")
    assert ran.returncode == 1
    assert "max_model_len (9000) is greater than the derived" in ran.stdout


def break_model(folder: Path, how: str) -> None:
    make_model(folder)
    weights = folder / "model.safetensors"
    if how == "no folder":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "longer":
        weights.write_bytes(weights.read_bytes() + b"x")
    elif how == "no header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + b"x")
    elif how == "missing shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (folder / "simulator.json").write_text('{"service_curve": {"speed": 1}}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "is not a local folder"),
        ("no config", "config.json"),
        ("no weights", "Cannot find any model weights"),
        ("truncated", "tensors end beyond the file"),
        ("longer", "incomplete"),
        ("no header", "header too large"),
        ("missing shard", "names missing files: ['other.safetensors']"),
        ("wrong settings", "service_curve: no field ['speed']"),
    ],
)
def test_a_model_that_is_not_really_there(tmp_path: Path, how: str, message: str) -> None:
    break_model(tmp_path / "m", how)
    ran = run(str(tmp_path / "m"))
    assert ran.returncode == 1
    assert message in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


def test_loading_takes_as_long_as_the_weights_are_large(tmp_path: Path) -> None:
    started = time.monotonic()
    curve = {"load_bytes_per_s": 2000}
    with simulator(tmp_path / "m", simulation={"service_curve": curve}):
        assert 1 < time.monotonic() - started < 9


# API


def test_models_name_and_root(engine: Simulator) -> None:
    models = ask(engine, "/v1/models").json["data"]
    assert [model["id"] for model in models] == ["m"]
    assert Path(models[0]["root"]).is_dir()
    assert ask(engine, "/health").status == 200
    assert ask(engine, "/version").json == {"version": "0.30.0+simulator"}


def test_every_answer_says_simulator(engine: Simulator) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/nowhere"):
        assert ask(engine, path).headers["server"] == "vllm-engine-simulator"
    answer = ask(engine, "/v1/completions", {"model": "m", "prompt": "anything at all"})
    assert answer.json["choices"][0]["text"].startswith("[simulated] ")


def test_known_answer(engine: Simulator) -> None:
    answer = ask(engine, "/v1/chat/completions", {"model": "m", "messages": QUESTION}).json
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "[simulated] The capital of France is Paris."
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 26, "total_tokens": 33, "completion_tokens": 7}


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_exactly_as_many_tokens_as_asked(engine: Simulator, tokens: int) -> None:
    body = {"model": "m", "messages": QUESTION, "max_tokens": tokens, "ignore_eos": True}
    answer = ask(engine, "/v1/chat/completions", body).json
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["message"]["content"].split()) == tokens


def test_stream_of_completions(engine: Simulator) -> None:
    body: dict[str, Any] = {"model": "m", "prompt": "capital of France", "max_tokens": 9}
    body |= {"ignore_eos": True, "stream": True}
    plain = ask(engine, "/v1/completions", body)
    assert plain.headers["content-type"].startswith("text/event-stream")
    assert plain.text.startswith("[simulated] The capital of France is Paris.")
    assert len(plain.events) == 10
    assert plain.events[-1] == "[DONE]"
    assert not any("usage" in event for event in plain.events[:-1])

    options = {"include_usage": True, "continuous_usage_stats": True}
    counted = ask(engine, "/v1/completions", {**body, "stream_options": options})
    usage = [event["usage"]["completion_tokens"] for event in counted.events[:-1]]
    assert usage == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert counted.events[-2]["choices"] == []


def test_stream_of_chat_begins_with_the_role(engine: Simulator) -> None:
    body = {"model": "m", "messages": QUESTION, "stream": True}
    answer = ask(engine, "/v1/chat/completions", body)
    assert answer.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.text == "[simulated] The capital of France is Paris."
    assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"


def test_tokenize_counts_as_usage_does(engine: Simulator) -> None:
    prompt = {"model": "m", "prompt": "one two three"}
    assert ask(engine, "/tokenize", prompt).json["count"] == 3
    usage = ask(engine, "/v1/completions", prompt).json["usage"]
    assert usage["prompt_tokens"] == 3
    assert ask(engine, "/tokenize", {"messages": QUESTION}).json["count"] == 26


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"model": "x", "prompt": "a"}, 404, "The model `x` does not exist"),
        ("/v1/completions", b"{", 400, "Invalid JSON"),
        ("/v1/completions", [], 400, "must be a JSON object"),
        ("/v1/completions", {"model": "m"}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "at least 1"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2048}, 400, "maximum context length"),
        ("/v1/chat/completions", {"messages": "hi"}, 400, "messages must be"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
        ("/nowhere", None, 404, "Not Found"),
    ],
)
def test_wrong_requests(engine: Simulator, path: str, body: Any, status: int, message: str) -> None:
    answer = ask(engine, path, body)
    assert answer.status == status
    assert message in answer.json["error"]["message"]


def test_no_http_is_survived(engine: Simulator) -> None:
    with socket.create_connection(("127.0.0.1", engine.port), 5) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(100) == b""
    assert ask(engine, "/health").status == 200


# Metrics


def test_metrics_by_vllms_names(engine: Simulator) -> None:
    before = metrics(engine)
    prompt = " ".join(f"metrics{number}" for number in range(40))
    body = {"model": "m", "prompt": prompt, "max_tokens": 5, "ignore_eos": True}
    ask(engine, "/v1/completions", body)
    after = metrics(engine)
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown[series("prompt_tokens_total")] == 40
    assert grown[series("generation_tokens_total")] == 5
    assert grown[series("request_success_total", finished_reason="length")] == 1
    assert grown[series("time_to_first_token_seconds_count")] == 1
    assert grown[series("inter_token_latency_seconds_count")] == 4
    assert grown[series("e2e_request_latency_seconds_count")] == 1
    assert grown[series("time_to_first_token_seconds_bucket", le="+Inf")] == 1
    assert grown[series("prefix_cache_queries_total")] == 40
    assert series("prefix_cache_hits_total") not in grown
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[series(name)] == 0
    assert after[series("num_preemptions_total")] == 0

    ask(engine, "/v1/completions", body)
    # Two whole blocks of 16 were seen before.
    hits = metrics(engine)[series("prefix_cache_hits_total")]
    assert hits - after[series("prefix_cache_hits_total")] == 32


def in_background(count: int, target: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_batch_and_queue(tmp_path: Path) -> None:
    curve = {**FAST, "decode_ms_per_step": 30, "max_num_seqs": 2}
    body = {"model": "m", "prompt": "a", "max_tokens": 20, "ignore_eos": True}
    with simulator(tmp_path / "m", simulation={"service_curve": curve}) as running:
        started = time.monotonic()
        threads = in_background(5, lambda _: ask(running, "/v1/completions", body))
        time.sleep(0.3)
        seen = metrics(running)
        assert seen[series("num_requests_running")] == 2
        assert seen[series("num_requests_waiting")] == 3
        assert 0 < seen[series("kv_cache_usage_perc")] < 0.1
        for thread in threads:
            thread.join()
        # Three rounds of twenty steps of 30 ms.
        assert 1.8 < time.monotonic() - started < 6


def test_full_cache_preempts(tmp_path: Path) -> None:
    # Two sequences start in a block each and grow to two; there are three.
    curve = {**FAST, "kv_cache_blocks": 3}
    body = {"model": "m", "prompt": "a b c", "max_tokens": 28, "ignore_eos": True}
    answers: list[Answer] = []
    with simulator(tmp_path / "m", simulation={"service_curve": curve}) as running:
        ask_once = lambda _: answers.append(ask(running, "/v1/completions", body))  # noqa: E731
        for thread in in_background(2, ask_once):
            thread.join()
        assert metrics(running)[series("num_preemptions_total")] >= 1
    assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [28, 28]


def test_queue_limit_answers_503(tmp_path: Path) -> None:
    curve = {**FAST, "decode_ms_per_step": 100}
    flags = ("--max-num-queued-reqs", "1")
    body = {"model": "m", "prompt": "a", "max_tokens": 10, "ignore_eos": True}
    with simulator(tmp_path / "m", *flags, simulation={"service_curve": curve}) as running:
        threads = in_background(1, lambda _: ask(running, "/v1/completions", body))
        time.sleep(0.3)
        assert ask(running, "/v1/completions", body).status == 503
        threads[0].join()
        assert ask(running, "/v1/completions", body).status == 200


def test_client_that_goes_away_frees_its_place(tmp_path: Path) -> None:
    curve = {**FAST, "decode_ms_per_step": 20}
    body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 1000, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with simulator(tmp_path / "m", simulation={"service_curve": curve}) as running:
        with socket.create_connection(("127.0.0.1", running.port), 5) as connection:
            connection.sendall(request)
            connection.recv(100)
            assert metrics(running)[series("num_requests_running")] == 1
        deadline = time.monotonic() + 5
        while metrics(running)[series("num_requests_running")]:
            assert time.monotonic() < deadline
        assert metrics(running)[series("request_success_total", finished_reason="abort")] == 1


# End


@pytest.mark.parametrize(("timeout", "whole"), [("10", True), ("0", False)])
def test_sigterm_drains_as_long_as_allowed(tmp_path: Path, timeout: str, whole: bool) -> None:
    curve = {**FAST, "decode_ms_per_step": 50}
    body = {"model": "m", "prompt": "a", "max_tokens": 20, "ignore_eos": True, "stream": True}
    outcome: list[bool] = []

    def stream(_: int) -> None:
        try:
            outcome.append(ask(running, "/v1/completions", body).events[-1] == "[DONE]")
        except (http.client.HTTPException, OSError):
            outcome.append(False)

    flags = ("--shutdown-timeout", timeout)
    with simulator(tmp_path / "m", *flags, simulation={"service_curve": curve}) as running:
        thread = in_background(1, stream)[0]
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        if whole:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", running.port), 2)
        assert running.process.wait(10) == 0
        thread.join()
    assert outcome == [whole]


# Faults


def test_nonsense_is_not_the_known_answer(tmp_path: Path) -> None:
    with simulator(tmp_path / "m", simulation={"answers": "nonsense"}) as running:
        body = {"model": "m", "messages": QUESTION, "max_tokens": 32}
        content = ask(running, "/v1/chat/completions", body).json["choices"][0]["message"]
        assert "Paris" not in content["content"]
        assert "[simulated]" in content["content"]
        assert metrics(running)[series("generation_tokens_total")] > 0


@pytest.mark.parametrize("style", ["null", "reasoning"])
def test_answers_without_content(tmp_path: Path, style: str) -> None:
    with simulator(tmp_path / "m", simulation={"answers": style}) as running:
        body = {"model": "m", "messages": QUESTION, "max_tokens": 4}
        message = ask(running, "/v1/chat/completions", body).json["choices"][0]["message"]
        assert message["content"] is None
        assert ("reasoning" in message) == (style == "reasoning")
        streamed = ask(running, "/v1/chat/completions", {**body, "stream": True})
        assert streamed.text == ""
        assert any("reasoning" in json.dumps(e) for e in streamed.events) == (style == "reasoning")


def test_sampling_matters_if_asked_to(tmp_path: Path) -> None:
    simulation = {"answers": "random_unless_temperature_0", "service_curve": FAST}
    with simulator(tmp_path / "m", simulation=simulation) as running:
        body: dict[str, Any] = {"model": "m", "messages": QUESTION}
        path = "/v1/chat/completions"
        greedy = {ask(running, path, {**body, "temperature": 0}).body[-300:] for _ in range(3)}
        assert all(b"Paris" in answer for answer in greedy)
        assert not any(b"Paris" in ask(running, path, body).body for _ in range(5))


@pytest.mark.parametrize(
    ("kind", "last", "cut"),
    [
        ("error_event", "[DONE]", False),
        ("only_done", "[DONE]", False),
        ("no_usage", "[DONE]", False),
        ("no_done", None, False),
        ("close_early", None, True),
    ],
)
def test_faults_in_the_stream(tmp_path: Path, kind: str, last: str | None, cut: bool) -> None:
    requests = [{"kind": kind, "share": 1}]
    body: dict[str, Any] = {"model": "m", "prompt": "a", "max_tokens": 6, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    with simulator(tmp_path / "m", simulation={"requests": requests}) as running:
        if cut:
            with pytest.raises(http.client.IncompleteRead):
                ask(running, "/v1/completions", body)
            return
        events = ask(running, "/v1/completions", body).events
    assert (events[-1] == "[DONE]") == (last == "[DONE]")
    assert any("error" in event for event in events) == (kind == "error_event")
    assert (len(events) == 1) == (kind == "only_done")
    assert any("usage" in event for event in events) == (kind in ("error_event", "no_done"))


def test_planned_exit_before_it_listens(tmp_path: Path) -> None:
    fail = {"kind": "exit", "after_s": 0.2, "log": "ValueError: KV cache is 0.75 GiB short"}
    ran = run(str(make_model(tmp_path, {"fail": fail})))
    assert ran.returncode == 1
    assert "ValueError: KV cache is 0.75 GiB short" in ran.stdout
    assert "startup complete" not in ran.stdout


def test_planned_hang_never_listens_and_never_ends(tmp_path: Path) -> None:
    fail = {"kind": "hang", "after_s": 0.1, "log": "RuntimeError: Worker failed with error 'x'"}
    folder = make_model(tmp_path, {"fail": fail})
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.engine", str(folder), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("(EngineCore")
    assert "ERROR" in lines[1]
    assert "Worker failed with error 'x'" in lines[1]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    process.stdout.close()


def test_hang_while_serving_is_healthy_but_silent(tmp_path: Path) -> None:
    fail = {"kind": "hang", "when": "serving", "after_s": 0.0, "log": "stuck"}
    with simulator(tmp_path / "m", simulation={"fail": fail}) as running:
        time.sleep(0.2)
        assert ask(running, "/health").status == 200
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=1)
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "a"}))
        with pytest.raises(TimeoutError):
            connection.getresponse()
        connection.close()


def test_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATOR", '{"answers": "nonsense"}')
    with simulator(tmp_path / "m", simulation={"answers": "known"}) as running:
        body = {"model": "m", "messages": QUESTION}
        assert b"Paris" not in ask(running, "/v1/chat/completions", body).body


def test_api_key_guards_v1_only(tmp_path: Path) -> None:
    with simulator(tmp_path / "m", "--api-key", "k", simulation={}) as running:
        assert ask(running, "/v1/models").status == 401
        assert ask(running, "/v1/models", Authorization="Bearer k").status == 200
        assert ask(running, "/metrics").status == 200
