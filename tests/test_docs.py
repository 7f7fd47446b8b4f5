"""What the documents tell people to type exists, and does what it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._config import process_config
from dagster._core.instance.config import dagster_instance_config
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import DagsterK8sJobConfig, construct_dagster_k8s_job
from dagster_k8s.job import UserDefinedDagsterK8sConfig as RunConfig
from kubernetes.client import ApiClient

from assets.promotion import BRING_BACK_S
from k8s.transport import RETRY_S
from loadtests.profile import parse_profile
from pipelines.definitions import defs
from weights.__main__ import _parser as weights_parser

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text() for path in DOCS)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4,}|`)make\s([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "ui", "lab", "venv"} <= named
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
    named = set(re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*)", TEXT))
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
    words = ["eks-example" if word == "mine" else word for word in arguments.split()]
    out = subprocess.run(
        [sys.executable, "-m", "k8s", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(obj["kind"] for obj in yaml.safe_load_all(out))


def test_commands_of_weights_are_understood() -> None:
    found = re.findall(r"python -m weights ((?:[^\n`]*\\\n)*[^\n`]*)", TEXT)
    assert len(found) >= 7
    for command in found:
        words = shlex.split(command.replace("\\\n", " ").partition(" < ")[0])
        assert weights_parser().parse_args([word for word in words if word != "…"])


def test_every_flag_of_the_locustfile_is_in_the_docs_and_none_else() -> None:
    """By Locust's own parser, in a process of its own: its import patches sockets."""
    text = (ROOT / "docs" / "traffic.md").read_text()
    program = """
import json, shlex, sys
from locust.argument_parser import get_parser
known = {flag for action in get_parser()._actions for flag in action.option_strings}
import loadtests.locustfile
parser = get_parser()
ours = {flag for action in parser._actions for flag in action.option_strings} - known
for command in json.load(sys.stdin):
    parser.parse_args(shlex.split(command, comments=True)[1:])
json.dump([sorted(known), sorted(ours)], sys.stdout)
"""
    commands = re.findall(r"^    (locust .*)", text, re.MULTILINE)
    assert commands
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    known, ours = json.loads(ran.stdout)
    named = {f for f in re.findall(r"`(--[a-z0-9-]+)", text) if f not in known}
    assert named == set(ours) - {"--json-events"}  # that one is for programs


def test_the_profile_of_the_docs_is_one() -> None:
    block = re.search(r"^    \{\n(?:      .*\n)+    \}", TEXT, re.MULTILINE)
    assert block
    assert parse_profile(block[0]).ladder == (1, 2, 4)


def test_run_config_of_the_docs_fits_a_job() -> None:
    jobs = {"model_revision": "promote", "model_weights": "promote", "collect_weights": "collect"}
    found = re.findall(r"(?:^    |`)(ops: .*?\}\}\})", TEXT, re.MULTILINE)
    assert len(found) == len(jobs)
    for text in found:
        config = yaml.safe_load(text)
        (op,) = config["ops"]
        job = defs.resolve_job_def(jobs[op])
        assert dg.validate_run_config(job, config)


def test_the_dagster_yaml_of_the_docs_is_valid(tmp_path: Path) -> None:
    block = re.search(r"^    storage:\n(?:     .*\n|    \w.*\n)+", TEXT, re.MULTILINE)
    assert block
    (tmp_path / "dagster.yaml").write_text(textwrap.dedent(block[0]))
    config, _ = dagster_instance_config(str(tmp_path))
    launcher = config["run_launcher"]
    assert (launcher["module"], launcher["class"]) == ("dagster_k8s", K8sRunLauncher.__name__)
    checked = process_config(
        K8sRunLauncher.config_type(),  # type: ignore[no-untyped-call]
        launcher["config"],
    )
    assert checked.success, checked.errors
    assert checked.value
    # As long as clearing up may take, with what it waits for in the cluster.
    grace = run_pod(launcher["config"])["terminationGracePeriodSeconds"]
    assert grace >= BRING_BACK_S + RETRY_S + 60
    monitoring = config["run_monitoring"]
    assert monitoring["enabled"]
    assert monitoring["max_resume_run_attempts"] == 0
    assert monitoring["cancel_timeout_seconds"] > grace


def run_pod(config: dict[str, Any]) -> dict[str, Any]:
    """The Pod that Dagster makes for a run, as the API gets it."""
    job = construct_dagster_k8s_job(
        DagsterK8sJobConfig(job_image=config["job_image"], dagster_home=config["dagster_home"]),
        args=["dagster"],
        job_name="run",
        user_defined_k8s_config=RunConfig.from_dict(config["run_k8s_config"]),  # type: ignore[no-untyped-call]
    )
    pod = ApiClient().sanitize_for_serialization(job)["spec"]["template"]["spec"]
    return dict(pod)


IMAGES = {
    "jobs.Containerfile": ["weights.__main__", "loadtests.__main__", "loadtests.locustfile"],
    "pipeline.Containerfile": ["pipelines.definitions", "k8s.__main__"],
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_has_what_its_programs_import(name: str, tmp_path: Path) -> None:
    text = (ROOT / "images" / name).read_text()
    assert f"-f images/{name}" in TEXT
    copied = re.findall(r"^COPY (\S+) (\S+)$", text, re.MULTILINE)
    assert copied
    for source, target in copied:
        if target.startswith("/app/"):
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, tmp_path / target.removeprefix("/app/"))
        else:
            assert (ROOT / source).is_file()
    for module in IMAGES[name]:
        subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            check=True,
        )


def pins(lock: str) -> dict[str, str]:
    """Package: version."""
    text = (ROOT / lock).read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", ["requirements.lock", "pipeline-requirements.lock"])
def test_an_image_has_the_versions_that_are_tested(lock: str) -> None:
    tested, built = pins("requirements.lock"), pins(f"images/{lock}")
    extra = {"dagster-postgres", "psycopg2-binary"} if lock.startswith("pipeline") else set()
    assert built.keys() - tested.keys() == extra
    assert {name: built[name] for name in built.keys() - extra}.items() <= tested.items()


def test_the_pipelines_image_has_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[=<>]", one)[0].replace("_", "-") for one in project["dependencies"]}
    assert names <= pins("images/pipeline-requirements.lock").keys()
