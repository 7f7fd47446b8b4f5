"""Make room: remove published commits that nobody needs, by age and by space.

What is in use can't be seen on the volume: whoever calls says what to keep (in the cluster: the
job `collect`, which asks the cluster). A removal renames first, so that a half-removed commit
never looks published; a reader that has the files open keeps them, on a local file system.
"""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from weights import manifest, publish
from weights.errors import UsageError, volume_error
from weights.events import Reporter, amount
from weights.manifest import COMMIT
from weights.volume import Leftover, Volume, scan

DAY_S = 86_400.0
UNFINISHED = ("staging", "parts")
SHOWN = 20  # of the folders that aren't ours


@dataclass(frozen=True)
class Policy:
    """`keep`: commits that stay whatever happens. Of the others those go that were last used more
    than `older_than_s` ago, and, the oldest first, as many more as `free` bytes on the volume take.
    """

    keep: frozenset[str]
    older_than_s: float | None = None
    free: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What becomes of a folder, and why. `used_at`: 0 for one that isn't published."""

    folder: Path
    repo: str
    commit: str
    bytes: int
    used_at: float
    removed: bool
    why: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.repo}@{self.commit}"

    def row(self, now: float) -> dict[str, object]:
        """For an event."""
        return {
            "repo": self.repo,
            "commit": self.commit,
            "size_bytes": self.bytes,
            "last_used": _date(self.used_at) if self.used_at else None,
            "idle_days": round((now - self.used_at) / DAY_S, 2) if self.used_at else None,
            "removed": self.removed,
            "why": self.why,
        }


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be. `free_bytes`: of the volume, after it. `left`: folders that
    could not be deleted yet; they are out of use, and the next one deletes them.
    """

    dry_run: bool
    removed: int
    bytes: int
    kept: int
    foreign: int
    left: int
    free_bytes: int
    short_bytes: int  # of what was to be free


def policy(keep: Sequence[str], older_than_days: float | None, free: str | None) -> Policy:
    """From the command line. Raises UsageError."""
    if older_than_days is None and free is None:
        raise UsageError(
            "nothing says what to remove", "give --older-than DAYS, --free SIZE, or both"
        )
    if older_than_days is not None and not older_than_days >= 0:
        raise UsageError(f"--older-than {older_than_days:g} is no age", "give days, 0 or more")
    commits = set()
    for kept in keep:
        commit = kept.rpartition("@")[2]
        if not COMMIT.fullmatch(commit):
            raise UsageError(
                f"--keep {kept} names no commit of 40 hex digits", "give it as repository@commit"
            )
        commits.add(commit)
    return Policy(
        frozenset(commits),
        None if older_than_days is None else older_than_days * DAY_S,
        None if free is None else _size(free),
    )


def _size(text: str) -> int:
    number = text.removesuffix("B")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([kMGT]|[KMGT]i)?", number):
        raise UsageError(f"--free {text} is no size", "give bytes, or say 50GiB or 50GB")
    # Here, since all of pydantic comes with it, and a fetch should start at once.
    from catalog.spec import amount as quantity

    return int(quantity(number))


def collect(root: Path, wanted: Policy, reporter: Reporter, *, dry_run: bool) -> Collected:
    """Say what becomes of everything on the volume, then do it, unless `dry_run`.

    Raises VolumeNotWritable. Interrupted, it leaves whole commits, and folders that the next
    collect removes.
    """
    volume = scan(root)
    now = _now(root, dry_run=dry_run)
    free = shutil.disk_usage(root).free
    verdicts = [
        *leftovers(volume, wanted, now),
        *commits(volume, wanted, now, free),
    ]
    _say(volume, wanted, verdicts, now, reporter)
    doomed = [verdict for verdict in verdicts if verdict.removed]
    left = 0
    if not dry_run:
        try:
            doomed, left = _remove(doomed, reporter)
        except OSError as error:
            raise volume_error(error, root) from error
    gone = sum(verdict.bytes for verdict in doomed)
    free = free + gone if dry_run else shutil.disk_usage(root).free
    return Collected(
        dry_run=dry_run,
        removed=len(doomed),
        bytes=gone,
        kept=len(verdicts) - len(doomed),
        foreign=len(volume.foreign),
        left=left,
        free_bytes=free,
        short_bytes=max(0, (wanted.free or 0) - free),
    )


def commits(volume: Volume, wanted: Policy, now: float, free: int) -> list[Verdict]:
    """The verdicts on what is published, the one unused for longest first."""
    alive = {left.commit for left in running_fetches(volume, now)}
    verdicts = []
    for commit in sorted(volume.published, key=lambda commit: commit.used_at):
        idle_s = now - commit.used_at
        why, removed = f"used {idle_s / DAY_S:.1f} days ago", False
        if commit.manifest.commit in wanted.keep:
            why = "to be kept"
        elif commit.manifest.commit in alive:
            why = "a fetch is running"
        elif wanted.older_than_s is not None and idle_s > wanted.older_than_s:
            why, removed = f"unused for {idle_s / DAY_S:.1f} days", True
        elif wanted.free is not None and free < wanted.free:
            why, removed = f"the oldest, and {amount(wanted.free)} are to be free", True
        found = commit.manifest
        free += found.bytes if removed else 0
        verdicts.append(
            Verdict(
                commit.folder, found.repo, found.commit, found.bytes, commit.used_at, removed, why
            )
        )
    return verdicts


def leftovers(volume: Volume, wanted: Policy, now: float) -> list[Verdict]:
    """The verdicts on what isn't published. What a fetch that runs, or a commit that is kept, has
    there stays; the rest nobody will finish.
    """
    running = running_fetches(volume, now)
    alive = {left.commit for left in running}
    verdicts = []
    for left in volume.leftovers:
        ended = f"left by a {'removal' if left.kind == 'removed' else 'fetch'} that was ended"
        why = ""
        if left in running or (left.kind in UNFINISHED and left.commit in alive):
            why = "a fetch is running"
        elif left.kind in UNFINISHED and left.commit in wanted.keep:
            why = "to be kept"
        size = _bytes(left.folder)
        verdicts.append(
            Verdict(left.folder, left.repo, left.commit, size, 0.0, not why, why or ended)
        )
    return verdicts


def running_fetches(volume: Volume, now: float) -> list[Leftover]:
    """The work folders of fetches that are not dead."""
    return [
        left
        for left in volume.leftovers
        if left.kind == "work" and not publish.is_dead(left.folder, now)
    ]


def _say(
    volume: Volume, wanted: Policy, verdicts: Sequence[Verdict], now: float, reporter: Reporter
) -> None:
    for verdict in verdicts:
        deed = "remove" if verdict.removed else "keep"
        last = f", last used {_date(verdict.used_at)}" if verdict.used_at else ""
        reporter.progress(
            f"{deed:6} {verdict.name}: {amount(verdict.bytes)}{last}: {verdict.why}",
            **verdict.row(now),
        )
    absent = wanted.keep - {commit.manifest.commit for commit in volume.published}
    for commit in sorted(absent):
        reporter.progress(f"{commit} is to be kept, and isn't published on this volume")
    for path, why in list(volume.foreign.items())[:SHOWN]:
        reporter.progress(f"{path} {why}: not touched", not_ours=str(path), why=why)
    if len(volume.foreign) > SHOWN:
        reporter.progress(f"and {len(volume.foreign) - SHOWN} more that are not touched")


def _remove(doomed: Sequence[Verdict], reporter: Reporter) -> tuple[list[Verdict], int]:
    """Put all aside, which takes no time, then delete. Returns what went, and how much is left."""
    aside = {}
    for verdict in doomed:
        if not _is_as_seen(verdict):
            reporter.progress(f"keep   {verdict.name}: used just now")
            continue
        aside[publish.put_aside(verdict.folder, verdict.commit)] = verdict
    left = 0
    for folder, verdict in aside.items():
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            left += 1
            reporter.progress(f"{folder} can't be deleted yet: a reader on another node?")
        else:
            reporter.progress(f"removed {verdict.name}")
    return list(aside.values()), left


def _is_as_seen(verdict: Verdict) -> bool:
    """Whether nobody has used or removed it since it was judged."""
    if not verdict.used_at:
        return verdict.folder.exists()
    try:
        return (verdict.folder / manifest.NAME).stat().st_mtime == verdict.used_at
    except FileNotFoundError:
        return False


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _now(root: Path, *, dry_run: bool) -> float:
    try:
        return publish.now(root)
    except OSError as error:
        if dry_run:  # one may look at a volume that one may not write to
            return time.time()
        raise volume_error(error, root) from error


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
