"""The load by flags: the profile that they make, and what is said of wrong ones."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from catalog.model import Slo
from loadtests.flags import FLAGS, add_options, profile_of
from loadtests.profile import Conversations, Profile, ProfileError, SharedPrefix, Trace
from tests.loadtests.servers import ROOT
from tests.loadtests.test_profile import GOOD, MOONCAKE

HOST = "http://10.0.0.1:8000"


class Parser(argparse.ArgumentParser):
    """Locust's, as far as add_options needs it."""

    def add_argument(self, *names: Any, include_in_web_ui: bool = True, **fields: Any) -> Any:
        return super().add_argument(*names, **fields)


def read(*words: str, host: str | None = HOST) -> Profile:
    parser = Parser()
    parser.add_argument("--processes", type=int)
    parser.add_argument("--master", action="store_true")
    parser.add_argument("--expect-workers", type=int, default=1)
    add_options(parser)
    return profile_of(parser.parse_args(words), host, words)


def refusal(*words: str, host: str | None = HOST) -> str:
    with pytest.raises(ProfileError) as refused:
        read(*words, host=host)
    return str(refused.value)


def test_without_any_flag() -> None:
    profile = read()
    assert (profile.base_url, profile.model, profile.ladder) == (HOST, "", (1, 2, 4, 8, 16))
    assert profile.prompt_tokens.fixed == 64
    unused = (profile.trace, profile.shared_prefix, profile.conversations, profile.models)
    assert unused == (None, None, None, None)


def test_each_flag_reaches_its_field(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(MOONCAKE % 0 + "\n" + MOONCAKE % 9)
    for words, name, value in [
        ("--model m", "model", "m"),
        ("--endpoint chat", "endpoint", "chat"),
        ("--mode search --rates= --rate-range 1,64", "rate_range", (1, 64)),
        ("--mode rate --budget-seconds 99", "budget_seconds", 99),
        ("--arrival gamma --gamma-shape 0.5", "gamma_shape", 0.5),
        ("--arrival gamma --gamma-shape=1", "gamma_shape", 1),
        ("--seed 7", "seed", 7),
        ("--models a=3,b", "models", {"a": 3, "b": 1}),
        ("--step-seconds 3", "step_seconds", 3),
        ("--warmup-seconds 0", "warmup_seconds", 0),
        ("--timeout-s 9", "timeout_s", 9),
    ]:
        assert getattr(read(*words.split()), name) == value, words
    lengths = read("--prompt-tokens", "lognormal:50:120:200", "--output-tokens", "uniform:2:9")
    assert lengths.prompt_tokens.model_dump() == {
        "lognormal": {"median": 50, "p95": 120, "max": 200}
    }
    assert lengths.output_tokens.model_dump() == {"uniform": {"min": 2, "max": 9}}
    traced = read("--prompt-tokens", "trace", "--trace", str(trace), "--trace-prefixes").trace
    assert traced is not None
    assert (traced.path, traced.prefixes) == (str(trace), True)
    shared = read("--shared-prefix-tokens", "9", "--shared-prefixes", "2").shared_prefix
    assert shared is not None
    assert (shared.tokens, shared.count) == (9, 2)
    talk = read("--endpoint", "chat", "--turns", "3", "--think-s", "4").conversations
    assert talk is not None
    assert (talk.turns, talk.think_s) == (3, 4)
    limits = ["--ttft-p95-ms", "9", "--itl-p95-ms", "8", "--error-rate", "0.1"]
    slo = read(*limits, "--required-rate", "3").slo
    assert (slo.ttft_p95_ms, slo.itl_p95_ms, slo.error_rate, slo.required_rate) == (9, 8, 0.1, 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rates 1,x", "--rates: must be numbers, e.g. 1,2,4; got '1,x'"),
        ("--rates 4,2", "--rates: the ladder must ascend"),
        ("--rates 0,2", "--rates: must be greater than 0, got 0.0"),
        ("--rates=", "--rates: is missing: the ladder, or say --mode search with a --rate-range"),
        ("--rates 1e7", "--rates: 1e+07 req/s can't be sent; 64 workers send 128000 at most"),
        ("--mode search", "--rate-range: is missing: where to search"),
        ("--mode search --rate-range 3", "--rate-range: must be two numbers, lowest,highest, e.g."),
        (
            "--mode search --rate-range 2,9",
            "--required-rate: 1 is not within --rate-range (2 to 9)",
        ),
        (
            "--mode rate --budget-seconds 9",
            "--budget-seconds: 9 s has no room for one window: at --required-rate (1)",
        ),
        ("--mode rate --budget-seconds -5", "--budget-seconds: must be greater than 0, got -5"),
        (
            "--budget-seconds 9",
            "--budget-seconds: does nothing with --mode ladder, but with search or rate",
        ),
        (
            "--mode search --rate-range 1,9 --step-seconds 9",
            "--step-seconds: does nothing with --mode search, but with ladder or rate",
        ),
        ("--required-rate 0", "--required-rate: must be greater than 0, got 0.0"),
        ("--error-rate 2", "--error-rate: must be less than 1, got 2.0"),
        ("--ttft-p95-ms 70000", "flags: --timeout-s (60 s) must be above --ttft-p95-ms (70000 ms)"),
        ("--step-seconds 1e9", "--step-seconds: 1e+09 s is more than a day; give 86400 or less"),
        (
            "--rates 5000 --step-seconds 60",
            "--rates: at 5000 req/s a window has 325000 requests, 25000 of them in "
            "--warmup-seconds; 200000 fit",
        ),
        ("--arrival gamma", "--gamma-shape: is missing: below 1 is burstier"),
        (
            "--gamma-shape 2",
            "--gamma-shape: 2 does nothing with --arrival poisson; say --arrival",
        ),
        ("--arrival trace", "--arrival: is to come from a trace, so --trace must name its file"),
        ("--trace x", "--trace: nothing comes from it: say trace for arrival or for lengths"),
        ("--trace x --arrival trace", "x: can't be read: No such file"),
        (
            "--trace x --arrival trace --trace-prefixes",
            "--trace-prefixes: need --prompt-tokens trace",
        ),
        ("--trace-prefixes", "--trace-prefixes: does nothing without --trace; give that too, or"),
        ("--shared-prefixes 3", "--shared-prefixes: does nothing without --shared-prefix-tokens;"),
        ("--shared-prefixes 1", "--shared-prefixes: does nothing without --shared-prefix-tokens;"),
        ("--shared-prefix-tokens 3", "--shared-prefix-tokens: must be greater than or equal to 4"),
        (
            "--shared-prefix-tokens 9 --shared-prefixes 0",
            "--shared-prefixes: must be greater than or equal to 1, got 0",
        ),
        ("--think-s 5", "--think-s: does nothing without --turns; give that too, or take it out"),
        ("--think-s=5 --turns 1", "--think-s: does nothing without --turns"),
        ("--turns 0", "--turns: must be 1, for no conversations, or more, got 0"),
        ("--turns 3", "flags: conversations need --endpoint chat"),
        (
            "--turns 3 --endpoint chat --warmup-seconds 1",
            "flags: --warmup-seconds (1 s) must be at least --think-s (5 s)",
        ),
        ("--prompt-tokens many", "--prompt-tokens: must be a number, uniform:MIN:MAX, lognormal:M"),
        ("--output-tokens normal:3:4", "--output-tokens: must be a number, uniform:MIN:MAX, logn"),
        ("--output-tokens uniform:9", "--output-tokens: must be a number, uniform:MIN:MAX, logn"),
        ("--output-tokens uniform:9:8", "--output-tokens: uniform.min: 9 is above max (8)"),
        ("--prompt-tokens 3", "--prompt-tokens: 3 tokens can't be unique, ask for 4 or more"),
        ("--models a=b", "--models: a: must be a valid number"),
        ("--models a=0", "--models: a: must be greater than 0"),
    ],
)
def test_the_flag_is_named(words: str, says: str) -> None:
    said = refusal(*words.split())
    assert says in said
    assert "\n" not in said


