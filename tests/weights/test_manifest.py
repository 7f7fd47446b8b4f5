"""The manifest comes back as it was written, and a damaged one is noticed."""

from pathlib import Path

import pytest

from weights import manifest
from weights.errors import Damaged
from weights.manifest import File, Manifest, Selection

FILES = (File("config.json", 3, git_sha1="1" * 40), File("w.safetensors", 5, sha256="2" * 64))


def make(files: tuple[File, ...] = FILES, at: str = "2026-01-01T00:00:00+00:00") -> Manifest:
    selection = Selection(allow=("*",), ignore=("x",), allow_pickle=True)
    return Manifest("org/name", "c" * 40, files, selection, 123.0, at, at, {"config.json": 7})


def test_it_comes_back(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    (tmp_path / manifest.NAME).write_text(make().dump())
    assert manifest.read(tmp_path) == make()
    assert make().bytes == 8


def test_the_digest_is_that_of_the_content_alone() -> None:
    assert make().digest == make(FILES[::-1], at="later").digest
    other = (FILES[0], File("w.safetensors", 5, sha256="3" * 64))
    assert make().digest != make(other).digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"size": 5', '"size": 6'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[]",
    ],
)
def test_a_damaged_one_is_noticed(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    (tmp_path / manifest.NAME).write_text(damage(make().dump()))
    with pytest.raises(Damaged, match=r"MANIFEST\.json"):
        manifest.read(tmp_path)
