"""A part of a file that an ended fetch has left is gone on with, and nobody else writes to it."""

import hashlib
from pathlib import Path

from weights.manifest import File
from weights.part import Part
from weights.verify import CHUNK

CONTENT = bytes(range(256)) * (3 * CHUNK // 256) + b"and the rest"
FILE = File("w.safetensors", len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
LEFT = 2 * CHUNK + 5


def test_each_piece_that_is_copied_is_told(tmp_path: Path) -> None:
    """A large part takes longer than the watchdog waits for a sign of life."""
    left = tmp_path / "left"
    left.write_bytes(CONTENT[:LEFT])
    told: list[int] = []
    with Part(tmp_path / "work" / "w", FILE) as part:
        part.continue_from(left, told.append)
        assert told == [CHUNK, 2 * CHUNK, LEFT] and part.kept == part.tell() == LEFT
        part.write(CONTENT[LEFT:])
        assert part.problem is None
    assert part.path.read_bytes() == CONTENT


def test_who_was_taken_for_dead_can_not_write_to_it(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with left.open("wb", buffering=0) as awake, Part(tmp_path / "w", FILE) as part:
        awake.write(CONTENT[:LEFT])
        part.continue_from(left, lambda _: None)
        awake.write(b"its own next bytes")
        part.write(CONTENT[LEFT:])
        assert part.problem is None
    assert part.path.read_bytes() == CONTENT


def test_what_is_thrown_away_is_not_kept(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.write_bytes(b"damaged")
    with Part(tmp_path / "w", FILE) as part:
        part.continue_from(left, lambda _: None)
        part.restart()
        assert part.kept == part.tell() == 0
        part.write(CONTENT)
        assert part.problem is None
    assert part.path.read_bytes() == CONTENT
