"""Revision to commit, and every refusal by its name."""

import io

import pytest

from lab.hub import Fault
from lab.hub.server import OUTSIDER_TOKEN, TOKEN
from tests.weights.conftest import QUICK, REPO, World, model
from weights.errors import (
    HubFailed,
    HubUnreachable,
    RateLimited,
    RepositoryNotFound,
    RevisionNotFound,
    Stalled,
    Unauthorized,
    UsageError,
    WeightsError,
)
from weights.events import Reporter
from weights.hub import connect, told_wait
from weights.pace import Pace, Patience
from weights.resolve import resolve


def commit_of(url: str, revision: str, token: str = "", repo: str = REPO) -> str:
    pace = Pace(QUICK, Reporter(io.StringIO()))
    return resolve(connect({"HF_ENDPOINT": url, "HF_TOKEN": token}), repo, revision, pace)


def test_branch_tag_and_short_commit_become_the_commit(world: World) -> None:
    first = world.commit(model())
    world.server.hub.tag(REPO, "v1", first)
    second = world.commit(model(extra__txt=b"x"))
    url = world.server.url
    assert commit_of(url, "main") == second != first == commit_of(url, "v1")
    assert commit_of(url, first[:10]) == first
    asked = len(world.server.requests)
    assert commit_of(url, first.upper()) == first
    assert len(world.server.requests) == asked, "a whole commit needs no hub"


@pytest.mark.parametrize(
    ("repo", "token", "revision", "kind"),
    [
        (REPO, "", "nope", RevisionNotFound),
        ("lab/nope", "", "main", Unauthorized),
        ("lab/nope", TOKEN, "main", RepositoryNotFound),
        ("lab/private", "", "main", Unauthorized),
        ("lab/private", OUTSIDER_TOKEN, "main", RepositoryNotFound),
        (REPO, "hf_wrong", "main", Unauthorized),
        ("../evil", "", "main", UsageError),
        ("a/b/c", "", "main", UsageError),
        ("ab", "", "main", UsageError),
    ],
)
def test_refusals(
    world: World, repo: str, token: str, revision: str, kind: type[WeightsError]
) -> None:
    world.commit(model())
    world.server.hub.commit("lab/private", dict(model()), visibility="private")
    with pytest.raises(kind) as refused:
        commit_of(world.server.url, revision, token, repo)
    assert type(refused.value) is kind
    assert repo in str(refused.value) and refused.value.next_step
    assert token == "" or token not in str(refused.value)


def test_with_the_right_token_a_private_repository_is_there(world: World) -> None:
    commit = world.server.hub.commit("lab/private", dict(model()), visibility="private")
    assert commit_of(world.server.url, "main", TOKEN, "lab/private") == commit


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_error_is_tried_again_then_named(world: World, status: int) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(status=status, times=2))
    assert commit_of(world.server.url, "main") == commit
    world.server.faults.add(Fault(status=status))
    with pytest.raises(HubFailed, match=f"answers {status} for {REPO}@main"):
        commit_of(world.server.url, "main")
    assert len(world.server.requests) == 3 + QUICK.attempts


def test_a_rate_limit_without_a_time_is_tried_again_then_named(world: World) -> None:
    commit = world.commit(model())
    world.server.faults.add(Fault(status=429, times=2))
    assert commit_of(world.server.url, "main") == commit
    world.server.faults.add(Fault(status=429))
    with pytest.raises(RateLimited, match="429"):
        commit_of(world.server.url, "main")


def test_no_hub_there() -> None:
    with pytest.raises(HubUnreachable, match=r"no connection to 127\.0\.0\.1:\d+ for") as raised:
        commit_of("http://127.0.0.1:9", "main")
    assert "python -m weights pack" in raised.value.next_step, "the way without a hub"
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        commit_of("mirror.example", "main")


def test_how_long_to_wait_is_understood_in_all_forms() -> None:
    assert told_wait({}) is None
    assert told_wait({"retry-after": "30"}) == 30.0
    assert told_wait({"retry-after": "soon"}) is None
    assert told_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert told_wait({"ratelimit": '"api";r=0;t=55'}) == 56.0
    # An hour off is our clock, not the hub's.
    later, now = "Wed, 21 Oct 2015 07:28:30 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"
    assert told_wait({"retry-after": later, "date": now}) == 30.0
    assert told_wait({"retry-after": now, "date": later}) == 0.0
    assert told_wait({"ratelimit": '"api";r=3;t=55'}) is None


def test_a_hub_that_is_silent_is_noticed(world: World) -> None:
    world.commit(model())
    world.server.faults.add(Fault(where="api", delay_s=30))
    out = io.StringIO()
    pace = Pace(Patience(stall_s=0.5), Reporter(out))
    with pytest.raises(Stalled, match=f"while waiting for the commit of {REPO}@main from "):
        resolve(connect({"HF_ENDPOINT": world.server.url}), REPO, "main", pace)
    at = world.server.url.removeprefix("http://")
    assert f"waits for the commit of {REPO}@main from {at}, " in out.getvalue()


def test_a_hub_that_can_not_be_reached_is_not_tried_for_longer_than_a_silent_one() -> None:
    out = io.StringIO()
    pace = Pace(Patience(stall_s=1.0, attempts=9, first_wait_s=0.05), Reporter(out))
    with pytest.raises(HubUnreachable):
        resolve(connect({"HF_ENDPOINT": "http://127.0.0.1:9"}), REPO, "main", pace)
    assert "try 2 of 9" in out.getvalue()
    assert "try 9 of 9" not in out.getvalue(), "that is 6 s later at the earliest"
