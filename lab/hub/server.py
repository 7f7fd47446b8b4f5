"""The hub's HTTP server: as much of the Hub's protocol as unmodified huggingface_hub asks for.

Status codes, X-Error-Code and messages are the real Hub's: 401 RepoNotFound for a repository that
is missing or private when nobody is logged in, 401 or 403 GatedRepo for a gated one's files (its
metadata is public), 404 RevisionNotFound and EntryNotFound. Files of a commit that was made with
`xet` are also served by a simulated Xet storage (xet.py), at the same address.

    GET    /api/models/<repo>[/revision/<revision>][?blobs=true]
    GET    /api/models/<repo>/tree/<revision>[/<folder>]?recursive=true   1,000 entries a page
    GET    /api/models/<repo>/refs
    POST   /api/models/<repo>/paths-info/<revision>
    HEAD, GET /<repo>/resolve/<revision>/<path>                   with Range and ETag
    GET    /api/models/<repo>/xet-read-token/<revision>          where the Xet storage is
    GET    /v1, /v2/reconstructions/<xet hash>                   how a file is put together
    GET    /xorbs/<repo>/<xet hash>/<number>                     its bytes, with Range
    GET, POST, DELETE /_lab/faults                               the faults in force
    GET    /_lab/requests                                        what was asked, newest last
"""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from lab.hub import xet
from lab.hub.faults import Fault, Faults, Where
from lab.hub.store import Hub, NoSuchRepo, NoSuchRevision, StoredFile

