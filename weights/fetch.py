"""Fetch a commit: hit, or plan, download and verify beside each other, and publish."""

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from weights import hub as hubs
from weights import manifest, plan, publish, verify
from weights.errors import (
    Damaged,
    NoSpace,
    Place,
    VolumeNotWritable,
    WrongBytes,
    volume_error,
)
from weights.events import Reporter, amount
from weights.hub import Hub
from weights.manifest import File, Manifest, Selection
from weights.pace import Pace, Patience
from weights.publish import Folders
from weights.resolve import check_commit, check_repo

T = TypeVar("T")

WORKERS = 4
REPORT_SECONDS = 2.0
RATE_REPORTS = 6  # the rate is that of the last 10 s
# Room that the volume must have beyond what is missing.
SPARE_BYTES = 64 * 1024 * 1024
# After a failure, so long may the other threads take to finish their file.
FAREWELL_SECONDS = 3.0
DOWNLOADS = 2  # of a file whose bytes are wrong; then it is the Hub, and not the way from it


@dataclass(frozen=True)
class Wanted:
    """What to fetch. `chat`: there must be a chat template."""

    repo: str
    commit: str
    selection: Selection = field(default_factory=Selection)
    chat: bool = False

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
    if not root.is_dir():
        raise VolumeNotWritable(f"{root} is no folder", "mount the volume, or correct --root")
    try:
        # Another fetch may publish the commit under us, with other patterns perhaps: look again.
        while True:
            if hit := _hit(wanted, where):
                return hit
            if done := _Fetch(wanted, where, hub, reporter, patience).run():
                return done
            shutil.rmtree(where.staging, ignore_errors=True)
    except OSError as error:
        raise volume_error(error, where.published, wanted.place) from error


