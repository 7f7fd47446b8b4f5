"""What the documents tell people to type exists, and does what it says."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._config import process_config
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import UserDefinedDagsterK8sConfig

from assets.promotion import BRING_BACK_S
from k8s.transport import RETRY_S

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text() for path in DOCS)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "ui", "lab"} <= named
    assert named <= targets


def test_make_alone_prints_every_target() -> None:
    outer = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")  # as these tests run under `make test` themselves
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    out = subprocess.run(
        ["make"], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == {line.split()[1] for line in out.splitlines()}


def test_every_file_and_folder_named_exists() -> None:
    folders = "pipelines|assets|k8s|loadtests|weights|catalog|lab|tests|docs|images"
    named = set(re.findall(rf"`?((?:{folders})/[\w./-]*)", TEXT))
    ours = {name for name in named if not re.search(r"mine\.yaml", name)}
    assert ours
    assert [name for name in sorted(ours) if not (ROOT / name.rstrip(".")).exists()] == []


@pytest.mark.parametrize(
    "arguments",
    sorted(
        set(
            re.findall(
                r"python -m k8s ((?:render|platform|importer) [\w. -]+?)(?=  | \||$)", TEXT, re.M
            )
        )
    ),
)
def test_commands_that_need_no_cluster_work(arguments: str) -> None:
    words = ["lab" if word == "mine" else word for word in arguments.split()]
    out = subprocess.run(
        [sys.executable, "-m", "k8s", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(obj["kind"] for obj in yaml.safe_load_all(out))


def test_the_run_launcher_of_the_docs_is_valid_to_dagster_k8s() -> None:
    block = re.search(r"^    run_launcher:\n(?:      .*\n)+", TEXT, re.MULTILINE)
    assert block
    launcher: dict[str, Any] = yaml.safe_load(textwrap.dedent(block[0]))["run_launcher"]
    assert (launcher["module"], launcher["class"]) == ("dagster_k8s", K8sRunLauncher.__name__)
    checked = process_config(
        K8sRunLauncher.config_type(),  # type: ignore[no-untyped-call]
        launcher["config"],
    )
    assert checked.success, checked.errors
    assert checked.value
    raw = launcher["config"]["run_k8s_config"]
    pod = UserDefinedDagsterK8sConfig.from_dict(raw).pod_spec_config  # type: ignore[no-untyped-call]
    # As long as clearing up may take, with what it waits for in the cluster.
    assert pod["termination_grace_period_seconds"] >= BRING_BACK_S + RETRY_S + 60