TOKEN = "hf_lab_token"  # may read private and gated repositories
OUTSIDER_TOKEN = "hf_lab_outsider"  # is valid, but on no list
PAGE = 1000
CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One request as the hub saw it. `authorized`: it carried a token."""

    method: str
    path: str
    status: int
    range: str | None
    authorized: bool


class Refusal(Exception):
    """An answer that is not 2xx, with the Hub's error code and message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class HubServer:
    """A hub on a socket, served by threads of this process. `port` 0 takes a free one."""

    def __init__(self, hub: Hub, host: str = "127.0.0.1", port: int = 0) -> None:
        self.hub = hub
        self.faults = Faults()
        self.requests: deque[Request] = deque(maxlen=100_000)
        self._http = _Server((host, port), self)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address to give as HF_ENDPOINT."""
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}"

    def serve_forever(self) -> None:
        """Serve in this thread."""
        self._http.serve_forever(poll_interval=0.1)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: HubServer) -> None:
        self.owner = owner
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no error of the hub."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "lab-hub"
    timeout = 300
    clock_off_s = 0.0  # of this answer

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: /_lab/requests has it."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        """For Date and Retry-After."""
        now = time.time() if timestamp is None else timestamp
        return super().date_time_string(now + self.clock_off_s)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.clock_off_s = 0.0
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        try:
            if path.startswith("/_lab/"):
                self._admin(path, body)
            elif path.startswith("/api/models/"):
                self._api(parts.path.removeprefix("/api/models/"), parse_qs(parts.query), body)
            elif path.startswith(("/v1/", "/v2/")):
                self._reconstruction(path)
            elif path.startswith("/xorbs/"):
                self._xorb(path)
            else:
                self._file(parts.path)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": str(refusal)}, refusal.status, headers)

    # -- what is asked ------------------------------------------------------------------------

    def _admin(self, path: str, body: bytes) -> None:
        owner = self.server.owner
        if path == "/_lab/requests" and self.command == "GET":
            self._json([vars(request) for request in owner.requests])
        elif path == "/_lab/faults" and self.command == "POST":
            try:
                raw = json.loads(body)
                owner.faults.add(*map(Fault.parse, raw if isinstance(raw, list) else [raw]))
            except (ValueError, TypeError) as error:
                raise Refusal(400, None, f"fault refused: {error}") from None
            self._json(owner.faults.listing())
        elif path == "/_lab/faults" and self.command == "DELETE":
            owner.faults.clear()
            self._json([])
        elif path == "/_lab/faults" and self.command == "GET":
            self._json(owner.faults.listing())
        else:
            raise Refusal(404, None, f"no such page: {self.command} {path}")

    def _api(self, rest: str, query: Mapping[str, list[str]], body: bytes) -> None:
        words = [unquote(word) for word in rest.split("/")]
        repo = "/".join(words[:2])
        what, *arguments = words[2:] or ["revision"]
        if self._shown(self.server.owner.faults.match(repo, "", "api")):
            return
        self._readable(repo, gated_too=False)
        if what == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in self.server.owner.hub.refs(repo).items()
            ]
            self._json({"branches": refs, "tags": [], "converts": []})
            return
        commit = self._commit(repo, arguments[0] if arguments else "main")
        files = self.server.owner.hub.files(repo, commit)
        if what == "revision":
            with_blobs = query.get("blobs", ["false"])[0].lower() in ("true", "1")
            self._json(_model_info(repo, commit, files, with_blobs, self._visibility(repo)))
        elif what == "tree":
            if not files and self._is_gone(repo, commit):
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {commit}")
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self._tree(rest, files, "/".join(arguments[1:]), recursive, query)
        elif what == "paths-info" and self.command == "POST":
            wanted = _paths_asked(body, self.headers.get("Content-Type", ""))
            self._json([_entry(files[path]) for path in wanted if path in files])
        elif what == "xet-read-token":
            self._readable(repo, gated_too=True)
            content, headers = xet.connection(self._url(), repo)
            self._json(content, headers=headers)
        else:
            raise Refusal(404, None, f"no such page: {self.path}")

    def _tree(
        self,
        rest: str,
        files: Mapping[str, StoredFile],
        folder: str,
        recursive: bool,
        query: Mapping[str, list[str]],
    ) -> None:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            steps = path.removeprefix(prefix).split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                name = prefix + "/".join(steps[:depth])
                entries.setdefault(name, {"type": "directory", "oid": "0" * 40, "size": 0})
                entries[name]["path"] = name
            if recursive or len(steps) == 1:
                entries[path] = _entry(file)
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        listing = list(entries.values())
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(listing):
            more = f"{self._url()}/api/models/{rest}?cursor={start + PAGE}"
            more += f"&recursive={str(recursive).lower()}"
            headers["Link"] = f'<{more}>; rel="next"'
        self._json(listing[start : start + PAGE], headers=headers)

    def _file(self, raw_path: str) -> None:
        words = [unquote(word) for word in raw_path.lstrip("/").split("/")]
        if len(words) < 5 or words[2] != "resolve" or self.command not in ("GET", "HEAD"):
            raise Refusal(404, None, f"no such page: {self.command} {unquote(raw_path)}")
        repo, revision, path = "/".join(words[:2]), words[3], "/".join(words[4:])
        where: Where = "head" if self.command == "HEAD" else "get"
        fault = self.server.owner.faults.match(repo, path, where)
        if self._shown(fault):
            return
        self._readable(repo, gated_too=True)
        commit = self._commit(repo, revision)
        file = self.server.owner.hub.files(repo, commit).get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self._send_file(file, repo, commit, fault)

    def _reconstruction(self, path: str) -> None:
        version, what, *rest = path.lstrip("/").split("/")
        if what != "reconstructions" or len(rest) != 1 or self.command != "GET":
            raise Refusal(404, None, f"no such page: {self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token.startswith(xet.TOKEN_PREFIX):
            raise Refusal(401, None, "the CAS needs the token of xet-read-token")
        repo, digest = token.removeprefix(xet.TOKEN_PREFIX), rest[0]
        if self._shown(self.server.owner.faults.match(repo, digest, "cas")):
            return
        size = self._blob(digest).stat().st_size
        try:
            start, end = _range(self.headers.get("Range"), size)
        except ValueError:
            raise Refusal(416, None, "the range is after the file's end") from None
        url = self._url()
        self._json(xet.reconstruction(version, url, repo, digest, size, start, end))

    def _xorb(self, path: str) -> None:
        words = path.lstrip("/").split("/")
        if len(words) != 5 or not words[4].isdecimal() or self.command != "GET":
            raise Refusal(404, None, f"no such page: {self.command} {path}")
        repo, digest, number = "/".join(words[1:3]), words[3], int(words[4])
        fault = self.server.owner.faults.match(repo, digest, "xorb")
        if self._shown(fault):
            return
        content = xet.xorb(self._blob(digest), number)
        if not content:
            raise Refusal(404, None, f"{digest} has no xorb {number}")
        try:
            start, end = _range(self.headers.get("Range"), len(content))
        except ValueError:
            raise Refusal(416, None, "no such part of the xorb") from None
        self._note(206)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self._send_damaged(content[start:end], number * xet.XORB_BYTES + start, fault or Fault())

    def _blob(self, digest: str) -> Path:
        blob = self.server.owner.hub.root / "blobs" / digest
        if not digest.isalnum() or not blob.is_file():
            raise Refusal(404, None, f"no file {digest} in Xet storage")
        return blob

    def _url(self) -> str:
        """The hub's address as this client knows it."""
        return f"http://{self.headers['Host']}"

    # -- who may read what --------------------------------------------------------------------

    def _readable(self, repo: str, gated_too: bool) -> None:
        """Raise what the Hub answers to somebody who may not read. Order matters: 401 first."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
        if token is not None and token not in (TOKEN, OUTSIDER_TOKEN):
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        try:
            visibility = self._visibility(repo)
        except NoSuchRepo:
            status = 404 if token else 401
            raise Refusal(status, "RepoNotFound", "Repository not found") from None
        if token == TOKEN or visibility == "public":
            return
        if visibility == "private":
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if not gated_too:
            return
        if token is None:
            raise Refusal(
                401,
                "GatedRepo",
                f"Access to model {repo} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
            )
        raise Refusal(
            403,
            "GatedRepo",
            f"Access to model {repo} is restricted and you are not in the authorized list.",
        )

    def _visibility(self, repo: str) -> str:
        return self.server.owner.hub.visibility(repo)

    def _commit(self, repo: str, revision: str) -> str:
        try:
            return self.server.owner.hub.resolve(repo, revision)
        except NoSuchRevision:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None

    def _is_gone(self, repo: str, commit: str) -> bool:
        commits = self.server.owner.hub.root / "repos" / repo / "commits"
        return not (commits / f"{commit}.json").exists()

    # -- answers ------------------------------------------------------------------------------

    def _shown(self, fault: Fault | None) -> bool:
        """Whether the fault was the whole answer."""
        if fault is None:
            return False
        time.sleep(fault.delay_s)
        if fault.redirect:
            self._json({}, 302, {"Location": fault.redirect + self.path})
            return True
        if fault.status is None:
            return False
        headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        if fault.retry_after and fault.clock_off_s is not None:
            self.clock_off_s = fault.clock_off_s
            until = time.time() + float(fault.retry_after)
            headers["Retry-After"] = self.date_time_string(until)
        if fault.error_code:
            headers["X-Error-Code"] = fault.error_code
        body = {"error": fault.body or f"lab fault {fault.status}"}
        self._json(body, fault.status, headers)
        return True

    def _json(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self._note(status)
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, file: StoredFile, repo: str, commit: str, fault: Fault | None) -> None:
        asked = self.headers.get("Range") if self.command == "GET" else None
        if fault is not None and fault.no_range:
            asked = None
        try:
            start, end = _range(asked, file.size)
        except ValueError:
            self._note(416)
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{file.size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = 206 if asked else 200
        self._note(status)
        self.send_response(status)
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if file.lfs:
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(file.size))
        if file.xet:
            for name, value in xet.file_headers(self._url(), repo, commit, file.sha256).items():
                self.send_header(name, value)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self._send_bytes(self.server.owner.hub.blob(file), start, end, fault)

    def _send_bytes(self, blob: Path, start: int, end: int, fault: Fault | None) -> None:
        self.wfile.flush()
        with blob.open("rb") as source:
            if fault is None:
                self.connection.sendfile(source, start, end - start)
                return
            source.seek(start)
            self._send_damaged(source.read(end - start), start, fault)

    def _send_damaged(self, content: bytes, start: int, fault: Fault) -> None:
        if fault.flip_byte is not None and start <= fault.flip_byte < start + len(content):
            damaged = bytearray(content)
            damaged[fault.flip_byte - start] ^= 0xFF
            content = bytes(damaged)
        good = fault.cut_after if fault.cut_after is not None else fault.stall_after
        if good is None or good > len(content):
            good = len(content)
        step = CHUNK if fault.bytes_per_s is None else max(1, int(fault.bytes_per_s / 20))
        for position in range(0, good, step):
            self.wfile.write(content[position : min(position + step, good)])
            if fault.bytes_per_s is not None and self.server.owner.faults.holds(fault):
                time.sleep(step / fault.bytes_per_s)
        if fault.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault.stall_after is not None:
            # Silent until the client gives up: then its end of the connection is closed.
            self.connection.settimeout(600)
            self.connection.recv(1)
            self.close_connection = True

    def _note(self, status: int) -> None:
        self.server.owner.requests.append(
            Request(
                self.command,
                unquote(self.path),
                status,
                self.headers.get("Range"),
                "Authorization" in self.headers,
            )
        )


def _entry(file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "oid": file.oid,
        "size": file.size,
        "path": file.path,
    }
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    if file.xet:
        entry["xetHash"] = file.sha256
    return entry


def _model_info(
    repo: str, commit: str, files: Mapping[str, StoredFile], with_blobs: bool, visibility: str
) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            sibling |= {"size": file.size, "blobId": file.oid}
            if file.lfs:
                sibling["lfs"] = {
                    "sha256": file.sha256,
                    "size": file.size,
                    "pointerSize": file.pointer_size,
                }
        siblings.append(sibling)
    return {
        "_id": commit[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.partition("/")[0],
        "sha": commit,
        "private": visibility == "private",
        "gated": "manual" if visibility == "gated" else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _paths_asked(body: bytes, content_type: str) -> list[str]:
    if "json" in content_type:
        return list(json.loads(body).get("paths", []))
    return parse_qs(body.decode()).get("paths", [])


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """Start and end (exclusive) of a single byte range. Raises ValueError for 416."""
    if asked is None:
        return 0, size
    unit, _, span = asked.partition("=")
    first, _, last = span.partition("-")
    if unit.strip() != "bytes" or "," in span:
        raise ValueError(asked)
    if not first:
        return max(0, size - int(last)), size
    start, end = int(first), min(int(last) + 1 if last else size, size)
    if start >= size or start >= end:
        raise ValueError(asked)
    return start, end
