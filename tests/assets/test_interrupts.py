"""Steps that a signal must not cut in half."""

import os
import signal

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
