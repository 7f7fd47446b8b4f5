"""Fetch a commit: hit, or plan, download and verify beside each other, and publish."""

import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from weights import hub as hubs
from weights import manifest, plan, publish, verify
from weights.errors import (
    Damaged,
    NoSpace,
    Place,
    WeightsError,
    WrongBytes,
    volume_error,
)
from weights.events import Reporter, amount
from weights.hub import Hub
from weights.manifest import File, Manifest, Selection
from weights.pace import Pace, Patience
from weights.part import Part
from weights.publish import Folders
from weights.resolve import check_commit, check_repo
from weights.volume import check_root

T = TypeVar("T")

WORKERS = 4
RATE_REPORTS = 6  # the rate is that of the last 10 s
# Room that the volume must have beyond what is missing.
SPARE_BYTES = 64 * 1024 * 1024
# After a failure, so long may the other threads take to finish their file.
FAREWELL_SECONDS = 3.0
DOWNLOADS = 2  # of a file whose bytes are wrong; then it is the Hub, and not the way from it


@dataclass(frozen=True)
class Wanted:
    """What to fetch. `chat`: there must be a chat template.

    What is published already is compared by hash if `rehash`, or if that was `rehash_after_days`
    ago.
    """

    repo: str
    commit: str
    selection: Selection = field(default_factory=Selection)
    chat: bool = False
    rehash: bool = False
    rehash_after_days: float = math.inf

    @property
    def place(self) -> Place:
        """For messages."""
        return Place(self.repo, self.commit)


@dataclass(frozen=True)
class Fetched:
    """What is published now. `hit`: it was there before, and no byte was fetched."""

    path: str
    repo: str
    commit: str
    files: int
    bytes: int
    manifest_digest: str
    read_bytes_per_s: float
    hit: bool


def fetch(wanted: Wanted, root: Path, hub: Hub, reporter: Reporter, patience: Patience) -> Fetched:
    """See to it that the commit is published below `root`, and say what is there.

    Raises the errors of weights.errors. Whatever happens, what is published stays whole, and
    files that were finished and verified are kept for the next fetch.
    """
    check_repo(wanted.repo)
    check_commit(wanted.commit)
    where = publish.folders(root, wanted.repo, wanted.commit)
    check_root(root)
    try:
        # Another fetch may publish the commit under us, with other patterns perhaps: look again.
        while True:
            there = _look(wanted, where, reporter)
            if there and not there.damaged and there.manifest.selection == wanted.selection:
                hit = _hit(wanted, where, there.manifest)
                if publish.is_published(where):  # and not removed by a collection just now
                    return hit
                continue
            if done := _Fetch(wanted, where, there, hub, reporter, patience).run():
                return done
            shutil.rmtree(where.staging, ignore_errors=True)
    except OSError as error:
        raise volume_error(error, where.published, wanted.place) from error


@dataclass(frozen=True)
class _Published:
    """What is published. `manifest.verified_at` and `mtimes` are as of now.

    `damaged`: path -> why; the other files are right.
    """

    manifest: Manifest
    damaged: Mapping[str, str]


def _look(wanted: Wanted, where: Folders, reporter: Reporter) -> _Published | None:
    """Compare what is published with its manifest; None if there is nothing that has one.

    By sizes and mtimes, and by hashes where these don't fit, or if asked to, or after a while.
    """
    found = _manifest(where.published) if publish.is_published(where) else None
    if found is None:
        return None
    damaged = verify.damaged(where.published, found, hashes=False)
    all_of_them = wanted.rehash or _days_since(found.verified_at) > wanted.rehash_after_days
    here = [file for file in found.files if file.path not in damaged]
    mtimes = verify.mtimes(where.published, here)
    suspects = [f for f in here if all_of_them or mtimes[f.path] != found.mtimes.get(f.path)]
    if suspects:
        why = "as asked" if wanted.rehash else f"last done {found.verified_at}"
        reporter.progress(
            f"compares {amount(sum(file.size for file in suspects))} of {wanted.place} with "
            f"their hashes: {why if all_of_them else suspects[0].path + ' was changed'}"
        )
        damaged |= verify.damaged(
            where.published, replace(found, files=tuple(suspects)), hashes=True
        )
        found = replace(
            found,
            verified_at=_now() if all_of_them else found.verified_at,
            mtimes={path: mtime for path, mtime in mtimes.items() if path not in damaged},
        )
        if not damaged:
            with suppress(OSError):  # no room, read-only: then it is compared again next time
                publish.renew(where, found)
    for path, wrong in damaged.items():
        reporter.progress(f"{wanted.place.of(path)} {wrong}")
    return _Published(found, damaged)


