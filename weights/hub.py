"""The Hub through unmodified huggingface_hub: what a commit holds, its files, and its refusals.

The client's own retries answer neither a signal nor our watchdog, and some of its failures are a
local copy returned in silence. So bad answers are turned into exceptions as they arrive (a
response hook of the client, its public way in), and all patience is in pace.py.
"""

import email.utils
import errno
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import SplitResult, urlsplit

import httpx2
from huggingface_hub import (
    HfApi,
    RepoFile,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._runtime import is_xet_available

from weights import errors, xet
from weights.errors import Place, WeightsError
from weights.manifest import COMMIT, File
from weights.part import Part

DEFAULT_ENDPOINT = "https://huggingface.co"
METADATA_SECONDS = 30.0
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
# IETF draft-ietf-httpapi-ratelimit-headers-09, as the Hub sends it: "api";r=0;t=55
RATE_LIMIT = re.compile(r";\s*r\s*=\s*(\d+)\s*;\s*t\s*=\s*(\d+)")


@dataclass(frozen=True)
class Hub:
    """Where to fetch from, and as whom. The token is never printed."""

    endpoint: str
    token: str | None

    def __repr__(self) -> str:
        return f"Hub({urlsplit(self.endpoint).hostname})"

    @property
    def host(self) -> str:
        """The endpoint's host, without user and password."""
        return urlsplit(self.endpoint).hostname or self.endpoint

    @property
    def address(self) -> str:
        """The endpoint's host and port."""
        return _address(urlsplit(self.endpoint))


class BadAnswer(Exception):
    """A status that may pass. `wait_s`: how long the Hub says to wait, if it does."""

    def __init__(self, status: int, wait_s: float | None) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.wait_s = wait_s


def connect(environment: Mapping[str, str]) -> Hub:
    """The hub that HF_ENDPOINT and HF_TOKEN name. Raises UsageError for what can't be right."""
    endpoint = (environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise errors.UsageError(
            f"HF_ENDPOINT is {endpoint!r}, which is no address of a hub",
            "give it as https://host, or leave it out for huggingface.co",
        )
    if is_offline_mode():
        raise errors.UsageError(
            "HF_HUB_OFFLINE is set, so nothing can be fetched", "unset it for this program"
        )
    hub_logging.set_verbosity(logging.CRITICAL)  # its warnings repeat URLs and what we report
    warnings.filterwarnings("ignore", module=r"huggingface_hub\.")
    set_client_factory(
        lambda: httpx2.Client(
            follow_redirects=True, timeout=None, event_hooks={"response": [_refuse_bad_answer]}
        )
    )
    return Hub(endpoint, environment.get("HF_TOKEN") or get_token())


@contextmanager
def _answers_of(hub: Hub, place: Place) -> Iterator[None]:
    """Raise NotAHub for what the client, or what is here, can't read."""
    try:
        yield
    except HFValidationError:  # before ValueError, which it is one of: it is about the question
        raise
    except (
        *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
        *(httpx2.TooManyRedirects, httpx2.DecodingError),
    ) as error:
        said = f"its answer can't be read ({type(error).__name__}: {_first_line(error)})"
        raise _not_a_hub(hub, place, said) from error


def _not_a_hub(hub: Hub, place: Place, why: str) -> errors.NotAHub:
    return errors.NotAHub(
        f"what answers at {hub.address} is no model hub: asked for {place}, {why}",
        "check HF_ENDPOINT",
        place=place,
    )


def commit_of(hub: Hub, repo: str, revision: str) -> str:
    """The commit that a branch, tag or short commit is now. Raises NotAHub."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token or False)
    place = Place(repo, revision)
    with _answers_of(hub, place):
        sha = api.model_info(repo, revision=revision, timeout=METADATA_SECONDS).sha
    if not isinstance(sha, str) or not COMMIT.fullmatch(sha):
        raise _not_a_hub(hub, place, f"it gives {sha!r} as the commit, which is none")
    return sha


def names_of(hub: Hub, repo: str) -> list[str]:
    """The names of a repository's branches, then of its tags; none if the hub doesn't say."""
    # Not list_repo_refs(), which has no time-out.
    try:
        answer = get_session().get(
            f"{hub.endpoint}/api/models/{repo}/refs",
            headers=build_hf_headers(token=hub.token or False),
            timeout=METADATA_SECONDS,
        )
        hf_raise_for_status(answer)
        refs = answer.json()
        return [str(ref["name"]) for kind in ("branches", "tags") for ref in refs[kind]]
    except Exception:  # it is a help in the message of an error, whatever may ail the hub
        return []


def tree(hub: Hub, repo: str, commit: str) -> list[File]:
    """All files of a commit with size and hash. Raises NotAHub."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token or False)
    with _answers_of(hub, Place(repo, commit)):
        entries = list(api.list_repo_tree(repo, recursive=True, revision=commit))
        files = [_file(entry) for entry in entries if isinstance(entry, RepoFile)]
    if not entries:
        commit_of(hub, repo, commit)  # the client takes {} for a list without entries
    return files


def _file(entry: RepoFile) -> File:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    size = entry.lfs.size if entry.lfs else entry.size
    if not (isinstance(entry.path, str) and isinstance(size, int)):
        raise TypeError(f"a file {entry.path!r} of {size!r} bytes")
    git_sha1 = None if sha256 else entry.blob_id
    return File(entry.path, size, sha256, git_sha1, xet=entry.xet_hash is not None)


def through_xet(file: File) -> bool:
    """Whether download_xet() is for this file, and not download()."""
    return file.xet and is_xet_available()


def download(
    hub: Hub, repo: str, commit: str, file: File, part: Part, arrived: Callable[[int], None]
) -> None:
    """Download one file, or what is missing of it, into `part`.

    hf_hub_download() always begins at the first byte, and asks for what the tree has told already.
    `arrived` is told the bytes so far.
    """
    url = hf_hub_url(repo, file.path, revision=commit, endpoint=hub.endpoint)
    # A part of compressed bytes is no part of the file.
    headers = build_hf_headers(token=hub.token or False) | {"Accept-Encoding": "identity"}

    def get() -> None:
        http_get(
            url,
            cast(BinaryIO, part),
            resume_size=part.tell(),
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.path,
            tqdm_class=xet.counter(arrived),
        )

    if part.tell() > file.size:
        part.restart()
    try:
        get()
    except HfHubHTTPError as error:
        if error.response.status_code != 416 or not part.tell():
            raise
        part.restart()
        get()


def download_xet(
    hub: Hub, repo: str, commit: str, file: File, folder: Path, arrived: Callable[[int], None]
) -> Path:
    """Download one file of Xet storage below `folder`, where it must not lie yet.

    Returns its path. `arrived` is told the bytes so far, by threads of the client.
    """
    return Path(
        hf_hub_download(
            repo,
            file.path,
            revision=commit,
            local_dir=folder,
            endpoint=hub.endpoint,
            token=hub.token or False,
            tqdm_class=xet.counter(arrived),
        )
    )


def _refuse_bad_answer(response: httpx2.Response) -> None:
    """Response hook: end the request here, before the client sleeps on its own."""
    if response.status_code in PASSING_STATUS:
        raise BadAnswer(response.status_code, told_wait(response.headers))


def told_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After (seconds or a date) or the Hub's RateLimit header tells to wait."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        until = _seconds(value)
        # By the clock of the one who says it: ours may be wrong.
        now = _seconds(headers.get("date", "")) or time.time()
        return None if until is None else max(0.0, until - now)
    match = RATE_LIMIT.search(headers.get("ratelimit", ""))
    if match and match[1] == "0":
        return float(match[2]) + 1.0  # whole seconds, rounded down by the Hub
    return None


def _seconds(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def understand(error: Exception, hub: Hub, place: Place, *, resolved: bool) -> WeightsError:
    """Which of our errors this is. `resolved`: the commit was resolved, so it did exist."""
    chain = list(_chain(error))
    for cause in chain:
        if found := _one(cause, hub, place, resolved):
            return found
    return errors.HubRefused(
        f"{place}: {type(error).__name__}: {_first_line(error)}",
        "look at the message; the fetch can be started again, finished files are kept",
        place=place,
    )


def _one(error: BaseException, hub: Hub, place: Place, resolved: bool) -> WeightsError | None:
    again = "start again later: finished files are kept"
    if found := xet.understand(error, place):
        return found
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, BadAnswer):
        said = f"{hub.host} answers {error.status} for {place}"
        if error.status == 429:
            step = f"{again}; a token (HF_TOKEN) raises the limit"
            return errors.RateLimited(said, step, place=place, wait_s=error.wait_s)
        return errors.HubFailed(said, again, place=place, wait_s=error.wait_s)
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which it is one of
        return errors.GatedRepo(
            f"{place.repo} is gated and {_whose(hub)} has no access ({status}, {place})",
            f"accept the terms at {_page(hub, place)} with the account of the token, and give "
            "the token as HF_TOKEN (in the cluster: the Secret that weights.token_secret names)",
            place=place,
        )
    if status == 401:
        return errors.Unauthorized(
            f"{hub.host} refuses {_whose(hub)} for {place} (401): the repository is private or "
            "doesn't exist, or the token is wrong",
            "check the repository's name and HF_TOKEN (in the cluster: the Secret that "
            "weights.token_secret names)",
            place=place,
        )
    if isinstance(error, RepositoryNotFoundError):
        return errors.RepositoryNotFound(
            f"{hub.host} has no repository {place.repo} for {_whose(hub)} ({status})",
            "check the name; if it is private, give a token that may read it (HF_TOKEN)",
            place=place,
        )
    if isinstance(error, RevisionNotFoundError | RemoteEntryNotFoundError) or status == 404:
        if resolved:
            return errors.CommitGone(
                f"commit {place.revision} of {place.repo} can't be fetched (history rewritten?): "
                f"{place.file or 'its tree'} is 404",
                "resolve the revision anew, and pin a commit or tag that stays",
                place=place,
            )
        if isinstance(error, HfHubHTTPError) and "X-Error-Code" not in error.response.headers:
            return errors.RevisionNotFound(
                f"{hub.address} answers 404 for {place} without saying what is missing",
                "check that HF_ENDPOINT is a model hub, then repository and revision",
                place=place,
            )
        return errors.RevisionNotFound(
            f"{place.repo} has no branch, tag or commit {place.revision!r}",
            "correct the revision: name a branch, a tag or a commit of that repository",
            place=place,
        )
    if status is not None:
        kind = errors.Forbidden if status == 403 else errors.HubRefused
        return kind(
            f"{hub.host} answers {status} for {place}: {_first_line(error)}",
            "check that HF_ENDPOINT is a hub and that the token may read the repository",
            place=place,
        )
    if isinstance(error, HFValidationError):
        return errors.UsageError(f"{place.repo!r}: {_first_line(error)}", "correct the repository")
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return errors.Stalled(
            f"{_asked(error, hub)} went silent in {place}",
            f"look at the network between the Job and HF_ENDPOINT; {again}",
            place=place,
        )
    if isinstance(error, httpx2.TransportError) or _is_closed_client(error):
        cut = isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError)
        what = "the connection was cut" if cut else "no connection"
        return errors.HubUnreachable(
            f"{what} to {_asked(error, hub)} for {place}: {_first_line(error)}",
            "check HF_ENDPOINT, DNS, proxy and egress policy of the Job; a cluster without a way "
            "out needs a mirror as HF_ENDPOINT, or weights that are brought to it: python -m "
            "weights pack where the Hub can be reached, python -m weights import there "
            "(docs/own-cluster.md)",
            place=place,
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            return errors.volume_error(error, place.file, place)
        if "Consistency check failed" in str(error):  # the connection ended early, or too late
            return errors.HubUnreachable(
                f"{hub.address} sent {place} in another length than it said", again, place=place
            )
    return None


def _asked(error: BaseException, hub: Hub) -> str:
    """Host and port that an error of the client is about: of the Hub, or where it redirects to."""
    with suppress(RuntimeError, AttributeError):  # it has no request
        return _address(urlsplit(str(cast(httpx2.TransportError, error).request.url)))
    return hub.address


def _address(parts: SplitResult) -> str:
    port = {"http": 80, "https": 443}.get(parts.scheme) if parts.port is None else parts.port
    return f"{parts.hostname}:{port}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: the client wraps what it can't explain, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _is_closed_client(error: BaseException) -> bool:
    # The client closes the session that all threads share when one of them can't connect.
    return isinstance(error, RuntimeError) and "closed" in str(error)


def _whose(hub: Hub) -> str:
    return "this token" if hub.token else "an anonymous client (HF_TOKEN is not set)"


def _page(hub: Hub, place: Place) -> str:
    parts = urlsplit(hub.endpoint)
    address = f"{hub.host}:{parts.port}" if parts.port else hub.host  # without user and password
    return f"{parts.scheme}://{address}{parts.path}/{place.repo}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
