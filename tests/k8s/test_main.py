"""The command line: python -m k8s render, diff, platform."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from catalog import ClusterSpec, ModelSpec
from catalog.load import Catalog, catalog
from k8s import __main__ as cli
from k8s import manifests, slots
from k8s.client import Client
from k8s.manifests import Release
from tests.k8s.apiserver import ApiServer
from tests.k8s.manifests import rendered
from tests.k8s.test_rollout import cluster, model
from tests.k8s.web_server import answering

__all__ = ["cluster", "model"]

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def lab_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOTION_CLUSTER", raising=False)


def test_platform(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["platform", "--cluster", "eks-example"]) == 0
    kinds = [obj["kind"] for obj in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds[0] == "Namespace"
    assert {"PersistentVolumeClaim", "ClusterRole", "NetworkPolicy", "PodMonitor"} <= set(kinds)


def test_importer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["importer", "--cluster", "gke-example"]) == 0
    [pod] = yaml.safe_load_all(capsys.readouterr().out)
    cluster = catalog().cluster("gke-example")
    assert pod["metadata"]["namespace"] == cluster.namespace
    volume = pod["spec"]["volumes"][0]["persistentVolumeClaim"]
    assert volume == {"claimName": cluster.storage.claim}, "and may be written"
    assert pod["spec"]["activeDeadlineSeconds"] > 0


def test_render(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["render", "llama-3.1-8b-instruct", "--cluster", "gke-example", "--commit", "b" * 40]
    assert cli.main(args) == 0
    objects = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [obj["kind"] for obj in objects] == [
        *("Deployment", "PodDisruptionBudget", "Service", "ScaledObject"),
        *("Job", "Job", "ConfigMap", "Job"),
    ]
    programs = [
        obj["spec"]["template"]["spec"]["containers"][0]["command"][2:4]
        for obj in objects
        if obj["kind"] == "Job"
    ]
    assert programs == [["weights", "resolve"], ["weights", "fetch"], ["loadtests", "--profile"]]
    assert "b" * 40 in objects[0]["spec"]["template"]["spec"]["containers"][0]["args"][0]


def test_who_reads_no_further_sees_no_trace() -> None:
    """As in `python -m k8s render … | head -1`."""
    command = [sys.executable, "-m", "k8s", "render", "smollm2-135m", "--cluster", "lab"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (said, process.returncode) == ("", 128 + signal.SIGPIPE)


def test_adapters_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rendered.with_adapters()
    changed = Catalog({model.name: model}, catalog().clusters)
    monkeypatch.setattr(cli, "catalog", lambda: changed)
    assert cli.main(["render", model.name]) == 0
    objects = list(yaml.safe_load_all(capsys.readouterr().out))
    [engine] = objects[0]["spec"]["template"]["spec"]["containers"]
    assert f"sql=/models/lab/smollm2-135m-lora/{'0' * 40}" in engine["args"]
    commands = [
        obj["spec"]["template"]["spec"]["containers"][0]["command"][3:]
        for obj in objects
        if obj["kind"] == "Job"
    ]
    assert [c[:3] for c in commands[2:6]] == [
        ["resolve", "--repo", "lab/smollm2-135m-lora"],
        ["fetch", "--repo", "lab/smollm2-135m-lora"],
    ] * 2
    assert commands[3][-1] == f"--adapter-of={model.repo}@{'0' * 40}"


@pytest.mark.parametrize(
    ("variable", "args", "namespace"),
    [
        (None, [], "llm"),
        ("gke-example", [], "llm-serving"),
        ("gke-example", ["--cluster", "lab"], "llm"),
    ],
)
def test_the_cluster_is_that_of_the_environment(
    variable: str | None,
    args: list[str],
    namespace: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable:
        monkeypatch.setenv("PROMOTION_CLUSTER", variable)
    assert cli.main(["platform", *args]) == 0
    first = next(yaml.safe_load_all(capsys.readouterr().out))
    assert first["metadata"]["name"] == namespace


def test_a_job_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["diff", "smollm2-135m", "--kind", "Job"])
    assert error.value.code == 2
    assert "invalid choice: 'Job'" in capsys.readouterr().err


def test_render_one_kind_of_the_other_slot(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "smollm2-135m", "--kind", "Service", "--slot", "green"]) == 0
    [service] = yaml.safe_load_all(capsys.readouterr().out)
    assert service["spec"]["selector"]["vllm-promotion.io/slot"] == "green"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["render", "no-such"], "no model 'no-such' in the catalog"),
        (["render", "smollm2-135m", "--cluster", "no-such"], "no cluster 'no-such'"),
        (["render", "qwen2.5-32b-instruct", "--cluster", "lab"], "no node pool of cluster lab"),
        (["render", "qwen2.5-32b-instruct", "--cluster", "lab"], "Another cluster: --cluster NAME"),
        (["render", "smollm2-135m", "--commit", "main"], "40 hex digits"),
        (["render", "smollm2-135m", "--commit", ""], "--commit '': write its 40 hex digits"),
        (["diff", "smollm2-135m", "--commit", ""], "--commit '': write its 40 hex digits"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert not [line for line in out.splitlines() if not line.startswith("#")]
    assert message in err
    assert err.count("\n") == 1


def test_diff_without_a_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert cli.main(["diff", "smollm2-135m"]) == 2
    err = capsys.readouterr().err
    assert "kubeconfig" in err.lower()
    assert "Traceback" not in err


def test_diff(
    client: Client,
    cluster: ClusterSpec,
    model: ModelSpec,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Catalog({model.name: model}, {"lab": cluster})
    monkeypatch.setattr(cli, "catalog", lambda: here)
    assert cli.main(["diff", model.name]) == 1
    new = capsys.readouterr().out
    assert f"+++ new Deployment/{model.object_name}-blue" in new
    assert client.find("Deployment", f"{model.object_name}-blue") is None, "nothing was applied"
    assert cli.main(["diff", model.name, "--kind", "ScaledObject"]) == 2, "nothing was compared"
    out, err = capsys.readouterr()
    assert (out, "no record" in err) == ("", True)

    release = Release(model, cluster, "0" * 40, "blue", "none", model.rollout.start_seconds_min)
    for obj in cli._objects(release, None):
        client.apply(obj)
    assert cli.main(["diff", model.name]) == 0
    live = client.get("Deployment", release.name)
    counted = {**live["metadata"]["annotations"], slots.REVISION: "7"}
    later = {**live, "metadata": {**live["metadata"], "annotations": counted}}
    assert cli._plain(live) == cli._plain(later), "the controller may come in between"
    assert capsys.readouterr().out == ""

    more = model.model_copy(update={"args": (*model.args, "--max-num-seqs=4")})
    monkeypatch.setattr(cli, "catalog", lambda: Catalog({model.name: more}, {"lab": cluster}))
    assert cli.main(["diff", model.name]) == 1
    lines = capsys.readouterr().out.splitlines()
    changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert [line.split() for line in changed] == [["+", "-", "--max-num-seqs=4"]]


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_a_diff_that_can_not_be_printed_is_none(
    reader: str,
    client: Client,
    cluster: ClusterSpec,
    model: ModelSpec,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert client
    monkeypatch.setattr(cli, "catalog", lambda: Catalog({model.name: model}, {"lab": cluster}))
    if reader == "full":
        out = FULL.open("w")
    else:
        ours, theirs = os.pipe()
        os.close(ours)
        out = os.fdopen(theirs, "w")
    with out:
        monkeypatch.setattr(sys, "stdout", out)
        status = cli.main(["diff", model.name, "--kind", "Service"])
    said = capsys.readouterr().err.splitlines()[1:]  # after "no record"
    if reader == "full":
        assert (status, said) == (
            2,
            ["can't write all of it to standard output: No space left on device"],
        )
    else:
        assert (status, said) == (128 + signal.SIGPIPE, [])


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "k8s", "render", "smollm2-135m", "--cluster", "lab"]
    with FULL.open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert done.stderr == "can't write all of it to standard output: No space left on device\n"
        done = subprocess.run([*command[:-1], "moon"], cwd=ROOT, stderr=full, text=True)
        assert done.returncode == 2, "that it can't be said makes it no difference"


def test_a_fault_of_the_program_is_no_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: ClusterSpec) -> Client:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(cli, "connect", connect)
    assert cli.main(["diff", "smollm2-135m"]) == 2
    assert "nobody thought of this" in capsys.readouterr().err


def test_diff_with_what_is_no_api_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
    with answering(tmp_path / "k", 200, b"{}") as address:
        assert cli.main(["diff", "smollm2-135m"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"what answers at {address} is no Kubernetes API server: ")


def test_nothing_is_said_of_a_certificate_that_needn_t_be_verified(
    server: ApiServer, tmp_path: Path
) -> None:
    path = server.kubeconfig(tmp_path / "k")
    config = yaml.safe_load(path.read_text())
    for entry in config["clusters"]:
        address = entry["cluster"]["server"]
        entry["cluster"] = {"server": address, "insecure-skip-tls-verify": True}
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "k8s", "diff", "smollm2-135m", "--kind", "ScaledObject"],
        cwd=ROOT,
        env={**os.environ, "KUBECONFIG": str(path), "PROMOTION_CLUSTER": "lab"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "no record: the ScaledObject's thresholds are not known\n",
    )


@pytest.mark.parametrize("command", ["render", "platform", "importer"])
def test_it_says_for_which_cluster_and_how_to_choose(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *(["smollm2-135m"] if command == "render" else [])]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "# For cluster lab. Another cluster: --cluster NAME, or PROMOTION_CLUSTER."


@pytest.mark.parametrize(
    ("args", "placeholders"),
    [
        (["importer", "--cluster", "gke-example"], 1),
        (["importer", "--cluster", "lab"], 0),
        (["render", "llama-3.1-8b-instruct", "--cluster", "gke-example"], 1),
        (["render", "llama-3.1-8b-instruct", "--cluster", "gke-example", "--kind", "Service"], 0),
    ],
)
def test_a_placeholder_of_an_image_is_said(
    args: list[str], placeholders: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == placeholders
    for line in lines:
        assert "@sha256:" + "0" * 64 + "' is a placeholder; write your image's digest" in line
        assert "catalog/clusters/gke-example.yaml" in line


def test_what_is_printed_is_what_was_rendered() -> None:
    objects = manifests.platform(catalog().cluster("lab"))
    assert list(yaml.safe_load_all(cli.to_yaml(objects))) == objects
