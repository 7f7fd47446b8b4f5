"""Revision -> commit, once: everything after it uses the commit, so that nothing can move."""

import re

from weights import hub as hubs
from weights.errors import HubRefused, Place, UsageError
from weights.hub import Hub
from weights.pace import Pace

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(hub: Hub, repo: str, revision: str, pace: Pace) -> str:
    """The 40-hex commit of a branch, tag or (short) commit.

    A whole commit is returned as it is, without asking: the fetch finds out whether it is there.
    Raises RevisionNotFound, RepositoryNotFound, Unauthorized and what else a hub can refuse.
    """
    check_repo(repo)
    if COMMIT.fullmatch(revision.lower()):
        return revision.lower()
    place = Place(repo, revision)
    commit = pace.persist(
        lambda: hubs.commit_of(hub, repo, revision),
        lambda error: hubs.understand(error, hub, place, resolved=False),
    )
    if commit is None or not COMMIT.fullmatch(commit):
        raise HubRefused(
            f"{hub.host} gives {commit!r} as the commit of {place}, which is none",
            "check that HF_ENDPOINT is a hub",
            place=place,
        )
    return commit


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
