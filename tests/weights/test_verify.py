"""Hashes as git and the Hub make them, safetensors headers, readable modes."""

import hashlib
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.weights.conftest import index, tensors
from weights import verify
from weights.errors import BrokenSafetensors, MissingShard, Place, Unreadable
from weights.manifest import File

PLACE = Place("org/name", "c" * 40)


def test_git_sha1_is_gits_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"content\n" * 1000)
    git = subprocess.run(
        ["git", "hash-object", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    file = File("config.json", 8000, git_sha1=git)
    assert verify.problem(path, file) is None
    path.write_bytes(b"Content\n" + b"content\n" * 999)
    assert "the Hub's tree has git-sha1:" + git in str(verify.problem(path, file))


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    file = File("w", 4, sha256=hashlib.sha256(b"good").hexdigest())
    path = tmp_path / "w"
    assert verify.problem(path, file) == "is missing"
    path.write_bytes(b"goo")
    assert verify.problem(path, file) == "has 3 bytes, the Hub's tree has 4"
    path.write_bytes(b"bad!")
    assert "sha256:" in str(verify.problem(path, file))
    path.write_bytes(b"good")
    assert verify.problem(path, file) is None
    (tmp_path / "other").write_bytes(b"good")
    path.unlink()
    path.symlink_to("other")
    assert verify.problem(path, file) == "is no plain file"


def test_a_good_safetensors_file_gives_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors("a", "b", size=3))
    assert verify.check_header(path, PLACE) == {"a", "b"}


def broken(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header would have 0 bytes"),
        (broken(b"{}", length=1 << 60), "header would have"),
        (broken(b"{nope"), "can't be read"),
        (broken(b"[]"), "no object"),
        (broken({"a": tensor(0, 8, [2])}, b"1234"), "tensors end at 8, the data at 4"),
        (broken({"a": tensor(0, 4, [2])}, b"1234"), "F32 [2], has 4 bytes"),
        (broken({"a": tensor(4, 8, [1])}, b"12345678"), "begins at 4, not at 0"),
        (
            broken({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, b"1234"),
            "tensor b begins at 0, not at 4",
        ),
        (broken({"a": tensor(4, 0, [1])}, b"1234"), "has -4 bytes"),
        (broken({"a": tensor(0, 4, [-1])}, b"1234"), "shape [-1]"),
        (broken({"a": {"dtype": "F32"}}, b""), "can't be read"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BrokenSafetensors) as refused:
        verify.check_header(path, PLACE)
    assert why in str(refused.value)


def test_a_type_newer_than_the_table_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken({"a": tensor(0, 4, [7], "F7_NEW")}, b"1234"))
    assert verify.check_header(path, PLACE) == {"a"}


def test_a_tensor_that_the_index_promises_must_be_in_its_shard(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(tensors("a"))
    (tmp_path / "model.safetensors.index.json").write_bytes(index(a="x.safetensors"))
    there = [File("model.safetensors.index.json", 1, git_sha1="0" * 40)]
    verify.check_tensors(tmp_path, there, PLACE)
    (tmp_path / "model.safetensors.index.json").write_bytes(
        index(a="x.safetensors", b="x.safetensors")
    )
    with pytest.raises(MissingShard, match=r"b is in x\.safetensors"):
        verify.check_tensors(tmp_path, there, PLACE)


def test_what_the_server_could_not_read_is_named_with_mode_and_owner(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True, mode=0o755)
    for path in (tmp_path, folder.parent, folder):
        path.chmod(0o755)
    file = folder / "w"
    file.write_bytes(b"")
    file.chmod(0o644)
    verify.check_readable(tmp_path, folder)
    file.chmod(0o600)
    with pytest.raises(Unreadable, match=r"w has mode 0600 and owner uid \d+"):
        verify.check_readable(tmp_path, folder)
    file.chmod(0o644)
    folder.parent.chmod(0o700)
    with pytest.raises(Unreadable, match="org has mode 0700"):
        verify.check_readable(tmp_path, folder)
    folder.parent.chmod(0o755)
    tmp_path.chmod(0o2770)  # as fsGroup leaves a volume
    verify.check_readable(tmp_path, folder)
    tmp_path.chmod(0o700)
    with pytest.raises(Unreadable, match="mode 0700"):
        verify.check_readable(tmp_path, folder)
    tmp_path.chmod(0o755)


def test_read_throughput_is_a_number_of_bytes_per_second(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"x" * 1_000_000)
    assert verify.read_throughput(tmp_path, [File("w", 1_000_000)]) > 1_000_000
