"""`python -m tests.accuracy` with wrong flags."""

import pytest

from tests.accuracy import __main__ as program
from tests.accuracy.scenarios import SCENARIOS
from tests.accuracy.tools import OURS, TOOLS


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tools", "foo"], f"--tools: no 'foo'; there are: {', '.join(TOOLS)}"),
        (["--tools", "ours,foo,"], f"--tools: no 'foo', ''; there are: {', '.join(TOOLS)}"),
        (
            ["--scenarios", "foo"],
            f"--scenarios: no 'foo'; there are: {', '.join(SCENARIOS)}, planted",
        ),
        (["--tools", "aiperf"], "--tools: aiperf isn't installed (make accuracy-peers); there are"),
        (["--rates", "x"], "--rates: must be numbers above 0, at most 128000; got 'x'"),
        (["--rates", "0"], "--rates: must be numbers above 0, at most 128000; got '0'"),
        (["--repeats", "0"], "--repeats: must be 1 or more, got 0"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["accuracy", *flags])
    monkeypatch.setattr(program, "available", lambda: {OURS: "this checkout"})
    assert program.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(says)
