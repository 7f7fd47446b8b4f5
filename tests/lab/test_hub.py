"""The lab's hub against the unmodified client: what the real Hub does, as far as we need it."""

import hashlib
import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lab.hub import Fault, Hub, HubServer
from lab.hub.server import OUTSIDER_TOKEN, TOKEN

REPO = "org/name"
FILES: dict[str, Path | bytes] = {
    "config.json": b"{}",
    "a b/ü.txt": b"names with spaces and more",
    "model.safetensors": bytes(range(256)) * 100,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(Hub(tmp_path / "hub")) as server:
        server.hub.commit(REPO, FILES)
        yield server


def api(server: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=server.url, token=token)


def ask(url: str, method: str = "GET", body: object = None, **headers: str) -> tuple[int, Any, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_client_downloads_a_snapshot_whole(server: HubServer, tmp_path: Path) -> None:
    folder = snapshot_download(
        REPO, endpoint=server.url, token=False, local_dir=tmp_path / "out", max_workers=2
    )
    got = {name: (Path(folder) / name).read_bytes() for name in FILES}
    assert got == FILES


def test_tree_and_info_agree_with_git_and_sha256(server: HubServer) -> None:
    commit = server.hub.resolve(REPO, "main")
    info = api(server).model_info(REPO, files_metadata=True)
    assert info.sha == commit and info.siblings is not None
    entries = {e.path: e for e in api(server).list_repo_tree(REPO, recursive=True)}
    files = {path: e for path, e in entries.items() if isinstance(e, RepoFile)}
    assert set(files) == set(FILES) == {s.rfilename for s in info.siblings}
    assert set(entries) - set(files) == {"a b"}
    git = subprocess.run(
        ["git", "hash-object", "--stdin"], input=b"{}", capture_output=True, check=True
    ).stdout
    assert files["config.json"].blob_id == git.decode().strip()
    weights, content = files["model.safetensors"], FILES["model.safetensors"]
    assert isinstance(content, bytes) and weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(content).hexdigest()
    assert weights.lfs.size == len(content) == weights.size
    [asked] = api(server).get_paths_info(REPO, ["config.json"])
    assert asked.path == "config.json"


def test_a_tree_of_several_pages(server: HubServer) -> None:
    server.hub.commit("org/many", {f"{i}.json": b"{}" for i in range(2500)})
    paths = [e.path for e in api(server).list_repo_tree("org/many", recursive=True)]
    assert len(paths) == len(set(paths)) == 2500
    pages = [r for r in server.requests if "/tree/" in r.path]
    assert len(pages) == 3


def test_the_same_files_are_the_same_commit_and_refs_move(server: HubServer) -> None:
    hub = server.hub
    first = hub.resolve(REPO, "main")
    assert hub.commit(REPO, FILES, ref="again") == first
    second = hub.commit(REPO, {"config.json": b"{1}"})
    hub.tag(REPO, "v1", first)
    assert (hub.resolve(REPO, "main"), hub.resolve(REPO, "v1")) == (second, first)
    assert api(server).model_info(REPO, revision="v1").sha == first
    assert hub.resolve(REPO, first[:8]) == first
    blobs = list((hub.root / "blobs").iterdir())
    assert len(blobs) == len(FILES) + 1, "content is stored once"


def test_who_may_read_what(server: HubServer) -> None:
    server.hub.commit("org/private", FILES, visibility="private")
    server.hub.commit("org/gated", FILES, visibility="gated")

    def get(repo: str, token: str | bool) -> str:
        return hf_hub_download(
            repo,
            "config.json",
            endpoint=server.url,
            token=token,
            local_dir=server.hub.root / f"out-{repo.replace('/', '-')}-{token}",
        )

    for token in (False, OUTSIDER_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            get("org/private", token)
        with pytest.raises(GatedRepoError):
            get("org/gated", token)
        assert api(server, token).model_info("org/gated").gated == "manual"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api(server, "hf_wrong").model_info(REPO)
    assert Path(get("org/private", TOKEN)).read_bytes() == b"{}"
    assert Path(get("org/gated", TOKEN)).read_bytes() == b"{}"


def test_what_is_not_there(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api(server, TOKEN).model_info("org/nope")
    with pytest.raises(RevisionNotFoundError):
        api(server).model_info(REPO, revision="nope")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nope.json", endpoint=server.url, token=False, local_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        list(api(server).list_repo_tree(REPO, revision="a" * 40))
    for path in ("/", "/x", f"/{REPO}/blob/main/x", f"/api/models/{REPO}/nope"):
        assert ask(server.url + path)[0] == 404, path


def test_ranges(server: HubServer) -> None:
    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    content = FILES["model.safetensors"]
    assert isinstance(content, bytes)
    status, headers, body = ask(url, Range="bytes=10-19")
    assert (status, body) == (206, content[10:20])
    assert headers["Content-Range"] == f"bytes 10-19/{len(content)}"
    assert ask(url, Range="bytes=25590-")[2] == content[25590:]
    assert ask(url, Range="bytes=-5")[2] == content[-5:]
    assert ask(url, Range=f"bytes={len(content)}-")[0] == 416
    status, headers, body = ask(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(content)))
    assert headers["X-Linked-Size"] == str(len(content))
    assert headers["X-Repo-Commit"] == server.hub.resolve(REPO, "main")


def test_faults_come_and_go_over_http(server: HubServer) -> None:
    admin, url = f"{server.url}/_lab/faults", f"{server.url}/{REPO}/resolve/main/config.json"
    fault = {"path": "*.json", "status": 429, "retry_after": "7", "times": 2, "after": 1}
    assert ask(admin, "POST", fault)[0] == 200
    statuses = [ask(url)[0] for _ in range(4)]
    assert statuses == [200, 429, 429, 200]
    assert json.loads(ask(admin)[2])[0]["matched"] == 3
    ask(admin, "DELETE")
    assert json.loads(ask(admin)[2]) == []
    status, _, body = ask(admin, "POST", {"stauts": 500})
    assert status == 400 and b"unknown field 'stauts'" in body
    asked = json.loads(ask(f"{server.url}/_lab/requests")[2])
    assert [r["status"] for r in asked if "config.json" in r["path"]] == statuses


def test_damage_of_content(server: HubServer) -> None:
    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    content = FILES["model.safetensors"]
    assert isinstance(content, bytes)
    server.faults.add(Fault(where="get", flip_byte=3))
    got = ask(url)[2]
    assert len(got) == len(content) and [i for i in range(10) if got[i] != content[i]] == [3]
    server.faults.clear()
    server.faults.add(Fault(where="get", cut_after=100))
    with pytest.raises(http.client.IncompleteRead, match="100 bytes read"):
        ask(url)
    server.faults.clear()
    server.faults.add(Fault(redirect="http://127.0.0.1:9", times=1))
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(url)


def test_a_port_in_use_is_one_clear_line(server: HubServer) -> None:
    port = server.url.rpartition(":")[2]
    root = str(server.hub.root)
    done = subprocess.run(
        [sys.executable, "-m", "lab.hub", "--root", root, "--port", port],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{port} can't be served" in done.stderr
