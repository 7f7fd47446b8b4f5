"""Xet, where most of the Hub's files are stored: its client's progress and its failures.

huggingface_hub leaves such a file to hf_xet. That writes it from the front in parts of up to
64 MiB, each when it is whole, so that the file's size says little about what has arrived. It tries
each request again by itself; what it can't mend is a RuntimeError with a text.
"""

import errno
import re
from collections.abc import Callable
from typing import Any

from weights import errors
from weights.errors import Place, WeightsError

# hf_xet's categories of failure; a text of huggingface_hub itself begins otherwise.
FAILURE = re.compile(
    r"(?:Task|Previous task|Authentication|Network|Server|Data integrity|I/O|Internal) error: "
    r"|Rate limited: |Timeout: |Not found: |Operation cancelled: "
)
STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
REFRESH = "Token refresh failed"  # asked of the Hub, with the Hub's token
OS_ERROR = re.compile(r"\(os error (\d+)\)")
URL_HOST = re.compile(r"https?://(?:[^/@\s]*@)?([^/:\s)]+)")
VOLUME_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DAMAGE = ("size mismatch", "malformed", "corrupt", "chunk header")
NO_XET = "HF_HUB_DISABLE_XET=1 downloads the same files without Xet"


def counter(arrived: Callable[[int], None]) -> type[Any]:
    """A "progress bar" for huggingface_hub that calls `arrived` with the bytes of one file so far.

    Bytes from the network count, or bytes in the file where they are more (compressed parts).
    """

    class Counter:
        def __init__(self, *, initial: int = 0, **_: Any) -> None:
            self.written = self.received = initial

        def update(self, count: int) -> None:
            self.written += count
            arrived(max(self.written, self.received))

        def update_transfer(self, count: int) -> None:
            self.received += count
            arrived(max(self.written, self.received))

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            """Nothing is drawn."""

        set_transfer_postfix_str = set_postfix_str

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is drawn."""

    return Counter


def understand(error: BaseException, place: Place) -> WeightsError | None:
    """Which of our errors a failure of hf_xet is; None if it is none of its failures.

    URLs are not repeated: those of parts are signed.
    """
    text = str(error)
    if not isinstance(error, RuntimeError | OSError) or not FAILURE.match(text):
        return None
    found = URL_HOST.search(text)
    storage = f"Xet storage ({found[1]})" if found else "Xet storage"
    again = "start again later: finished files are kept"
    if match := STATUS.search(text):
        if REFRESH in text and match[1] in ("401", "403"):
            return errors.Unauthorized(
                f"{found[1] if found else 'the Hub'} gives no more tokens for Xet storage "
                f"({match[1]}, {place})",
                "check whether HF_TOKEN was revoked or its access taken back, then start again",
                place=place,
            )
        return _refusal(int(match[1]), storage, place, again)
    if text.startswith("I/O error: "):  # before the download: not the volume
        return errors.UsageError(
            f"Xet's client can't use its folder for logs and caches: {text}",
            f"set HF_HOME (or HF_XET_CACHE) to a folder that can be written; or {NO_XET}",
        )
    if (number := OS_ERROR.search(text)) and int(number[1]) in VOLUME_ERRORS:
        return errors.volume_error(OSError(int(number[1]), text), place.file, place)
    if any(word in text.lower() for word in DAMAGE):
        return errors.HubFailed(
            f"{storage} sends {place} damaged", f"{again}; {NO_XET}", place=place
        )
    return errors.HubUnreachable(
        f"no connection to {storage} for {place}, or it was cut or went silent",
        "let the Job's proxy and egress policy pass cas-server.xethub.hf.co and "
        f"transfer.xethub.hf.co (or what HF_ENDPOINT names), or {NO_XET}",
        place=place,
    )


def _refusal(status: int, storage: str, place: Place, again: str) -> WeightsError:
    said = f"{storage} answers {status} for {place}"
    if status == 429:
        return errors.RateLimited(said, again, place=place)
    if status == 408 or status >= 500:
        return errors.HubFailed(said, f"{again}; {NO_XET}", place=place)
    if status in (401, 403):
        return errors.Forbidden(
            said,
            "check the Job's clock (Xet's tokens are short-lived) and what lies between it and "
            f"Xet storage (a proxy, a mirror), then start again; {NO_XET}",
            place=place,
        )
    return errors.HubRefused(said, f"{again}; {NO_XET}", place=place)
