"""A wrong profile is refused, by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.profile import Profile, ProfileError, load_profile, parse_profile

GOOD: dict[str, Any] = {
    "base_url": "http://10.0.0.1:8000",
    "model": "m",
    "rates": [1, 2.5, 4],
    "prompt_tokens": 64,
    "output_tokens": 16,
    "slo": {"ttft_p95_ms": 500, "itl_p95_ms": 200, "required_rate": 2},
}


def profile(**changes: Any) -> Profile:
    return parse_profile(json.dumps({**GOOD, **changes}))


def test_required_rate_is_always_a_step() -> None:
    assert profile().ladder == (1, 2, 2.5, 4)
    assert profile(slo={**GOOD["slo"], "required_rate": 4}).ladder == (1, 2.5, 4)
    assert profile(slo={**GOOD["slo"], "required_rate": 9}).ladder == (1, 2.5, 4, 9)


def test_simulated_parts_come_from_the_metadata() -> None:
    assert profile().simulated == ()
    assert profile(metadata={"simulated": ["gpu", "engine"]}).simulated == ("gpu", "engine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "https://x"}, "base_url: "),
        ({"base_url": "http://user:pass@x"}, "base_url: "),
        ({"rates": [4, 2]}, "rates: the ladder must ascend"),
        ({"rates": []}, "rates: "),
        ({"rates": [0]}, "rates.0: Input should be greater than 0, got 0"),
        ({"arrival": "bursty"}, "arrival: Input should be 'poisson', 'constant' or 'gamma'"),
        ({"prompt_tokens": "many"}, "prompt_tokens: "),
        ({"timeout_s": 0.2}, "profile: timeout_s (0.2 s) must be above slo.ttft_p95_ms"),
        ({"rate": 3}, "rate: is no field here; allowed: base_url, model, "),
        ({"slo": {**GOOD["slo"], "p95": 1}}, "slo.p95: is no field here; allowed: ttft_p95_ms"),
        ({"slo": {"ttft_p95_ms": 500, "itl_p95_ms": 9}}, "slo.required_rate: is missing"),
        ({"slo": {**GOOD["slo"], "attainment": 1}}, "slo.attainment: "),
        ({"step_seconds": float("inf")}, "step_seconds: "),
    ],
)
def test_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as refused:
        profile(**changes)
    assert f"profile: {message}" in str(refused.value)


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
