"""The hub's simulated Xet storage: how a file is put together, and the bytes of its parts.

What a CAS server does for Xet's client (huggingface.co/docs/xet), as far as a download asks for
it, made from the hub's blobs on the fly: a file is cut into chunks of one size, they lie
uncompressed in xorbs that only this file uses. The client takes hashes as names and checks none
of them, so a file's is its sha256, and a xorb's a sha256 over that and its number.
"""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

CHUNK_BYTES = 64 * 1024  # the client refuses more than 128 KiB
# 4 MiB; real ones have up to 64 MiB. A small file in a test has several then.
XORB_CHUNKS = 64
XORB_BYTES = CHUNK_BYTES * XORB_CHUNKS
HEADER_BYTES = 8  # before each chunk in a xorb
TOKEN_SECONDS = 3600
TOKEN_PREFIX = "lab-xet-"


def file_headers(hub_url: str, repo: str, commit: str, digest: str) -> dict[str, str]:
    """What the hub adds to its answers about a file that is in Xet storage."""
    refresh = f"{hub_url}/api/models/{repo}/xet-read-token/{commit}"
    info = f"{hub_url}/v1/reconstructions/{digest}"
    return {
        "X-Xet-Hash": digest,
        "Link": f'<{refresh}>; rel="xet-auth", <{info}>; rel="xet-reconstruction-info"',
    }


def connection(cas_url: str, repo: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and headers of the token endpoint: where the CAS is, and a token for this repository.

    huggingface_hub reads the headers, Xet's client the body.
    """
    token, expires = TOKEN_PREFIX + repo, int(time.time()) + TOKEN_SECONDS
    body = {"casUrl": cas_url, "accessToken": token, "exp": expires}
    headers = {
        "X-Xet-Cas-Url": cas_url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return body, headers


def reconstruction(
    version: str, url: str, repo: str, digest: str, size: int, start: int, end: int
) -> dict[str, Any]:
    """What bytes `start` to `end` (exclusive) of a file are made of, as API v1 or v2 says it."""
    first, last = start // CHUNK_BYTES, math.ceil(end / CHUNK_BYTES)
    terms: list[dict[str, Any]] = []
    fetches: dict[str, list[dict[str, Any]]] = {}
    for number in range(first // XORB_CHUNKS, math.ceil(last / XORB_CHUNKS)):
        begin = number * XORB_CHUNKS
        chunks = {"start": max(first - begin, 0), "end": min(last - begin, XORB_CHUNKS)}
        content = min((begin + chunks["end"]) * CHUNK_BYTES, size)
        content -= (begin + chunks["start"]) * CHUNK_BYTES
        name = hashlib.sha256(f"{digest}/{number}".encode()).hexdigest()
        terms.append({"hash": name, "unpacked_length": content, "range": chunks})
        offset = chunks["start"] * (CHUNK_BYTES + HEADER_BYTES)
        length = content + (chunks["end"] - chunks["start"]) * HEADER_BYTES
        where = f"{url}/xorbs/{repo}/{digest}/{number}"
        octets = {"start": offset, "end": offset + length - 1}
        if version == "v1":
            fetches[name] = [{"range": chunks, "url": where, "url_range": octets}]
        else:
            fetches[name] = [{"url": where, "ranges": [{"chunks": chunks, "bytes": octets}]}]
    return {
        "offset_into_first_range": start - first * CHUNK_BYTES,
        "terms": terms,
        "fetch_info" if version == "v1" else "xorbs": fetches,
    }


def xorb(blob: Path, number: int) -> bytes:
    """A xorb of the file as it is stored: each chunk after its header, which says "no compression".

    Empty if the file has no such part.
    """
    with blob.open("rb") as source:
        source.seek(number * XORB_BYTES)
        content = source.read(XORB_BYTES)
    parts = []
    for position in range(0, len(content), CHUNK_BYTES):
        chunk = content[position : position + CHUNK_BYTES]
        length = len(chunk).to_bytes(3, "little")
        parts += [b"\0", length, b"\0", length, chunk]
    return b"".join(parts)
