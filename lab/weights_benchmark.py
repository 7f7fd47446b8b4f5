"""`make weights-benchmark`: download, verify and publish, against `hf download` of the same bytes.

Both fetch from the lab's hub on this machine, in turn, and with their own number of workers; the
hub's files are in the page cache. `hf download` verifies nothing and leaves its bytes to the page
cache; what it takes until they are on the disk is given beside it. Exit status 1 if a limit is
missed. Needs 14 GB of disk for a while.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.hub import Hub

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".benchmarks"
MB = 1_000_000
REPEATS = 3
# What must be reached.
SPEED = 0.95  # of hf download's
PEAK_BYTES = 300 * MB
HIT_SECONDS = 1.0
HIT_FILES = 1000
SCENARIOS = {
    "one file of 4 GB": [4000 * MB],
    "30 files of 150 MB": [150 * MB] * 30,
    "2,000 small files": [1 * MB] + [8_000] * 1999,
}


@dataclass(frozen=True)
class Run:
    """One fetch. `durable_seconds`: until everything is on the disk, too."""

    scenario: str
    tool: str
    seconds: float
    durable_seconds: float
    cpu_seconds: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it, prints a table, leaves .benchmarks/weights.json."""
    parser = argparse.ArgumentParser(prog="python -m lab.weights_benchmark", description=__doc__)
    parser.add_argument("--only", choices=["one", "30", "2,000", "hit"], help="one scenario")
    only = parser.parse_args(argv).only or ""
    OUT.mkdir(exist_ok=True)
    runs: list[Run] = []
    missed: list[str] = []
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        folder = Path(scratch)
        for name, sizes in SCENARIOS.items():
            if name.startswith(only):
                measured = compare(folder, name, sizes)
                runs += measured
                missed += judge(name, sum(sizes), measured)
        hits = hit_seconds(folder) if only in ("", "hit") else []
    if hits:
        print(f"{HIT_FILES} files that are there: {statistics.median(hits):.2f} s")
        if statistics.median(hits) > HIT_SECONDS:
            missed.append(f"{HIT_FILES} files that are there take more than {HIT_SECONDS:g} s")
    result = {"runs": [asdict(run) for run in runs], "hit_seconds": hits, "missed": missed}
    (OUT / "weights.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(f"MISSED: {what}" for what in missed) or "all limits are kept")
    return 1 if missed else 0


def compare(folder: Path, name: str, sizes: Sequence[int]) -> list[Run]:
    """Both tools in turn, REPEATS times each."""
    print(f"{name}: makes {sum(sizes) / MB:,.0f} MB", flush=True)
    with hub(folder, sizes) as (url, commit):
        runs = []
        for repeat in range(REPEATS):
            pair = [("hf download", hf(commit)), ("weights", ours(commit))]
            for tool, command in pair if repeat % 2 else reversed(pair):
                run = measure(name, tool, command, folder / "volume", url)
                print(
                    f"  {tool:12} {run.seconds:6.1f} s, on the disk {run.durable_seconds:6.1f} s, "
                    f"CPU {run.cpu_seconds:6.1f} s, peak {run.peak_bytes / MB:4.0f} MB",
                    flush=True,
                )
                runs.append(run)
    return runs


def judge(name: str, size: int, runs: Sequence[Run]) -> list[str]:
    """Prints the medians. Returns what was missed."""

    def median(tool: str, field: str) -> float:
        return float(statistics.median(getattr(r, field) for r in runs if r.tool == tool))

    ratio = median("hf download", "seconds") / median("weights", "seconds")
    durable = median("hf download", "durable_seconds") / median("weights", "durable_seconds")
    peak = max(run.peak_bytes for run in runs if run.tool == "weights")
    print(
        f"{name}: {size / MB / median('weights', 'seconds'):.0f} MB/s, {ratio:.2f} × the speed of "
        f"hf download ({durable:.2f} × until all is on the disk), peak {peak / MB:.0f} MB\n"
    )
    missed = []
    if ratio < SPEED:
        missed.append(f"{name}: {ratio:.2f} × the speed of hf download, less than {SPEED:g}")
    if peak > PEAK_BYTES:
        missed.append(f"{name}: {peak / MB:.0f} MB of memory, more than {PEAK_BYTES / MB:.0f}")
    return missed


def hit_seconds(folder: Path) -> list[float]:
    """What a fetch takes, from the start of its process, when all is there."""
    with hub(folder, [1 * MB] + [1000] * (HIT_FILES - 1)) as (url, commit):
        volume = folder / "volume"
        volume.mkdir()
        run([*ours(commit), "--root", str(volume)], volume, url)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            run([*ours(commit), "--root", str(volume)], volume, url)
            seconds.append(round(time.perf_counter() - started, 3))
        shutil.rmtree(volume)
    return seconds


def ours(commit: str) -> list[str]:
    """Our command, but for the volume."""
    return [sys.executable, "-m", "weights", "fetch", "--repo", "lab/model", "--commit", commit]


def hf(commit: str) -> list[str]:
    """The client's own, as its users call it."""
    program = str(Path(sys.executable).with_name("hf"))
    return [program, "download", "lab/model", "--revision", commit]


def measure(name: str, tool: str, command: list[str], volume: Path, url: str) -> Run:
    """One fetch to an empty folder, on a quiet disk."""
    volume.mkdir()
    os.sync()
    place = ["--root", str(volume)] if tool == "weights" else ["--local-dir", str(volume)]
    started = time.perf_counter()
    usage = run([*command, *place], volume, url)
    seconds = time.perf_counter() - started
    os.sync()
    durable = time.perf_counter() - started
    shutil.rmtree(volume)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(
        name, tool, round(seconds, 2), round(durable, 2), round(cpu, 2), usage.ru_maxrss * 1024
    )


def run(command: Sequence[str], volume: Path, url: str) -> resource.struct_rusage:
    """Ends the program if the fetch fails."""
    log = volume.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(url, volume), stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        sys.exit(f"{' '.join(command)}: status {status}\n{log.read_text()[-2000:]}")
    return usage


def environment(url: str, volume: Path) -> Mapping[str, str]:
    """The same for both."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return {**clean, **quiet, "HF_ENDPOINT": url, "HF_HOME": str(volume.with_suffix(".home"))}


@contextmanager
def hub(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[str, str]]:
    """A hub in a process of its own, with a repository of files of these sizes: URL, commit."""
    root, made = folder / "hub", folder / "made"
    made.mkdir()
    files = {}
    for number, size in enumerate(sizes):
        kind = "safetensors" if size >= MB else "json"
        path = made / f"{number:04}.{kind}"
        write_file(path, size)
        files[path.name] = path
    commit = Hub(root).commit("lab/model", files)
    server = subprocess.Popen(
        [sys.executable, "-m", "lab.hub", "--root", str(root), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None, "a pipe was asked for"
        yield server.stdout.readline().split()[2], commit
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(root)
        shutil.rmtree(made)


def write_file(path: Path, size: int) -> None:
    """A right safetensors file from 1 MB on, else just bytes; no two are equal."""
    with path.open("wb") as out:
        if size >= MB:
            room = size - 8 - 256
            tensor = {"dtype": "U8", "shape": [room], "data_offsets": [0, room]}
            header = json.dumps({"t": tensor}).encode().ljust(256)
            out.write(struct.pack("<Q", len(header)) + header)
        block = os.urandom(min(size, 16 * MB))
        while (left := size - out.tell()) > 0:
            out.write(block[:left])


if __name__ == "__main__":
    sys.exit(main())
