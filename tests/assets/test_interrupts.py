"""Steps that a signal must not cut in half."""

import os
import signal
from typing import Any

import pytest

from assets.interrupts import undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_and_the_block_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    said: list[str] = []
    with undisturbed(said.append, "clearing up"):
        os.kill(os.getpid(), number)
        said.append("the end")
    assert said == [f"{number.name}: clearing up ends first", "the end"]
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_too_early_leaves_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the block before it has begun, between the two handlers."""
    before = signal.getsignal(signal.SIGINT)
    install, installed = signal.signal, []

    def interrupted(number: int, handler: Any) -> Any:
        installed.append(number)
        if len(installed) == 2:
            raise KeyboardInterrupt
        return install(number, handler)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), undisturbed(print, "clearing up"):
        pytest.fail("the block has begun")
    assert signal.getsignal(signal.SIGINT) is before