def _hit(wanted: Wanted, where: Folders) -> Fetched | None:
    """What is published, if it is just what is wanted and the sizes still match."""
    if not publish.is_published(where):
        return None
    found = _manifest(where.published)
    if found is None or found.selection != wanted.selection:
        return None
    if verify.damaged(where.published, found, hashes=False):
        return None
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
        self, wanted: Wanted, where: Folders, hub: Hub, reporter: Reporter, patience: Patience
    ) -> None:
        self.wanted = wanted
        self.where = where
        self.hub = hub
        self.reporter = reporter
        self.pace = Pace(patience, reporter)
        # A published folder that lacks or damaged a file is mended in place, file by file.
        self.target = where.published if publish.is_published(where) else where.staging
        self.total = 0
        self.settled: dict[str, int] = {}  # path -> bytes of files that are in their place
        self.history: deque[tuple[float, int]] = deque(maxlen=RATE_REPORTS)  # when, bytes so far
        self.busy: dict[str, float] = {}  # path -> since when
        self.seen = 0

    def run(self) -> Fetched | None:
        """Fetch and publish. None: another fetch was faster, look again."""
        try:
            publish.make(self.where.root, self.where.work)
            publish.beat(self.where.work)
            self._sweep()
            return self._run()
        except FileNotFoundError:
            if self.target == self.where.staging and publish.is_published(self.where):
                return None  # staging was renamed to the commit by another fetch
            raise
        finally:
            self.pace.stop()
            shutil.rmtree(self.where.work, ignore_errors=True)

    def _run(self) -> Fetched | None:
        wanted, place = self.wanted, self.wanted.place
        everything: list[File] = []
        self._each([place], lambda _: everything.extend(self._tree()))
        chosen = plan.choose(everything, wanted.selection, place)
        publish.make(self.where.root, self.target)
        self._check_space(chosen)
        self.total = sum(file.size for file in chosen)
        self._each(plan.first(chosen), self._obtain)
        chosen = plan.check_shards(chosen, everything, self.target, place)
        if wanted.chat:
            plan.check_chat([file.path for file in chosen], self.target, place)
        self.total = sum(file.size for file in chosen)
        self.reporter.progress(
            f"{len(chosen)} files, {amount(self.total)} of {place}",
            files=len(chosen),
            total_bytes=self.total,
        )
        self.history.append((time.monotonic(), self._bytes_here()))
        # The largest first: they decide when it ends.
        rest = [file for file in chosen if file.path not in self.settled]
        self._each(sorted(rest, key=lambda file: -file.size), self._obtain)
        self._report()
        verify.check_tensors(self.target, chosen, place)
        return self._publish(chosen)

    def _publish(self, chosen: tuple[File, ...]) -> Fetched | None:
        if self.target == self.where.staging:
            publish.tidy(self.target, chosen)
        elif before := _manifest(self.target):
            # Files of the earlier selection stay published.
            paths = {file.path for file in chosen}
            chosen += tuple(file for file in before.files if file.path not in paths)
        verify.check_readable(self.where.root, self.target)
        content = Manifest(
            repo=self.wanted.repo,
            commit=self.wanted.commit,
            files=tuple(sorted(chosen, key=lambda file: file.path)),
            selection=self.wanted.selection,
            read_bytes_per_s=round(verify.read_throughput(self.target, chosen)),
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if not publish.publish(self.where, self.target, content):
            return None
        return _fetched(self.where, content, hit=False)

    # -- one file -----------------------------------------------------------------------------

    def _tree(self) -> list[File]:
        place = self.wanted.place
        return self.pace.persist(
            lambda: list(hubs.tree(self.hub, self.wanted.repo, self.wanted.commit)),
            lambda error: hubs.understand(error, self.hub, place, resolved=True),
        )

    def _obtain(self, file: File) -> None:
        """See that the file lies verified in its place: keep it, or download it."""
        place = self.wanted.place.of(file.path)
        target = self.target / file.path
        self.busy[file.path] = time.monotonic()
        if verify.problem(target, file, self._hashed) is None:
            _check_format(target, place)
        else:
            self._download(file, place)
        del self.busy[file.path]
        self.settled[file.path] = file.size

    def _download(self, file: File, place: Place) -> None:
        work = self.where.work / "files"
        for attempt in range(1, DOWNLOADS + 1):
            path = self.pace.persist(
                lambda: hubs.download(self.hub, self.wanted.repo, self.wanted.commit, file, work),
                lambda error: hubs.understand(error, self.hub, place, resolved=True),
            )
            wrong = verify.problem(path, file, self._hashed)
            if wrong is None:
                _check_format(path, place)
                publish.settle(path, self.target, file.path)
                return
            path.unlink(missing_ok=True)
            if attempt < DOWNLOADS:
                self.reporter.progress(f"{place} {wrong}: downloading it again")
        raise WrongBytes(
            f"{place} {wrong}, in {DOWNLOADS} downloads",
            "something between the Hub and the Job changes bytes (a proxy, a mirror, memory, the "
            "volume): nothing of it was published; find it, then start again",
            place=place,
        )

    def _hashed(self, _: int) -> None:
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
        tick = min(REPORT_SECONDS, self.pace.patience.stall_s / 4)
        while workers and not failures:
            if finished.acquire(timeout=tick):
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
        done = self._bytes_here()
        if done != self.seen:
            self.seen = done
            self.pace.alive()
        waiting_for = ", ".join(list(self.busy)[:3]) or "the list of files"
        self.pace.check(self.wanted.place, waiting_for)
        self._report()
        publish.beat(self.where.work)
        self._sweep()

    def _bytes_here(self) -> int:
        """Bytes that have arrived so far: in place, and in the work folder."""
        here = sum(list(self.settled.values()))
        for folder, _, names in os.walk(self.where.work):
            for name in names:
                with suppress(OSError):  # moved or given up meanwhile
                    here += (Path(folder) / name).stat().st_size
        return min(here, self.total) if self.total else here

    def _report(self) -> None:
        if not self.total:
            return
        now, done = time.monotonic(), self._bytes_here()
        self.history.append((now, done))
        then, before = self.history[0]
        rate = (done - before) / (now - then) if now > then else 0.0
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
        for name in publish.sweep(self.where.work):
            self.reporter.progress(f"removed {name}, left by a fetch that was killed")

    def _check_space(self, chosen: Sequence[File]) -> None:
        """Raise NoSpace before the first byte if the volume can't hold what is missing."""
        missing = sum(
            file.size
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


def _check_format(path: Path, place: Place) -> None:
    if path.suffix == ".safetensors":
        verify.check_header(path, place)
