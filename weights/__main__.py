"""`python -m weights resolve|fetch|verify|list|collect|pack|import`: see --help of each.

On a terminal it talks to a person; elsewhere it prints one JSON event a line: progress, then
result, or error and exit status 1, or 2 for wrong usage. HF_TOKEN and HF_ENDPOINT come from the
environment.
"""

import argparse
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TextIO

from weights import adapter, archive, collect, verify, volume
from weights.errors import (
    Damaged,
    Interrupted,
    Place,
    ReaderGone,
    Unsaid,
    UsageError,
    WeightsError,
)
from weights.events import Reporter, amount, secrets_of
from weights.fetch import Wanted, fetch
from weights.hub import Hub, connect
from weights.manifest import Manifest, Selection
from weights.pace import Pace, Patience
from weights.plan import ADAPTER_CONFIG
from weights.resolve import check_commit, check_repo, resolve


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run one command. Returns 0, or after an error event 1, 2 if it is of usage as argparse's."""
    options = _parser().parse_args(argv)
    # A tar on stdout leaves stderr to the events.
    out = out or (sys.stderr if getattr(options, "out", "") == archive.STDIO else sys.stdout)
    secrets = secrets_of(os.environ.get("HF_TOKEN"), os.environ.get("HF_ENDPOINT", ""))
    reporter = Reporter(out, human=out.isatty(), secrets=secrets)
    command: Callable[[argparse.Namespace, Reporter], None] = options.command
    try:
        command(options, reporter)
    except WeightsError as error:
        _say(error, reporter)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        # A fault of this program. The trace goes to the log, without the token.
        sys.stderr.write(reporter.redact(traceback.format_exc()))
        fault = WeightsError(
            f"{type(error).__name__}: {error}",
            "this is a fault of the program: report it with the trace in the Job's log",
        )
        _say(fault, reporter)
        return 1
    return 0


def _say(error: WeightsError, reporter: Reporter) -> None:
    try:
        reporter.error(error)
    except ReaderGone:
        pass  # who would have read it has gone, `head` for one
    except Unsaid as unsaid:
        with suppress(OSError):
            reason = "" if isinstance(error, Unsaid) else reporter.redact(f" ({error})")
            sys.stderr.write(f"{unsaid}{reason}. Next: {unsaid.next_step}\n")


def _resolve(options: argparse.Namespace, reporter: Reporter) -> None:
    pace = Pace(_patience(options), reporter)
    commit = resolve(_hub(reporter), options.repo, options.revision, pace)
    reporter.result(repo=options.repo, revision=options.revision, commit=commit)


def _fetch(options: argparse.Namespace, reporter: Reporter) -> None:
    if options.adapter_of:
        _fetch_adapter(options, reporter)
        return
    selection = Selection(
        tuple(options.allow), tuple(options.ignore), allow_pickle=options.allow_pickle
    )
    wanted = _wanted(options, selection)
    fetched = fetch(wanted, options.root, _hub(reporter), reporter, _patience(options))
    reporter.result(**asdict(fetched))


def _wanted(options: argparse.Namespace, selection: Selection) -> Wanted:
    if not options.rehash_after_days >= 0:  # nor NaN
        raise UsageError(
            f"--rehash-after-days {options.rehash_after_days:g} is no age", "give days, 0 or more"
        )
    return Wanted(
        options.repo,
        options.commit,
        selection,
        chat=options.chat,
        rehash=options.rehash,
        rehash_after_days=options.rehash_after_days,
    )


def _fetch_adapter(options: argparse.Namespace, reporter: Reporter) -> None:
    repo, _, commit = options.adapter_of.partition("@")
    try:
        check_repo(repo)
        check_commit(commit)
    except UsageError as error:
        raise UsageError(
            f"--adapter-of {options.adapter_of}: {error}", "give it as repository@commit"
        ) from None
    # Before anything is downloaded. Compared with nothing, an adapter of another model would pass.
    base, _ = volume.published(options.root, repo, commit)
    if options.allow or options.ignore or options.allow_pickle or options.chat:
        raise UsageError(
            "--allow, --ignore, --allow-pickle and --chat are for models",
            "leave them out: an adapter is just two files",
        )
    wanted = _wanted(options, Selection(adapter=True))
    fetched = fetch(wanted, options.root, _hub(reporter), reporter, _patience(options))
    found = adapter.check(Path(fetched.path), base, wanted.place, Place(repo, commit))
    reporter.progress(
        f"{wanted.place} has rank {found.rank} and changes {found.modules} modules, of which "
        f"{found.compared} were compared with {repo}; its {ADAPTER_CONFIG} says that it is for "
        f"{found.base_model or 'no model'}"
    )
    reporter.result(**asdict(fetched), **asdict(found))


def _verify(options: argparse.Namespace, reporter: Reporter) -> None:
    folder, found = volume.published(options.root, options.repo, options.commit)
    damaged = verify.damaged(folder, found, hashes=not options.sizes_only)
    if damaged:
        raise Damaged(
            f"{folder}: " + "; ".join(f"{path} {why}" for path, why in damaged.items()),
            "fetch the commit again: only what is damaged is downloaded",
        )
    reporter.result(
        path=str(folder), files=len(found.files), bytes=found.bytes, manifest_digest=found.digest
    )