def test_every_mistake_is_in_one_line() -> None:
    said = refusal("--seed", "1", "--required-rate", "0", "--timeout-s", "0")
    assert said.startswith("--required-rate: must be greater than 0, got 0.0; --timeout-s: must")


@pytest.mark.parametrize("host", ["http://x:99999", "x:8000", "http://a b", "https://x"])
def test_a_host_that_is_none(tmp_path: Path, host: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD))
    says = f"--host: {host!r} is no address of an engine; write http://HOST:PORT"
    assert says in refusal(host=host)
    assert says in refusal("--load-profile", str(path), host=host)


def test_without_a_host() -> None:
    assert refusal(host=None).startswith("--host: the engine's address is missing, e.g. http://")


def test_a_profile_has_the_whole_load(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD))
    assert read("--load-profile", str(path), host=None).base_url == GOOD["base_url"]
    assert read("--load-profile", str(path), host="http://x:1").base_url == "http://x:1"
    for flag in FLAGS:
        words = [flag.name] if flag.default is False else [flag.name, str(flag.default or "0")]
        if flag.choices:
            words = [flag.name, flag.choices[-1]]
        said = refusal("--load-profile", str(path), *words)
        assert said.startswith(f"{flag.name}: nothing comes of it beside --load-profile"), words
    said = refusal("--load-profile", str(path), "--turns", "2", "--rates", "3")
    assert said.startswith("--rates, --turns: nothing comes of it beside --load-profile")


def test_a_profile_that_is_not_there_is_said_before_its_flags(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    said = refusal("--load-profile", str(path), "--model", "m")
    assert said.startswith(f"{path}: can't be read: ")


def test_the_most_that_can_be_sent_is_that_of_all_workers() -> None:
    load = ["--rates", "5000", "--step-seconds", "60"]
    assert "200000 fit into memory" in refusal(*load)
    for workers in (["--processes", "2"], ["--master", "--expect-workers", "2"]):
        assert read(*load, *workers).workers is None
    assert "--processes: must be less than or equal to 64, got 99" in refusal("--processes", "99")


def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**GOOD, "rates": [4, 2]}))
    assert refusal("--load-profile", str(path)) == (
        f"{path}: rates: the ladder must ascend, each rate once"
    )


def test_the_docs_have_every_flag_with_its_default_and_every_field() -> None:
    docs = (ROOT / "docs" / "traffic.md").read_text("utf-8")
    rows = [line.split("|") for line in docs.splitlines() if line.startswith("| ")]
    fields, flags = ("\n".join(row[column] for row in rows) for column in (1, 2))
    off = ("--gamma-shape", "--turns")  # what their default is, is none
    for flag in FLAGS:
        number = isinstance(flag.default, float)
        shown = f" {flag.default:g}" if number else f" {flag.default}" if flag.default else ""
        found = f"`{flag.name}{shown if flag.name not in off else ''}"
        assert f"{found}`" in flags or (not shown and f"{found} " in flags), found
    for field in Profile.model_fields:
        assert f"`{field}`" in fields
    for part in (Trace, SharedPrefix, Conversations, Slo):
        for field in part.model_fields:
            assert f"`{field}`" in fields


@pytest.mark.parametrize("word", ["--see", "--gamma", "--load"])
def test_a_flag_is_not_abbreviated(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(word, "1")
    assert f"unrecognized arguments: {word} 1" in capsys.readouterr().err
