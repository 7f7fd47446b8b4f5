"""A missing or wrong kubeconfig is one clear message."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.errors import ConfigError
from k8s.kubeconfig import load_account


def config(**changes: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "contexts": [
            {"name": "lab", "context": {"cluster": "c", "user": "u"}},
            {"name": "prod", "context": {"cluster": "c2", "user": "u"}},
        ],
        "clusters": [
            {"name": "c", "cluster": {"server": "https://10.9.8.7:6443"}},
            {"name": "c2", "cluster": {"server": "https://prod.example.com"}},
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
        **changes,
    }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    return path


def test_context_is_chosen_and_described(file: Path) -> None:
    file.write_text(yaml.safe_dump(config()))
    assert load_account(None).server == "https://10.9.8.7:6443"
    account = load_account("prod")
    assert account.server == "https://prod.example.com"
    assert account.described == f"context 'prod' of {file}"
    assert account.authorization() == "Bearer t"


def test_several_files(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(yaml.safe_dump(config()))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{file}")
    assert load_account(None).server == "https://10.9.8.7:6443"


def test_no_kubeconfig_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=f"KUBECONFIG names {file}, which doesn't exist.*make lab"
    ):
        load_account(None)
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(ConfigError, match=r"no kubeconfig: .*/home/.kube/config doesn't exist"):
        load_account(None)


def test_unknown_context_lists_those_there_are(file: Path) -> None:
    file.write_text(yaml.safe_dump(config()))
    with pytest.raises(ConfigError, match=r"no context 'staging' \(it has: lab, prod\)"):
        load_account("staging")


def test_no_current_context(file: Path) -> None:
    file.write_text(yaml.safe_dump(config(**{"current-context": ""})))
    with pytest.raises(ConfigError, match=r"no current-context \(it has: lab, prod\)"):
        load_account(None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("not: [closed", r"it is no YAML: expected .* in line 1, column 13"),
        ("just words", "it has no `contexts`, `clusters` and `users`"),
        ("[1, 2]", "it has no `contexts`, `clusters` and `users`"),
        ("contexts: {a: b}", "its `contexts` are no list of entries with `name` and `context`"),
        ("\x00\x01", "it is no text"),
        ("contexts: [1]", "its `contexts` are no list"),
        ("users: [{name: u, user: 7}]", "its `users` are no list"),
    ],
)
def test_not_a_kubeconfig(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file} isn't a kubeconfig: {why}.* set KUBECONFIG"):
        load_account(None)


def cluster(**fields: str) -> dict[str, Any]:
    return {"clusters": [{"name": "c", "cluster": fields}]}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clusters": []}, r"there is no cluster 'c' \(but: none\)"),
        ({"users": [{"name": "v", "user": {}}]}, r"there is no user 'u' \(but: v\)"),
        ({"contexts": [{"name": "lab", "context": None}]}, "it names no cluster"),
        (cluster(), "its cluster has no server"),
        (cluster(server="10.9.8.7:6443"), "'10.9.8.7:6443' is no address such as https://"),
        (cluster(**{"server": "https://x", "certificate-authority": "/no/ca"}), "/no/ca"),
        (
            cluster(**{"server": "https://x", "certificate-authority-data": "%"}),
            "certificates can't be read: no certificate or crl found",
        ),
        (
            {"users": [{"name": "u", "user": {"tokenFile": "/no/token"}}]},
            "/no/token: No such file or directory",
        ),
        ({"users": [{"name": "u", "user": {"exec": {"args": []}}}]}, "`exec` has no `command`"),
        (
            {"users": [{"name": "u", "user": {"auth-provider": {"name": "gcp"}}}]},
            "auth-provider 'gcp', which Kubernetes took out",
        ),
    ],
)
def test_what_is_missing_is_named(file: Path, changes: dict[str, Any], what: str) -> None:
    file.write_text(yaml.safe_dump(config(**changes)))
    with pytest.raises(ConfigError, match=f"context 'lab' of {file} can't be used: .*{what}") as e:
        load_account(None)
    assert str(e.value).endswith("Correct that file, or set KUBECONFIG to another one.")


def test_folder_instead_of_a_file(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ConfigError, match=r"isn't a kubeconfig: it can't be read: Is a directory"):
        load_account(None)


@pytest.mark.parametrize(
    ("login", "why"),
    [
        (
            {"command": "aws-not-there", "installHint": "Install the AWS CLI"},
            r"No such file or directory: 'aws-not-there'\. Install the AWS CLI\. Try .*: aws-not",
        ),
        (
            {"command": "sh", "args": ["-c", "echo run aws sso login >&2; exit 3"]},
            r"process returned 3\. run aws sso login\. Try it by hand: sh -c 'echo run aws",
        ),
        ({"command": "echo", "args": ["hello"]}, "what it printed is no ExecCredential"),
        ({"command": "echo", "args": ["{}"]}, "malformed response"),
    ],
)
def test_login_program_that_fails_is_named_and_nothing_else_is_said(
    file: Path, login: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The library only logs it, and goes on as nobody."""
    login |= {"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}
    file.write_text(yaml.safe_dump(config(users=[{"name": "u", "user": {"exec": login}}])))
    with pytest.raises(ConfigError, match=f"login program of user 'u' failed: {why}"):
        load_account(None)
    assert caplog.records == []


def logging_in_with(script: str) -> dict[str, Any]:
    login = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "interactiveMode": "Never",
        "command": "sh",
        "args": ["-c", script],
    }
    return config(users=[{"name": "u", "user": {"exec": login}}])


def test_login_program_that_hangs_is_not_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.kubeconfig.LOGIN_S", 0.3)
    file.write_text(yaml.safe_dump(logging_in_with("exec sleep 20")))
    with pytest.raises(
        ConfigError, match=r"'lab' of .*hasn't ended after 0.3 s.*by hand: sh -c 'exec sleep 20'"
    ):
        load_account(None)


def test_login_program_that_hangs_when_the_token_is_renewed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "t", "expirationTimestamp": "2020-01-01T00:00:00Z"},
    }
    again = tmp_path / "again"
    script = f"[ ! -e {again} ] || exec sleep 20; touch {again}; echo '{json.dumps(credential)}'"
    file.write_text(yaml.safe_dump(logging_in_with(script)))
    account = load_account(None)
    monkeypatch.setattr("k8s.kubeconfig.LOGIN_S", 0.3)
    with pytest.raises(ConfigError, match=r"login program hasn't ended after 0.3 s"):
        account.authorization()


def test_no_proxy_for_ones_own_machine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    local = config()
    local["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:6443"
    file.write_text(yaml.safe_dump(local))
    assert load_account(None).configuration.proxy is None
    assert load_account("prod").configuration.proxy == "http://proxy.example.com:3128"