def _days_since(time_: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time_)).total_seconds() / 86_400


def _hit(wanted: Wanted, where: Folders, found: Manifest) -> Fetched:
    """What is published is what is wanted."""
    if wanted.chat:
        paths = [file.path for file in found.files]
        plan.check_chat(paths, where.published, wanted.place)
    verify.check_readable(where.root, where.published)
    publish.touch(where.published)
    return _fetched(where, found, hit=True)


def _manifest(folder: Path) -> Manifest | None:
    """The manifest, or None: one that can't be read is made anew from the Hub's tree."""
    with suppress(Damaged):
        return manifest.read(folder)
    return None


def _fetched(where: Folders, found: Manifest, *, hit: bool) -> Fetched:
    return Fetched(
        path=str(where.published),
        repo=found.repo,
        commit=found.commit,
        files=len(found.files),
        bytes=found.bytes,
        manifest_digest=found.digest,
        read_bytes_per_s=found.read_bytes_per_s,
        hit=hit,
    )


class _Fetch:
    """One attempt at publishing a commit, with its threads and its work folder."""

    def __init__(
        self,
        wanted: Wanted,
        where: Folders,
        there: _Published | None,
        hub: Hub,
        reporter: Reporter,
        patience: Patience,
    ) -> None:
        self.wanted = wanted
        self.where = where
        self.there = there
        damaged = there.damaged if there else {}
        self.hub = hub
        self.reporter = reporter
        self.pace = Pace(patience, reporter)
        self.others = publish.Others(where)
        self.ended = threading.Event()
        # A published folder that lacks or damaged a file is mended in place, file by file.
        self.target = where.published if publish.is_published(where) else where.staging
        # What was seen counts only while it is there: `collect` may have removed it.
        seen = there.manifest if there and self.target == where.published else None
        self.right = {f.path: f for f in seen.files if f.path not in damaged} if seen else {}
        # path -> st_mtime_ns when it was compared
        self.mtimes = {path: seen.mtimes[path] for path in self.right} if seen else {}
        self.total = 0
        self.settled: dict[str, int] = {}  # path -> bytes of files that are in their place
        # When, and how many bytes had come from the Hub.
        self.history: deque[tuple[float, int]] = deque(maxlen=RATE_REPORTS)
        self.busy: dict[str, float] = {}  # path -> since when
        self.arrived: dict[str, int] = {}  # path -> bytes of files on their way
        self.kept: dict[str, int] = {}  # path -> bytes of it that were here already

    def run(self) -> Fetched | None:
        """Fetch and publish. None: another fetch was faster, look again."""
        missing = publish.missing(self.where)
        try:
            publish.make(self.where.root, self.where.work)
            publish.beat(self.where.work)
            threading.Thread(target=self._beat, daemon=True).start()
            self._await_parts()
            return self._run()
        except FileNotFoundError:
            if self.target == self.where.staging and publish.is_published(self.where):
                return None  # staging was renamed to the commit by another fetch
            raise
        finally:
            self.pace.stop()
            self.ended.set()
            publish.leave(self.where, self.where.work)
            with suppress(OSError):  # the volume may be what is wrong
                if not self.others.running:
                    publish.remove_empty(missing)

    def _beat(self) -> None:
        while not self.ended.wait(publish.BEAT_SECONDS):
            with suppress(OSError):  # the fetch itself will meet what is wrong with the volume
                publish.beat(self.where.work)

    def _await_parts(self) -> None:
        """Wait until it is sure which fetches are dead: what they have got needn't come again."""
        deadline = time.monotonic() + publish.DEAD_AFTER_S + 2 * publish.BEAT_SECONDS
        said = False
        self._sweep()
        while (names := self.others.undecided()) and time.monotonic() < deadline:
            if not said:
                self.reporter.progress(
                    f"looks {publish.DEAD_AFTER_S:.0f} s whether the fetch in {names[0]} is alive"
                )
                said = True
            time.sleep(publish.BEAT_SECONDS / 4)
            self._sweep()

    def _run(self) -> Fetched | None:
        wanted, place = self.wanted, self.wanted.place
        everything = self.pace.answer(self._tree, "the list of files", place, self.hub.address)
        chosen = plan.choose(everything, wanted.selection, place)
        self._check_space(chosen)
        publish.make(self.where.root, self.target)
        self.total = sum(file.size for file in chosen)
        self._each(plan.first(chosen), self._obtain)
        chosen = plan.check_shards(chosen, everything, self.target, place)
        if wanted.chat:
            plan.check_chat([file.path for file in chosen], self.target, place)
        self._say_what_is_not_mended({file.path for file in chosen})
        self.total = sum(file.size for file in chosen)
        self.reporter.progress(
            f"{len(chosen)} files, {amount(self.total)} of {place}",
            files=len(chosen),
            total_bytes=self.total,
        )
        self.history.append((time.monotonic(), self._bytes_here() - self._bytes_kept()))
        # The largest first: they decide when it ends.
        rest = [file for file in chosen if file.path not in self.settled]
        self._each(sorted(rest, key=lambda file: -file.size), self._obtain)
        self._report()
        verify.check_tensors(self.target, chosen, place)
        return self._publish(chosen)

    def _say_what_is_not_mended(self, chosen: set[str]) -> None:
        damaged = self.there.damaged if self.there else {}
        for path in damaged.keys() - chosen:
            self.reporter.progress(
                f"{self.wanted.place.of(path)} was of an earlier selection only: it isn't fetched "
                "again, and is no longer published"
            )

    def _publish(self, chosen: tuple[File, ...]) -> Fetched | None:
        if self.target == self.where.staging:
            publish.tidy(self.target, chosen)
        paths = {file.path for file in chosen}
        # Files of an earlier selection stay published.
        chosen += tuple(file for path, file in self.right.items() if path not in paths)
        verify.check_readable(self.where.root, self.target)
        publish.sync_volume(self.target)
        now = _now()
        content = Manifest(
            repo=self.wanted.repo,
            commit=self.wanted.commit,
            files=tuple(sorted(chosen, key=lambda file: file.path)),
            selection=self.wanted.selection,
            read_bytes_per_s=round(verify.read_throughput(self.target, chosen)),
            published_at=now,
            verified_at=self.there.manifest.verified_at if self.there else now,
            mtimes={file.path: self.mtimes[file.path] for file in chosen},
        )
        if not publish.publish(self.where, self.target, content):
            return None
        # Staging is shared: a fetch with other patterns may have tidied it meanwhile.
        now_there = _manifest(self.where.published)
        if now_there != content or verify.damaged(self.where.published, content, hashes=False):
            return None
        return _fetched(self.where, content, hit=False)

    # -- one file -----------------------------------------------------------------------------

    def _tree(self) -> list[File]:
        place = self.wanted.place
        return self.pace.persist(
            lambda: hubs.tree(self.hub, self.wanted.repo, self.wanted.commit),
            lambda error: hubs.understand(error, self.hub, place, resolved=True),
        )

    def _obtain(self, file: File) -> None:
        """See that the file lies verified in its place: keep it, or download it."""
        place = self.wanted.place.of(file.path)
        target = self.target / file.path
        self.busy[file.path] = time.monotonic()
        if self.right.get(file.path) != file:
            before = target.lstat().st_mtime_ns if target.exists() else 0
            if verify.problem(target, file, self._hashed) is None:
                self.mtimes[file.path] = before
                self.kept[file.path] = file.size
                _check_format(target, place)
            else:
                self._download(file, place)
        else:
            self.kept[file.path] = file.size
        del self.busy[file.path]
        self.settled[file.path] = file.size

    def _download(self, file: File, place: Place) -> None:
        downloads = 0
        while downloads < DOWNLOADS:
            resumed = self._left(file) > 0
            path, wrong = self._once(file, place)
            if wrong is None:
                _check_format(path, place)
                self.mtimes[file.path] = path.stat().st_mtime_ns
                publish.settle(path, self.target, file.path)
                return
            path.unlink(missing_ok=True)
            downloads += not resumed
            if downloads < DOWNLOADS:
                self.reporter.progress(f"{place} {wrong}: downloading it again")
        raise WrongBytes(
            f"{place} {wrong}, in {DOWNLOADS} downloads",
            "something between the Hub and the Job changes bytes (a proxy, a mirror, memory, the "
            "volume): nothing of it was published; find it, then start again",
            place=place,
        )

    def _once(self, file: File, place: Place) -> tuple[Path, str | None]:
        """Download the file. Returns where it is, and what is wrong with its bytes."""
        hub, repo, commit = self.hub, self.wanted.repo, self.wanted.commit

        def understand(error: Exception) -> WeightsError:
            return hubs.understand(error, hub, place, resolved=True)

        if hubs.through_xet(file):
            folder = self.where.work / "xet"
            arrived = partial(self._arrived, file, None)
            path = self.pace.persist(
                lambda: hubs.download_xet(hub, repo, commit, file, folder, arrived), understand
            )
            return path, verify.problem(path, file, self._hashed)
        with Part(publish.part(self.where, file.path), file) as part:
            arrived = partial(self._arrived, file, part)

            def download() -> None:
                self._take_over(file, part)
                hubs.download(hub, repo, commit, file, part, arrived)

            self.pace.persist(download, understand)
            return part.path, part.problem

    def _take_over(self, file: File, part: Part) -> None:
        """Begin with what an ended fetch has left of the file, if it is a new one."""
        left = self.where.parts / file.path
        if part.tell() or not left.exists():
            return
        # While it is copied it is there twice: that room must be beside what is still to come.
        if shutil.disk_usage(self.where.root).free >= self.total - self._bytes_here():
            with suppress(FileNotFoundError):  # another fetch was faster
                part.continue_from(left, partial(self._arrived, file, part))
        else:
            self.reporter.progress(
                f"no room to copy what is there of {self.wanted.place.of(file.path)}: "
                "it is downloaded from its start"
            )
        left.unlink(missing_ok=True)

    def _hashed(self, _: int) -> None:
        self.pace.alive()

    def _arrived(self, file: File, part: Part | None, count: int) -> None:
        self.arrived[file.path] = min(count, file.size)
        self.kept[file.path] = part.kept if part else 0
        self.pace.alive()

    # -- all of them --------------------------------------------------------------------------

    def _each(self, items: Sequence[T], action: Callable[[T], None]) -> None:
        """Do `action` for all items in a few threads, under the watchdog. Raises the first error.

        The threads are daemons: one that hangs in the client can't keep the program from ending.
        """
        queue = deque(items)
        failures: list[BaseException] = []
        finished = threading.Semaphore(0)

        def work() -> None:
            try:
                while not failures:
                    try:
                        item = queue.popleft()
                    except IndexError:
                        break
                    action(item)
            except BaseException as error:
                failures.append(error)
            finally:
                finished.release()

        workers = min(WORKERS, len(queue))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        self.pace.alive()
        while workers and not failures:
            if finished.acquire(timeout=self.pace.look_s):
                workers -= 1
            elif not failures:
                self._tick()
        if failures:
            self.pace.stop()
            deadline = time.monotonic() + FAREWELL_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            raise failures[0]

    def _tick(self) -> None:
        waiting_for = ", ".join(list(self.busy)[:3])
        self.pace.check(self.wanted.place, waiting_for, self.hub.address)
        self._report()
        self._sweep()

    def _bytes_here(self) -> int:
        """Bytes that have arrived so far: of files in place, and of those on their way.

        The files that grow in the work folder don't tell: Xet's client writes in large parts.
        """
        under_way = sum(n for path, n in list(self.arrived.items()) if path not in self.settled)
        return sum(list(self.settled.values())) + under_way

    def _bytes_kept(self) -> int:
        """Those of them that didn't come from the Hub now: they tell nothing of its speed."""
        return sum(list(self.kept.values()))

    def _report(self) -> None:
        if not self.total:
            return
        now, done = time.monotonic(), self._bytes_here()
        came = done - self._bytes_kept()
        self.history.append((now, came))
        then, before = self.history[0]
        # Less than before: bytes that were wrong have been thrown away.
        rate = max(0, came - before) / (now - then) if now > then else 0.0
        left = (self.total - done) / rate if rate > 0 else None
        self.reporter.progress(
            f"{amount(done)} of {amount(self.total)} ({100 * done / self.total:.0f} %), "
            f"{amount(rate)}/s" + (f", {left:.0f} s left" if left is not None else ""),
            bytes=done,
            total_bytes=self.total,
            percent=round(100 * done / self.total, 1),
            bytes_per_s=round(rate),
            seconds_left=None if left is None else round(left),
        )

    def _sweep(self) -> None:
        for name in self.others.sweep():
            self.reporter.progress(f"removed {name}, left by a fetch that was killed")

    def _left(self, file: File) -> int:
        """Bytes that needn't come again. Xet's client begins anew."""
        return 0 if hubs.through_xet(file) else publish.left_bytes(self.where, file.path)

    def _check_space(self, chosen: Sequence[File]) -> None:
        """Raise NoSpace before the first byte if the volume can't hold what is missing."""
        missing = sum(
            max(0, file.size - self._left(file))
            for file in chosen
            if verify.size_problem(self.target / file.path, file) is not None
        )
        free = shutil.disk_usage(self.where.root).free
        if missing and missing + SPARE_BYTES > free:
            raise NoSpace(
                f"{self.where.root} has {amount(free)} free; {self.wanted.place} needs "
                f"{amount(missing)} more, and {amount(SPARE_BYTES)} to spare",
                "remove commits that nothing serves (python -m weights list), or enlarge the claim",
                place=self.wanted.place,
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_format(path: Path, place: Place) -> None:
    if path.suffix == ".safetensors":
        verify.check_header(path, place)
