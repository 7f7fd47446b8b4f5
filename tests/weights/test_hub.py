"""What answers at HF_ENDPOINT and is no hub."""

import io
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.web import Answer, serving
from tests.weights.conftest import QUICK, REPO, World
from tests.weights.test_main import finish
from tests.weights.test_resolve import commit_of
from weights.errors import NotAHub, RevisionNotFound
from weights.events import Reporter
from weights.fetch import Wanted, fetch
from weights.hub import connect

COMMIT = "a" * 40
NO_JSON = (b"<html>hello</html>", b"", b"\xff", b'{"a":' * 100_000)
NO_OBJECT = (b"null", b"[]", b"[1]", b'[{"id": "x"}]', b"1", b'"x"')
NO_MODEL = (b"{}", b'{"error": "nope"}', b'{"data": []}')
NO_COMMIT = (b'{"id": "x"}', b'{"id": "x", "sha": 1}', b'{"id": "x", "sha": "main"}')
NO_FILES = (
    b'[{"type": "file"}]',
    b'[{"type": "file", "path": 1, "size": 1, "oid": "x"}]',
    b'[{"type": "file", "path": "x", "size": "y", "oid": "x"}]',
    b'[{"type": "file", "path": "x", "size": 1, "oid": "x", "lfs": 1}]',
)


def answering(body: bytes, status: int = 200, location: str = "") -> AbstractContextManager[str]:
    """A web server that answers everything so; its address."""
    return serving(lambda _: Answer(body, status, location))


def check(refused: pytest.ExceptionInfo[NotAHub], url: str, revision: str) -> None:
    at = url.removeprefix("http://")
    said = f"what answers at {at} is no model hub: asked for {REPO}@{revision}, it"
    assert str(refused.value).startswith(said)
    assert refused.value.next_step == "check HF_ENDPOINT"


@pytest.mark.parametrize("body", [*NO_JSON, *NO_OBJECT, *NO_MODEL, *NO_COMMIT])
def test_resolve_names_it(body: bytes) -> None:
    with answering(body) as url, pytest.raises(NotAHub) as refused:
        commit_of(url, "main")
    check(refused, url, "main")


@pytest.mark.parametrize("body", [*NO_JSON, *NO_OBJECT, *NO_MODEL, *NO_FILES])
def test_fetch_names_it(tmp_path: Path, body: bytes) -> None:
    wanted = Wanted(REPO, COMMIT)
    with answering(body) as url, pytest.raises(NotAHub) as refused:
        fetch(wanted, tmp_path, connect({"HF_ENDPOINT": url}), Reporter(io.StringIO()), QUICK)
    check(refused, url, COMMIT)
    assert not list(tmp_path.iterdir()), "no empty folders are left"


def test_a_redirection_to_a_page_is_none(world: World) -> None:
    with answering(b"<html>log in</html>") as page, answering(b"", 302, page) as url:
        [error] = finish(
            world.start("resolve", "--repo", REPO, "--revision", "main", HF_ENDPOINT=url), 1
        )
    assert (error["error"], error["next"]) == ("NotAHub", "check HF_ENDPOINT")
    with answering(b"", 302, "/round") as url, pytest.raises(NotAHub):
        commit_of(url, "main")


def test_a_404_that_does_not_say_what_is_missing_may_be_of_no_hub() -> None:
    with answering(b"not found", 404) as url, pytest.raises(RevisionNotFound) as refused:
        commit_of(url, "main")
    assert f"{url.removeprefix('http://')} answers 404 for {REPO}@main" in str(refused.value)
    assert "HF_ENDPOINT" in refused.value.next_step
