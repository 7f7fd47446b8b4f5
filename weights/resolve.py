"""Revision -> commit, once: everything after it uses the commit, so that nothing can move."""

import difflib
import re

from weights import hub as hubs
from weights.errors import Place, RevisionNotFound, UsageError
from weights.hub import Hub
from weights.manifest import COMMIT
from weights.pace import Pace

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # as HubRepo of the catalog
SHOWN = 10  # of the names of branches and tags


def resolve(hub: Hub, repo: str, revision: str, pace: Pace) -> str:
    """The 40-hex commit of a branch, tag or (short) commit.

    A whole commit is returned as it is, without asking: the fetch finds out whether it is there.
    Raises RevisionNotFound, RepositoryNotFound, Unauthorized and what else a hub can refuse,
    NotAHub, and Stalled if it is silent for as long as `pace` waits.
    """
    check_repo(repo)
    if not revision.strip():
        raise UsageError("the revision is empty", "give a branch, tag or commit, such as main")
    if COMMIT.fullmatch(revision.lower()):
        return revision.lower()
    place = Place(repo, revision)

    def ask() -> str:
        return pace.persist(
            lambda: hubs.commit_of(hub, repo, revision),
            lambda error: hubs.understand(error, hub, place, resolved=False),
        )

    try:
        return pace.answer(ask, "the commit", place, hub.address)
    except RevisionNotFound as error:
        raise RevisionNotFound(
            f"{error}{_there_are(hubs.names_of(hub, repo), revision)}",
            error.next_step,
            place=place,
        ) from error


def _there_are(names: list[str], revision: str) -> str:
    """What one may have meant: the names most like it first."""
    like = difflib.get_close_matches(revision, names, n=SHOWN, cutoff=0.0)
    more = f", and {len(names) - len(like)} more" if len(names) > len(like) else ""
    return f"; its branches and tags: {', '.join(like)}{more}" if like else ""


def check_repo(repo: str) -> None:
    """Raise UsageError unless `repo` is a name that can be a folder below the root, too."""
    if not REPO.fullmatch(repo) or ".." in repo:
        raise UsageError(f"{repo!r} is no repository", "give it as organisation/name")


def check_commit(commit: str) -> None:
    """Raise UsageError unless it is a whole commit."""
    if not COMMIT.fullmatch(commit):
        raise UsageError(
            f"{commit!r} is no commit of 40 hex digits",
            "resolve the revision first: python -m weights resolve --repo … --revision …",
        )
