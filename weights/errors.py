"""What can go wrong with weights: one class a case, each with what, where and the next step."""

import errno
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """What an error is about. `revision` is a commit once it is resolved."""

    repo: str
    revision: str
    file: str | None = None

    def of(self, file: str) -> "Place":
        """The same for one file."""
        return replace(self, file=file)

    def __str__(self) -> str:
        where = f"{self.repo}@{self.revision}"
        return f"{self.file} of {where}" if self.file else where


class WeightsError(Exception):
    """Base of all errors of this program. `next_step`: what the reader should do now.

    `transient` ones are tried again by the fetch before they are raised; `wait_s` is how long
    the Hub told us to wait.
    """

    transient = False
    waiting = "asked to wait"

    def __init__(
        self,
        message: str,
        next_step: str,
        *,
        place: Place | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.next_step = next_step
        self.place = place
        self.wait_s = wait_s


class UsageError(WeightsError):
    """The command line or the environment can't be right."""


class Unauthorized(WeightsError):
    """401: the token is wrong, or there is none and the repository isn't public."""


class GatedRepo(WeightsError):
    """The repository's terms have not been accepted by the token's account."""


class RepositoryNotFound(WeightsError):
    """The repository doesn't exist, or the token may not see it."""


class RevisionNotFound(WeightsError):
    """The repository has no such branch, tag or commit."""


class CommitGone(WeightsError):
    """A commit that was resolved has files or a tree that the Hub no longer gives."""


class Forbidden(WeightsError):
    """403 that isn't a gate: the Hub or a proxy before it refuses."""


class RateLimited(WeightsError):
    """429."""

    transient = True
    waiting = "rate limited"


class HubFailed(WeightsError):
    """408 or 5xx."""

    transient = True


class HubUnreachable(WeightsError):
    """No connection, or one that ended in the middle."""

    transient = True


class Stalled(WeightsError):
    """The Hub sends nothing any more."""

    transient = True


class HubRefused(WeightsError):
    """An answer of the Hub that none of the other cases covers."""


class NotAHub(WeightsError):
    """What answers at HF_ENDPOINT doesn't speak the Hub's language."""


class WrongBytes(WeightsError):
    """A file's bytes aren't what the Hub's tree says, again after a second download."""


class BrokenSafetensors(WeightsError):
    """The Hub's bytes arrived whole, and are no readable safetensors file."""


class UnsafeName(WeightsError):
    """A file name that would leave the folder, or isn't a plain file."""


class EmptyRepository(WeightsError):
    """There is nothing to fetch."""


class NoWeights(WeightsError):
    """No file of weights is left after the patterns."""


class PickleRefused(WeightsError):
    """The only weights are pickles: loading them runs code."""


class MissingShard(WeightsError):
    """The index of a sharded checkpoint names a file or tensor that isn't there."""


class NotAnAdapter(WeightsError):
    """The repository has no LoRA adapter that can be served."""


class WrongBase(WeightsError):
    """The adapter was made for another model."""


class NoChatTemplate(WeightsError):
    """The catalog wants chat and the repository has no chat template."""


class NoSpace(WeightsError):
    """The volume has less free space than is missing."""


class DiskFull(WeightsError):
    """The volume ran full in the middle."""


class VolumeNotWritable(WeightsError):
    """The volume is read-only, or not ours to write."""


class Unreadable(WeightsError):
    """What is published could not be read by the server's user."""


class NotPublished(WeightsError):
    """There is no manifest where one is needed, or a folder without one where it must go."""


class Damaged(WeightsError):
    """Published files that no longer match their manifest."""


class BadArchive(WeightsError):
    """What should be imported is no whole archive of a published commit."""


class ReaderGone(WeightsError):
    """Whoever was to read the tar, or what this program says, has ended."""


class Unsaid(WeightsError):
    """What this program says can't be written: its output's disk is full, for one."""


class Interrupted(WeightsError):
    """SIGTERM or SIGINT."""


def volume_error(error: OSError, path: object, place: Place | None = None) -> WeightsError:
    """What an error of the file system means for the reader."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"the volume ran full while {place or path} was written to {path}",
            "make room or enlarge the claim, then start again: finished files are kept",
            place=place,
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return VolumeNotWritable(
            f"can't write {error.filename or path}: {error.strerror}",
            "mount the volume read-write in the download Job, for the user that it runs as "
            "(runAsUser, fsGroup)",
            place=place,
        )
    return WeightsError(
        f"{error.filename or path}: {error.strerror or error}",
        "look at the volume, then start again: finished files are kept",
        place=place,
    )
