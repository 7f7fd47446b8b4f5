"""What an engine's log says about its end: the line that tells a person what is wrong."""

import re

# Each process of vLLM puts its name, the level, the time and the place before the message.
_PREFIX = re.compile(
    r"^(?:\(\w+[^)]*\)\s*)*(?:(?:ERROR|CRITICAL|WARNING)\s+[\d-]+\s[\d:.,]+\s+\[[^\]]*\]\s*)?"
)
_ERROR = re.compile(
    r"(?:\b\w*(?:Error|Exception)|\berror|\bCUDA failure)\b[^:]{0,40}:\s*\S|\berror:"
)
# What is said about an error that another line names.
_ECHO = re.compile(
    r"See root cause above|See stack trace for root cause|Exception ignored in|"
    r"Engine core initialization failed|EngineDeadError|"
    r"^\s*File \"|^\s*raise |^Traceback|SystemExit|get_mempolicy"
)
# An engine core that is dead while the API server neither listens nor exits.
_DEAD = re.compile(
    r"EngineCore.*(?:failed to start|RuntimeError|Worker failed|died|fatal error)", re.IGNORECASE
)


def error_line(lines: list[str]) -> str:
    """The line that names the engine's error, without the logger's prefix; "" if there is none.

    The last one that names an error itself: above it stand warnings, after it echoes of it.
    """
    found = [message for message in map(_message, lines) if _names_error(message)]
    return found[-1].strip() if found else ""


def _message(line: str) -> str:
    return _PREFIX.sub("", line)


def _names_error(message: str) -> bool:
    return bool(_ERROR.search(message)) and not _ECHO.search(message)


def is_dead(lines: list[str]) -> bool:
    """The engine core said that it failed."""
    return any(_DEAD.search(line) for line in lines)


def last_words(lines: list[str], count: int = 3) -> str:
    """The error line, or else the last lines that say anything."""
    said = [line.strip() for line in lines if line.strip()]
    return error_line(lines) or " / ".join(said[-count:]) or "(nothing in its log)"
