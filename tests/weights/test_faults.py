"""Each fault of the hub that lasts: what is said, that nothing is published, that the next fetch is
right once it has passed."""

import json

import pytest

from lab.hub import Fault
from tests.weights.conftest import REPO, World, model
from weights import errors
from weights.pace import Patience

FILE = "model.safetensors"
FILES = model()
HALF = len(FILES[FILE]) // 2
# The client itself tries a cut connection again five times, a second apart.
BRIEF = Patience(stall_s=30.0, attempts=1)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param(Fault(status=401), errors.Unauthorized, id="401"),
        pytest.param(
            Fault(status=401, error_code="RepoNotFound"), errors.Unauthorized, id="401, no token"
        ),
        pytest.param(
            Fault(status=404, error_code="RepoNotFound"), errors.RepositoryNotFound, id="404 repo"
        ),
        pytest.param(
            Fault(status=404, error_code="RevisionNotFound"), errors.CommitGone, id="404 revision"
        ),
        pytest.param(
            Fault(status=404, error_code="EntryNotFound"), errors.CommitGone, id="404 file"
        ),
        pytest.param(Fault(status=403, error_code="GatedRepo"), errors.GatedRepo, id="403 gated"),
        pytest.param(Fault(status=403), errors.Forbidden, id="403"),
        pytest.param(Fault(status=416), errors.HubRefused, id="416"),
        pytest.param(Fault(status=418), errors.HubRefused, id="418"),
        pytest.param(Fault(status=429), errors.RateLimited, id="429"),
        pytest.param(Fault(status=429, retry_after="7200"), errors.RateLimited, id="429, 2 h"),
        *[pytest.param(Fault(status=n), errors.HubFailed, id=str(n)) for n in (500, 502, 503, 504)],
        pytest.param(Fault(status=503, retry_after="7200"), errors.HubFailed, id="503, 2 h"),
        pytest.param(Fault(cut_after=HALF), errors.HubUnreachable, id="cut: too short"),
        pytest.param(Fault(stall_after=HALF), errors.Stalled, id="stall"),
        pytest.param(Fault(flip_byte=HALF), errors.WrongBytes, id="wrong bytes, right length"),
        pytest.param(Fault(redirect="http://127.0.0.1:9"), errors.HubUnreachable, id="redirect"),
    ],
)
def test_what_lasts_is_named_and_the_next_fetch_succeeds(
    world: World, fault: Fault, kind: type[errors.WeightsError]
) -> None:
    commit = world.commit(FILES)
    world.server.faults.add(Fault(**{**vars(fault), "path": FILE, "where": "get"}))
    with pytest.raises(errors.WeightsError) as raised:
        world.fetch(commit, patience=Patience(1.5) if kind is errors.Stalled else BRIEF)
    error = raised.value
    assert type(error) is kind, repr(error)
    if kind is errors.HubUnreachable:  # with host and port, and be it those of a redirection
        assert (fault.redirect or world.server.url).removeprefix("http://") in str(error)
    assert REPO in str(error) and error.next_step
    place = error.place
    assert place is not None and (place.repo, place.revision) == (REPO, commit)
    if kind is not errors.Stalled:  # of all files that it waits for, its message names some
        assert place.file == FILE
    else:
        assert FILE in str(error)
    assert not (world.root / REPO / commit).exists()
    world.server.faults.clear()
    world.fetch(commit)
    assert world.published(commit) == FILES and world.left_over() == []
    assert world.gets("config.json") == 1, "what was finished is kept"


@pytest.mark.parametrize("clock_off_s", [-3600.0, 3600.0])
@pytest.mark.parametrize("status", [429, 503])
def test_a_date_to_try_again_is_of_the_hubs_clock(
    world: World, status: int, clock_off_s: float
) -> None:
    """Between ours and the hub's there is an hour."""
    commit = world.commit(FILES)
    world.server.faults.add(
        Fault(where="api", times=1, status=status, retry_after="3", clock_off_s=clock_off_s)
    )
    world.fetch(commit, patience=BRIEF)
    assert world.published(commit) == FILES
    told = [event["wait_s"] for event in world.events if "wait_s" in event]
    assert told in ([2.0], [3.0]), json.dumps(world.events)  # whole seconds, rounded down
