"""JSON for a Job, lines for a person, the token for nobody."""

import io
import json

from weights.errors import GatedRepo, Place
from weights.events import Reporter, amount, secrets_of

CANARY = "hf_CANARY"


def test_no_secret_leaves_in_any_field() -> None:
    out = io.StringIO()
    endpoint = f"https://u:{CANARY}2@mirror"
    reporter = Reporter(out, secrets=secrets_of(CANARY, endpoint))
    reporter.progress(f"GET {endpoint}/x with {CANARY}", nested={"list": [CANARY]})
    place = Place("org/name", "main", f"{CANARY}.txt")
    reporter.error(GatedRepo(f"refused {CANARY}", f"see {endpoint}", place=place))
    reporter.result(path=f"/models/{CANARY}")
    reporter.hide("later-secret")
    reporter.progress("later-secret and hf_abcdefghijklmnopqrstuvwxyz")
    text = out.getvalue()
    assert "CANARY" not in text and "u:" not in text and "later" not in text
    assert "hf_abc" not in text
    assert [json.loads(line)["event"] for line in text.splitlines()] == [
        "progress",
        "error",
        "result",
        "progress",
    ]


def test_an_error_event_has_what_where_and_next() -> None:
    out = io.StringIO()
    error = GatedRepo("what", "do that", place=Place("org/name", "main", "w"))
    Reporter(out).error(error)
    assert json.loads(out.getvalue()) == {
        "event": "error",
        "error": "GatedRepo",
        "message": "what",
        "next": "do that",
        "repo": "org/name",
        "revision": "main",
        "file": "w",
    }


def test_a_person_gets_one_line_that_moves_and_no_json() -> None:
    out = io.StringIO()
    reporter = Reporter(out, human=True)
    reporter.progress("1 of 2", percent=50)
    reporter.progress("2 of 2", percent=100)
    reporter.result(commit="abc")
    assert out.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\ncommit: abc\n"


def test_amounts() -> None:
    assert [amount(n) for n in (0, 999, 1500, 269_060_280, 2e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "269.1 MB",
        "2.00 TB",
    ]
