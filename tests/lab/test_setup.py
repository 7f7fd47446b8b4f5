"""The set-up's own part, without what it installs."""

import hashlib
from pathlib import Path

import pytest

from lab import setup, system_packages
from lab.programs.errors import SetupError


def test_venv_alone_needs_nothing_of_a_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = hashlib.sha256(b"".join(lock.read_bytes() for lock in setup.LOCKS)).hexdigest()
    (tmp_path / ".installed").write_text(wanted)
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(system_packages, "problems", lambda: ["it needs root"])
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr("sys.argv", ["lab.setup", "--venv"])
    setup.main()
    monkeypatch.setattr("sys.argv", ["lab.setup"])
    with pytest.raises(SystemExit, match="the lab can't be set up here:\n  - it needs root"):
        setup.main()


def test_a_python_that_can_make_no_venv_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SetupError, match=f"{python} lacks .* python3-venv.* PYTHON="):
        setup.make_venv()
