"""Only like is compared with like, and only beyond both intervals."""

import json
from pathlib import Path

import pytest

from loadtests.__main__ import main
from loadtests.compare import compare, kept
from loadtests.result import Result
from tests.loadtests.samples import make_result, steady


def result(knee: float = 16, ttft_ms: float = 100, **profile: object) -> Result:
    windows = [steady(rate, 60, ttft_ms if rate < knee else 900) for rate in (4, 8, 16)]
    return make_result(windows, **profile)


def test_the_same_is_no_regression() -> None:
    found = compare(kept(result()), kept(result()))
    assert (found.differs, found.regressions, found.changed) == ((), (), ())


def test_less_capacity_beyond_both_intervals() -> None:
    found = compare(kept(result(16)), kept(result(8)))  # 8 to 16 before, 4 to 8 now
    assert found.regressions == ("carries less: λ* is at most 8 req/s, and was at least 8",)
    assert compare(kept(result(8)), kept(result(16))).regressions == ()


def test_slower_first_tokens_beyond_both_intervals() -> None:
    [worse] = compare(kept(result()), kept(result(ttft_ms=200))).regressions
    assert worse == "slower: TTFT p95 is at least 200 ms, was at most 100"


def test_another_profile_is_named_and_nothing_compared() -> None:
    found = compare(kept(result()), kept(result(8, seed=9, slo={"itl_p95_ms": 90})))
    assert found.differs == ("seed 1 → 9", "slo.itl_p95_ms 100.0 → 90.0")
    assert found.regressions == ()


def test_what_else_changed_is_said() -> None:
    before = result(metadata={"driver": "550.1", "args": ["--dtype=half"]})
    after = result(metadata={"driver": "560.2", "args": ["--dtype=half"]})
    assert compare(kept(before), kept(after)).changed == ("driver '550.1' → '560.2'",)


@pytest.mark.parametrize(("knee", "status"), [(16, 0), (8, 1)])
def test_on_the_command_line(
    knee: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in (("a", result()), ("b", result(knee))):
        (tmp_path / f"{name}.json").write_text(made.model_dump_json())
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == status
    assert ("carries less" in capsys.readouterr().out) == (status == 1)


def test_a_file_of_another_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**json.loads(result().model_dump_json()), "format": 1}))
    assert main(["compare", str(path), str(path)]) == 2
    assert "has format 1, this program reads format 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"verdict": "invalid"}, {"verdict": "inconclusive"}, {"steps": ()}]
)
@pytest.mark.parametrize("which", ["a", "b"])
def test_what_measured_nothing_is_not_compared(
    change: dict[str, object], which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        made = result().model_copy(update=change if name == which else {})
        (tmp_path / f"{name}.json").write_text(made.model_dump_json())
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 3
    assert f"not compared: {tmp_path / which}.json is " in capsys.readouterr().out
