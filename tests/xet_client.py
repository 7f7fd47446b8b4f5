"""What a process of its own would begin with: no session and no token of hf_xet."""

from huggingface_hub.utils._xet import XET_CONNECTION_INFO_CACHE, abort_xet_session


def begin_anew() -> None:
    """End hf_xet's session in this process, with its connections, and forget its tokens."""
    abort_xet_session()  # type: ignore[no-untyped-call]
    XET_CONNECTION_INFO_CACHE.clear()
