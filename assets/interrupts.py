"""Steps that a second Ctrl-C must not cut in half."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def undisturbed(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Answer SIGINT and SIGTERM with a line instead of stopping, until the block has ended.

    For blocks that have deadlines of their own. Only the main thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, _frame: FrameType | None) -> None:
        say(f"{signal.Signals(number).name}: {what} ends first")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, answer)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
