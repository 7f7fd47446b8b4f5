"""A wrong profile is refused, by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from catalog.spec import STORED
from loadtests.plan import Planner
from loadtests.profile import Profile, ProfileError, load_profile, parse_profile

GOOD: dict[str, Any] = {
    "base_url": "http://10.0.0.1:8000",
    "model": "m",
    "rates": [1, 2.5, 4],
    "prompt_tokens": 64,
    "output_tokens": 16,
    "slo": {"ttft_p95_ms": 500, "itl_p95_ms": 200, "required_rate": 2},
}


TALK = {"turns": 3, "think_s": 5}
SEARCH = {"mode": "search", "rates": [], "rate_range": [1, 64]}


def profile(**changes: Any) -> Profile:
    return parse_profile(json.dumps({**GOOD, **changes}))


def test_required_rate_is_always_a_step() -> None:
    assert profile().ladder == (1, 2, 2.5, 4)
    assert profile(slo={**GOOD["slo"], "required_rate": 4}).ladder == (1, 2.5, 4)
    assert profile(slo={**GOOD["slo"], "required_rate": 9}).ladder == (1, 2.5, 4, 9)


def test_a_search_s_range_is_passed_over_where_one_rate_is_asked_for() -> None:
    made = profile(mode="rate", rate_range=[4, 64])
    assert made.ladder == (2,)


def test_simulated_parts_come_from_the_metadata() -> None:
    assert profile().simulated == ()
    assert profile(metadata={"simulated": ["gpu", "engine"]}).simulated == ("gpu", "engine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            (
                {"base_url": url},
                f"base_url: {url!r} is no address of an engine; write http://HOST:P",
            )
            for url in (
                "https://x",
                "http://user:pass@x",
                "http://127.0.0.1:99999",
                "http://127.0.0.1:0",
                "http://127.0.0.1:http",
                "http://:8000",
                "http://a b",
                "http://a..b",
                "http://[::1",
                f"http://{'x' * 64}",
                "http://x/v1",
                "http://x?v=1",
                "127.0.0.1:8000",
                "",
            )
        ),
        ({"rates": [4, 2]}, "rates: the ladder must ascend"),
        ({"rates": []}, "rates: "),
        ({"rates": [0]}, "rates.0: must be greater than 0, got 0"),
        (
            {"arrival": "bursty"},
            "arrival: must be 'poisson', 'constant', 'gamma' or 'trace'",
        ),
        ({"prompt_tokens": "many"}, "prompt_tokens: "),
        ({"timeout_s": 0.2}, "profile: timeout_s (0.2 s) must be above slo.ttft_p95_ms"),
        ({"arrival": "gamma"}, "gamma_shape: is missing"),
        ({"gamma_shape": 0.5}, "gamma_shape: 0.5 does nothing with arrival: poisson"),
        ({"rate_range": [1, 64]}, "rate_range: does nothing with mode: ladder"),
        ({"mode": "search"}, "rate_range: is missing: where to search"),
        ({"mode": "search", "rate_range": [64, 1]}, "rate_range: 64 is above 1"),
        (
            {"mode": "search", "rate_range": [4, 64]},
            "slo.required_rate: 2 is not within rate_range (4 to 64), where the search starts",
        ),
        ({"rate": 3}, "rate: is no field here; allowed: base_url, model, "),
        ({"slo": {**GOOD["slo"], "p95": 1}}, "slo.p95: is no field here; allowed: ttft_p95_ms"),
        ({"slo": {"ttft_p95_ms": 500, "itl_p95_ms": 9}}, "slo.required_rate: is missing"),
        ({"slo": {**GOOD["slo"], "attainment": 1}}, "slo.attainment: "),
        ({"step_seconds": float("inf")}, "step_seconds: "),
        ({"prompt_tokens": 3}, "prompt_tokens: 3 tokens can't be unique"),
        ({"output_tokens": {"uniform": {"min": 1}}}, "output_tokens.uniform.max: is missing"),
        (
            {"output_tokens": {"uniform": {"min": 1, "max": 2, "mean": 1}}},
            "output_tokens.uniform.mean: is no field here; allowed: min, max",
        ),
        ({"arrival": "trace"}, "arrival: is to come from a trace, so `trace` must name its"),
        ({"trace": {"path": "x"}}, "trace: nothing comes from it: say trace for arrival or"),
        (
            {"arrival": "trace", "trace": {"path": "x", "prefixes": True}},
            "trace.prefixes: need prompt_tokens: trace",
        ),
        ({"trace": {"file": "x"}}, "trace.file: is no field here; allowed: path, sha256, prefi"),
        ({"shared_prefix": {"tokens": 2}}, "shared_prefix.tokens: must be greater than or equal"),
        ({"models": {}}, "models: "),
        ({"models": {"a": 0}}, "models.a: must be greater than 0"),
        ({"workers": 0}, "workers: must be greater than or equal to 1"),
        ({"workers": 1000}, "workers: must be less than or equal to 64, got 1000"),
        ({"rates": [1e7]}, "rates.0: 1e+07 req/s can't be sent; 64 workers send 128000 at most"),
        ({"timeout_s": 1e9}, "timeout_s: 1e+09 s is more than a day; give 86400 or less"),
        (
            {"rates": [5000]},
            "rates: at 5000 req/s a window has 350000 requests, 50000 of them in warmup_seconds",
        ),
        (
            {"slo": {**GOOD["slo"], "attainment": 0.9999999999}},
            "slo.attainment: 0.9999999999 takes 27060247759 requests to show",
        ),
        (
            {"mode": "rate", "budget_seconds": 69},
            "budget_seconds: 69 s has no room for one window: at slo.required_rate (2) it takes "
            "60.0 s, and 10.0 s of warm-up; give 70 or more",
        ),
        (
            {**SEARCH, "budget_seconds": 35},
            "budget_seconds: 35 s has no room for one window: at slo.required_rate (2) it takes "
            "26.0 s, and 10.0 s of warm-up; give 36 or more",
        ),
        (
            # Whose first turns have a history that was sent: the warm-up isn't cut.
            {**SEARCH, "budget_seconds": 45, "warmup_seconds": 20, "endpoint": "chat"}
            | {"conversations": TALK},
            "budget_seconds: 45 s has no room for one window: at slo.required_rate (2) it takes "
            "26.0 s, and 20.0 s of warm-up; give 46 or more",
        ),
        ({"conversations": {"turns": 10**9, "think_s": 5}}, "conversations.turns: must be less th"),
        ({"shared_prefix": {"tokens": 9, "count": 10**12}}, "shared_prefix.count: must be less th"),
        ({"models": {"a": 1e308, "b": 1e308}}, "models.a: must be less than or equal to 200000"),
        ({"conversations": TALK}, "profile: conversations need endpoint: chat"),
        (
            {"conversations": TALK, "endpoint": "chat", "warmup_seconds": 1},
            "profile: warmup_seconds (1 s) must be at least conversations.think_s (5 s)",
        ),
    ],
)
def test_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as refused:
        profile(**changes)
    assert f"profile: {message}" in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:65535", "http://[fd00::7]:80", "http://a.b/"])
def test_addresses_of_engines(url: str) -> None:
    assert profile(base_url=url).base_url == url


def test_a_budget_that_is_just_enough() -> None:
    for fields in ({"mode": "rate", "budget_seconds": 70}, {**SEARCH, "budget_seconds": 36}):
        assert profile(**fields).budget_seconds == fields["budget_seconds"]


def test_what_was_measured_once_stays_readable() -> None:
    stored = {**GOOD, **SEARCH, "budget_seconds": 1, "rates": [1e7]}
    assert Profile.model_validate_json(json.dumps(stored), context=STORED).budget_seconds == 1


def test_every_mistake_is_listed() -> None:
    with pytest.raises(ProfileError) as refused:
        profile(seed="x", model="")
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_no_object_is_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.json: can't be read"):
        load_profile(tmp_path / "nowhere.json")


def write_trace(folder: Path, *lines: str) -> Path:
    (folder / "trace.jsonl").write_text("".join(line + "\n" for line in lines))
    path = folder / "profile.json"
    path.write_text(json.dumps({**GOOD, "arrival": "trace", "trace": {"path": "trace.jsonl"}}))
    return path


MOONCAKE = '{"timestamp": %d, "input_length": 6, "output_length": 2, "hash_ids": [1]}'


def test_a_trace_lies_beside_the_profile(tmp_path: Path) -> None:
    trace = load_profile(write_trace(tmp_path, MOONCAKE % 0, MOONCAKE % 9)).trace
    assert trace is not None
    assert trace.path == str(tmp_path / "trace.jsonl")
    assert trace.sha256 is not None


def test_a_trace_without_gaps_has_lengths_only(tmp_path: Path) -> None:
    path = write_trace(tmp_path, MOONCAKE % 5, MOONCAKE % 5)
    with pytest.raises(ProfileError, match=r"trace\.path: .*trace\.jsonl: all requests have one t"):
        load_profile(path)
    fields = {**json.loads(path.read_text()), "arrival": "poisson", "prompt_tokens": "trace"}
    path.write_text(json.dumps(fields))
    plan = Planner(load_profile(path)).window(2.0, 0)
    assert {one.prompt_tokens for one in plan} == {6}
    assert len({one.at_ns for one in plan}) == len(plan)


def test_a_wrong_line_of_the_trace_is_named(tmp_path: Path) -> None:
    path = write_trace(tmp_path, MOONCAKE % 0, '{"timestamp": "soon"}')
    with pytest.raises(
        ProfileError, match=r"trace\.path: .*trace\.jsonl:2: timestamp: must be a nu"
    ):
        load_profile(path)


def test_another_trace_than_the_one_that_was_meant(tmp_path: Path) -> None:
    path = write_trace(tmp_path, MOONCAKE % 0, MOONCAKE % 9)
    fields = json.loads(path.read_text())
    fields["trace"]["sha256"] = "0" * 64
    path.write_text(json.dumps(fields))
    with pytest.raises(ProfileError, match=r"trace\.path: .* has [0-9a-f]+, and not trace\.sha256"):
        load_profile(path)
