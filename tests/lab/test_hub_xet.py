"""The hub's simulated Xet storage against the unmodified client, and what it says by itself."""

import hashlib
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoFile, hf_hub_download

from lab.hub import Fault, Hub, HubServer, xet
from lab.hub.server import OUTSIDER_TOKEN, TOKEN
from tests.xet_client import begin_anew

REPO = "org/name"
WEIGHTS = random.Random(1).randbytes(2 * xet.XORB_BYTES + xet.CHUNK_BYTES + 17)
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
FILES: dict[str, Path | bytes] = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "one-chunk.bin": WEIGHTS[: xet.CHUNK_BYTES],
    "small.bin": b"x",
    "empty.bin": b"",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    begin_anew()
    with HubServer(Hub(tmp_path / "hub")) as server:
        server.hub.commit(REPO, FILES, xet=True)
        yield server
    begin_anew()


def ask(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as a:
            return a.status, a.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def reconstruction(server: HubServer, version: str, **headers: str) -> Any:
    authorized = {"Authorization": f"Bearer {xet.TOKEN_PREFIX}{REPO}", **headers}
    status, body = ask(f"{server.url}/{version}/reconstructions/{DIGEST}", **authorized)
    assert status == 200, body
    return json.loads(body)


@pytest.mark.parametrize("name", [name for name in FILES if name != "config.json"])
def test_the_client_downloads_each_file_from_xet_storage(
    server: HubServer, tmp_path: Path, name: str
) -> None:
    path = hf_hub_download(REPO, name, endpoint=server.url, token=False, local_dir=tmp_path / "o")
    assert Path(path).read_bytes() == FILES[name]
    asked = [request for request in server.requests if request.method == "GET"]
    assert not [request for request in asked if "/resolve/" in request.path]
    assert [request for request in asked if "xet-read-token" in request.path]


def test_a_small_file_outside_lfs_and_an_older_commit_are_not_in_xet_storage(
    server: HubServer, tmp_path: Path
) -> None:
    plain = server.hub.commit(REPO, {**FILES, "README.md": b"another"})
    for name, revision in (("config.json", "main"), ("model.safetensors", plain)):
        hf_hub_download(
            REPO, name, revision=revision, endpoint=server.url, token=False, local_dir=tmp_path
        )
    assert not [r for r in server.requests if "xet" in r.path or "reconstructions" in r.path]


def test_the_tree_names_what_is_in_xet_storage(server: HubServer) -> None:
    tree = HfApi(endpoint=server.url, token=False).list_repo_tree(REPO, recursive=True)
    hashes = {entry.path: entry.xet_hash for entry in tree if isinstance(entry, RepoFile)}
    assert hashes["config.json"] is None and hashes["model.safetensors"] == DIGEST


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_any_range_of_a_file_is_made_of_its_parts(server: HubServer, version: str) -> None:
    edges = [0, 1, xet.CHUNK_BYTES, xet.XORB_BYTES - 1, xet.XORB_BYTES + 5, len(WEIGHTS)]
    for start in edges[:-1]:
        for end in (edge for edge in edges if edge > start):
            answer = reconstruction(server, version, Range=f"bytes={start}-{end - 1}")
            assert put_together(answer, version, end - start) == WEIGHTS[start:end]
    assert put_together(reconstruction(server, version), version, len(WEIGHTS)) == WEIGHTS


def put_together(answer: Any, version: str, length: int) -> bytes:
    """What a client makes of the answer: fetch each term's bytes, take the chunks out."""
    content = b""
    for term in answer["terms"]:
        if version == "v1":
            [fetch] = answer["fetch_info"][term["hash"]]
            chunks, octets = fetch["range"], fetch["url_range"]
        else:
            [fetch] = answer["xorbs"][term["hash"]]
            [part] = fetch["ranges"]
            chunks, octets = part["chunks"], part["bytes"]
        assert chunks == term["range"]
        status, raw = ask(fetch["url"], Range=f"bytes={octets['start']}-{octets['end']}")
        assert status == 206 and len(raw) == octets["end"] - octets["start"] + 1
        unpacked = b""
        for _ in range(chunks["end"] - chunks["start"]):
            size = int.from_bytes(raw[1:4], "little")
            assert raw[0] == raw[4] == 0 and raw[5:8] == raw[1:4]
            unpacked, raw = unpacked + raw[8 : 8 + size], raw[8 + size :]
        assert not raw and len(unpacked) == term["unpacked_length"]
        content += unpacked
    return content[answer["offset_into_first_range"] :][:length]


def test_who_may_not_read_the_repository_gets_no_token_for_its_storage(server: HubServer) -> None:
    server.hub.commit("org/gated", FILES, visibility="gated", xet=True)
    url = f"{server.url}/api/models/org/gated/xet-read-token/main"
    assert ask(url)[0] == 401
    assert ask(url, Authorization=f"Bearer {OUTSIDER_TOKEN}")[0] == 403
    status, body = ask(url, Authorization=f"Bearer {TOKEN}")
    assert status == 200 and set(json.loads(body)) == {"casUrl", "accessToken", "exp"}


def test_the_storage_wants_its_own_token_and_knows_its_files(server: HubServer) -> None:
    url = f"{server.url}/v2/reconstructions/"
    own = f"Bearer {xet.TOKEN_PREFIX}{REPO}"
    assert ask(url + DIGEST)[0] == ask(url + DIGEST, Authorization=f"Bearer {TOKEN}")[0] == 401
    assert ask(url + "f" * 64, Authorization=own)[0] == 404
    assert ask(url + "..", Authorization=own)[0] == 404
    after = f"bytes={len(WEIGHTS)}-"
    assert ask(url + DIGEST, Authorization=own, Range=after)[0] == 416
    assert ask(f"{server.url}/xorbs/{REPO}/{DIGEST}/3")[0] == 404
    assert ask(f"{server.url}/xorbs/{REPO}/{DIGEST}/0", Range="bytes=9999999-")[0] == 416


def test_faults_of_the_storage_are_for_a_repository_or_a_file(server: HubServer) -> None:
    server.faults.add(
        Fault(where="cas", repo=REPO, status=503), Fault(where="xorb", path=DIGEST, status=500)
    )
    own, other = (f"Bearer {xet.TOKEN_PREFIX}{repo}" for repo in (REPO, "org/other"))
    url = f"{server.url}/v2/reconstructions/{DIGEST}"
    assert (ask(url, Authorization=own)[0], ask(url, Authorization=other)[0]) == (503, 200)
    assert ask(f"{server.url}/xorbs/{REPO}/{DIGEST}/0")[0] == 500
    small = hashlib.sha256(b"x").hexdigest()
    assert ask(f"{server.url}/xorbs/{REPO}/{small}/0")[0] == 206