def _list(options: argparse.Namespace, reporter: Reporter) -> None:
    found = volume.scan(options.root)
    for commit in found.published:
        content = commit.manifest
        reporter.progress(
            f"{content.repo}@{content.commit}: {len(content.files)} files, "
            f"{amount(content.bytes)}, published {content.published_at}"
        )
    foreign = list(found.foreign.items())
    if foreign and not found.published:
        reporter.progress(f"nothing is published in {options.root}: is it the volume?")
    reporter.result(
        published=[_row(commit.folder, commit.manifest) for commit in found.published],
        unfinished=[str(left.folder) for left in found.leftovers],
        # Bounded: of a folder that isn't the volume it is all that lies there.
        foreign={str(path): why for path, why in foreign[: collect.SHOWN]},
        foreign_not_shown=max(0, len(foreign) - collect.SHOWN),
    )


def _collect(options: argparse.Namespace, reporter: Reporter) -> None:
    wanted = collect.policy(options.keep, options.older_than, options.free)
    reporter.result(
        **asdict(collect.collect(options.root, wanted, reporter, dry_run=options.dry_run))
    )


def _pack(options: argparse.Namespace, reporter: Reporter) -> None:
    packed = archive.pack(options.root, options.repo, options.commit, options.out, reporter)
    reporter.result(**asdict(packed))


def _import(options: argparse.Namespace, reporter: Reporter) -> None:
    taken = archive.take(options.source, options.root, reporter, _stall_s(options))
    reporter.result(**asdict(taken))


def _row(folder: Path, found: Manifest) -> dict[str, object]:
    return {
        "path": str(folder),
        "repo": found.repo,
        "commit": found.commit,
        "files": len(found.files),
        "bytes": found.bytes,
        "published_at": found.published_at,
    }


def _hub(reporter: Reporter) -> Hub:
    hub = connect(os.environ)
    reporter.hide(hub.token)  # it may come from the login of a terminal
    return hub


def _patience(options: argparse.Namespace) -> Patience:
    if options.attempts < 1:
        raise UsageError(f"--attempts {options.attempts} asks nothing of the Hub", "give 1 or more")
    return Patience(stall_s=_stall_s(options), attempts=options.attempts)


def _stall_s(options: argparse.Namespace) -> float:
    seconds: float = options.stall_seconds
    if not 0 < seconds < math.inf:  # nor NaN
        raise UsageError(
            f"--stall-seconds {seconds:g} is no time to wait", "give seconds, more than 0"
        )
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m weights", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Callable[..., None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(command=run)
        return command

    def add_hub(command: argparse.ArgumentParser) -> None:
        default = Patience()
        command.add_argument("--repo", required=True, help="organisation/name on the Hub")
        command.add_argument(
            "--stall-seconds",
            type=float,
            default=default.stall_s,
            help="give up after so long without a byte",
        )
        command.add_argument(
            "--attempts", type=int, default=default.attempts, help="tries of one request"
        )

    def add_place(command: argparse.ArgumentParser) -> None:
        command.add_argument("--commit", required=True, help="40 hex digits")
        command.add_argument("--root", type=Path, required=True, help="the mounted volume")

    command = add("resolve", _resolve, "print the commit of a branch, tag or short commit")
    add_hub(command)
    command.add_argument("--revision", required=True)
    command = add("fetch", _fetch, "download, verify and publish a commit")
    add_hub(command)
    add_place(command)
    command.add_argument("--allow", action="append", default=[], help="only files like this")
    command.add_argument("--ignore", action="append", default=[], help="no files like this")
    command.add_argument("--allow-pickle", action="store_true", help="loading one runs its code")
    command.add_argument("--chat", action="store_true", help="there must be a chat template")
    command.add_argument(
        "--rehash", action="store_true", help="read again all of what is published already"
    )
    command.add_argument(
        "--rehash-after-days",
        type=float,
        default=math.inf,
        metavar="DAYS",
        help="read it again if the last time is so long ago; else sizes and mtimes are compared",
    )
    command.add_argument(
        "--adapter-of",
        metavar="REPO@COMMIT",
        help="it is a LoRA adapter of that model, which is published already",
    )
    command = add("verify", _verify, "compare a published commit with its manifest")
    command.add_argument("--repo", required=True)
    add_place(command)
    command.add_argument("--sizes-only", action="store_true", help="don't read the files")
    command = add("list", _list, "what is published and what is unfinished on the volume")
    command.add_argument("--root", type=Path, required=True)
    command = add("collect", _collect, "remove commits that nobody needs, by age and by space")
    command.add_argument("--root", type=Path, required=True)
    command.add_argument(
        "--keep", nargs="+", action="extend", required=True, metavar="repo@commit",
        help="what is live, what a rollback needs: stays, whatever its age",
    )  # fmt: skip
    command.add_argument(
        "--older-than", type=float, metavar="DAYS", help="remove what was last used before that"
    )
    command.add_argument(
        "--free", metavar="SIZE", help="remove the oldest until so much is free: 50GiB, 50GB, bytes"
    )
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    command = add(
        "pack", _pack, "write a published commit as a tar, for a cluster without a way out"
    )
    command.add_argument("--repo", required=True)
    add_place(command)
    command.add_argument("--out", required=True, help="a file, or - for stdout")
    command = add("import", _import, "publish a commit that was packed elsewhere, verified")
    command.add_argument(
        "--from", dest="source", required=True, help="its tar, - for one on stdin, or its folder"
    )
    command.add_argument("--root", type=Path, required=True, help="the mounted volume")
    command.add_argument(
        "--stall-seconds",
        type=float,
        default=archive.STALL_S,
        help="give up after so long without a byte on stdin",
    )
    return parser


def _interrupt(number: int, _: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the first is enough: let the end be told
    raise Interrupted(
        f"interrupted by {signal.Signals(number).name}", "start again: finished files are kept"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # said already, if it can be said
            stream.flush()
    os._exit(status)  # threads that hang in the client are not waited for
