"""What the program says: JSON events, one a line, or lines for a person on a terminal.

Nothing leaves here with the token or with a URL's user and password in it.
"""

import json
import re
import sys
import threading
from collections.abc import Iterable
from typing import Any, TextIO
from urllib.parse import urlsplit

from weights.errors import ReaderGone, Unsaid, WeightsError

URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
HIDDEN = "***"


def secrets_of(token: str | None, endpoint: str) -> tuple[str, ...]:
    """The strings that must never be printed: the token and the endpoint's password."""
    parts = urlsplit(endpoint)
    return tuple(secret for secret in (token, parts.password) if secret)


class Reporter:
    """Writes events to `out`: JSON, or for a person if `human`. Safe in threads.

    All that writes raises ReaderGone when there is nobody to read it, and Unsaid when it can't be
    written.
    """

    def __init__(
        self, out: TextIO | None = None, *, human: bool = False, secrets: Iterable[str] = ()
    ) -> None:
        self._out = out or sys.stdout
        self._human = human
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._lock = threading.Lock()
        self._on_line = False  # a progress line that the next one overwrites

    def hide(self, secret: str | None) -> None:
        """Never print this string."""
        if secret:
            self._secrets = sorted({*self._secrets, secret}, key=len, reverse=True)

    def progress(self, message: str, **numbers: Any) -> None:
        """How far it is. `numbers` go into the event as they are."""
        if self._human:
            moving = "percent" in numbers
            self._line(f"\r\x1b[K{self.redact(message)}", end="" if moving else "\n")
            self._on_line = moving
        else:
            self._event({"event": "progress", "message": message, **numbers})

    def result(self, **fields: Any) -> None:
        """What came out."""
        if self._human:
            for name, value in fields.items():
                shown = value if isinstance(value, str | int | float) else json.dumps(value)
                self._line(f"{name}: {self.redact(str(shown))}")
        else:
            self._event({"event": "result", **fields})

    def error(self, error: WeightsError) -> None:
        """Why it ends."""
        name = type(error).__name__
        if self._human:
            self._line(self.redact(f"{name}: {error}\nNext: {error.next_step}"))
            return
        event = {"event": "error", "error": name, "message": str(error), "next": error.next_step}
        if error.place:
            event |= {"repo": error.place.repo, "revision": error.place.revision}
            event |= {"file": error.place.file} if error.place.file else {}
        self._event(event)

    def redact(self, text: str) -> str:
        """The text without the token and without credentials in URLs."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return HUB_TOKEN.sub(HIDDEN, URL_CREDENTIALS.sub(f"{HIDDEN}@", text))

    def _event(self, event: dict[str, Any]) -> None:
        self._line(json.dumps(self._clean(event), ensure_ascii=False))

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, dict):
            return {name: self._clean(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(inner) for inner in value]
        return value

    def _line(self, text: str, end: str = "\n") -> None:
        with self._lock:
            if self._on_line and not text.startswith("\r"):
                text = f"\n{text}"
            self._on_line = False
            try:
                self._out.write(text + end)
                self._out.flush()
            except BrokenPipeError as error:
                raise ReaderGone(
                    "nobody reads what this program says any more",
                    "start again: finished files are kept",
                ) from error
            except OSError as error:
                raise Unsaid(
                    f"can't write what this program says: {error.strerror}",
                    "look at where its output goes, then start again: finished files are kept",
                ) from error


def amount(size: float) -> str:
    """Bytes for a person: 269.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
