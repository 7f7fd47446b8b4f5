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
    with pytest.raises(
        ConfigError, match=r"no context 'staging' \(it has: lab, prod\)\. Correct `context` in"
    ):
        load_account("staging")


def test_unknown_current_context_is_the_kubeconfigs_own(file: Path) -> None:
    file.write_text(yaml.safe_dump(config(**{"current-context": "staging"})))
    with pytest.raises(ConfigError, match="That is its current-context: choose another") as error:
        load_account(None)
    assert "Correct `context`" not in str(error.value)


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
        ("users: [{name: u, user: []}]", "its `users` are no list"),
        ("current-context: [lab]", "its `current-context` is no name"),
    ],
)
def test_not_a_kubeconfig(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file} isn't a kubeconfig: {why}.* set KUBECONFIG"):
        load_account(None)


def cluster(**fields: str) -> dict[str, Any]:
    return {"clusters": [{"name": "c", "cluster": fields}]}


def user(**fields: Any) -> dict[str, Any]:
    return {"users": [{"name": "u", "user": fields}]}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clusters": []}, r"there is no cluster 'c' \(but: none\)"),
        ({"users": [{"name": "v", "user": {}}]}, r"there is no user 'u' \(but: v\)"),
        ({"contexts": [{"name": "lab", "context": None}]}, "it names no cluster"),
        (cluster(), "its cluster 'c' has no server"),
        (cluster(server="10.9.8.7:6443"), "'10.9.8.7:6443' of its cluster 'c' is no address such"),
        (cluster(server="https://x:99999"), "'https://x:99999' of its cluster 'c' .* port is none"),
        (cluster(server="https://x:0"), "'https://x:0' of its cluster 'c' .* its port is none"),
        (cluster(server="https://x:port"), "'https://x:port' of its cluster 'c' is no address"),
        (cluster(server="https://:6443"), "'https://:6443' of its cluster 'c' is no address"),
        (cluster(server="https://[::1"), r"'https://\[::1' of its cluster 'c' is no address"),
        (cluster(server="https://a b"), "'https://a b' of its cluster 'c' is no address"),
        (cluster(server="https://x?a=b"), r"'https://x\?a=b' of its cluster 'c' is no address"),
        (cluster(**{"server": "https://x", "certificate-authority": "/no/ca"}), "/no/ca"),
        (
            cluster(**{"server": "https://x", "certificate-authority-data": "%"}),
            "certificates can't be read: no certificate or crl found",
        ),
        (user(tokenFile="/no/token"), "/no/token: No such file or directory"),
        (user(exec={"args": []}), "`exec` has no `command`"),
        (user(exec={}), "`exec` has no `command`"),
        (user(**{"auth-provider": {"name": "gcp"}}), "'gcp', which Kubernetes took out"),
        (user(**{"auth-provider": "gcp"}), "'gcp', which Kubernetes took out"),
        (user(), "its user 'u' has nothing to log in with"),
        ({"users": [{"name": "u"}]}, "its user 'u' has nothing to log in with"),
        ({"users": [{"name": "u", "user": None}]}, "its user 'u' has nothing to log in with"),
        (user(username="a"), "its user 'u' can't log in with username as it is: a user needs tok"),
        (user(username="a", password=""), "its user 'u' can't log in with password, username as"),
        (user(username="a", password=7), "`password` of its user 'u' is no text"),
        (user(token=""), "its user 'u' can't log in with token as it is"),
        (user(token=" "), "its user 'u' can't log in with token as it is"),
        (user(token=None), "`token` of its user 'u' is no text"),
        (user(token=["t"]), "`token` of its user 'u' is no text"),
        (user(token="a\nb"), "the token of its user 'u' has characters that no token has"),
        (user(tokenFile="/dev/null"), "its user 'u' can't log in with tokenFile as it is"),
        (user(tokens="t"), "its user 'u' can't log in with tokens as it is"),
        ({"contexts": [{"name": "lab", "context": {"cluster": ["c"]}}]}, "it names no cluster"),
    ],
)
def test_what_is_missing_is_named(file: Path, changes: dict[str, Any], what: str) -> None:
    file.write_text(yaml.safe_dump(config(**changes)))
    with pytest.raises(ConfigError, match=f"context 'lab' of {file} can't be used: .*{what}") as e:
        load_account(None)
    assert str(e.value).endswith("Correct that file, or set KUBECONFIG to another one.")


def test_a_context_without_a_user_asks_as_nobody(file: Path) -> None:
    """As for `kubectl proxy`, which logs in itself."""
    named = {"contexts": [{"name": "lab", "context": {"cluster": "c"}}]}
    file.write_text(yaml.safe_dump(config(**named)))
    assert load_account(None).authorization() is None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_each_way_to_log_in_is_taken(file: Path, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "token").write_text("t\n")
    server = cluster(server=f"{scheme}://10.9.8.7:6443/k8s/clusters/c-1")
    for fields, header in (
        ({"token": "t"}, "Bearer t"),
        ({"token": "t", "username": "a"}, "Bearer t"),
        ({"tokenFile": str(tmp_path / "token")}, "Bearer t"),
        ({"username": "a", "password": "b"}, "Basic YTpi"),
    ):
        file.write_text(yaml.safe_dump(config(**server, **user(**fields))))
        assert load_account(None).authorization() == header


def test_of_two_files_with_the_same_names_the_first_counts(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second"
    second.write_text(yaml.safe_dump(config(**cluster(server="https://elsewhere:6443"))))
    monkeypatch.setenv("KUBECONFIG", f"{second}:{file}")
    assert load_account("lab").configuration.host == "https://elsewhere:6443"


def test_a_home_that_nobody_has(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "~nobody-at-all/config")
    with pytest.raises(ConfigError, match="~nobody-at-all/config, but there is no such user"):
        load_account(None)


def test_a_file_where_one_may_not_look(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")  # root may look everywhere

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(ConfigError, match=f"{file} can't be read: Permission denied. Set KUBECO"):
        load_account(None)


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
        (
            {"command": "sh", "args": ["-c", "seq 200 >&2; exit 3"]},
            r"process returned 3\. 1 … 198 199 200\. Try it by hand: sh -c",
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
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("k8s.kubeconfig.SILENT_S", 0.1)
    monkeypatch.setattr("k8s.kubeconfig.LOGIN_S", 0.3)
    file.write_text(yaml.safe_dump(logging_in_with("exec sleep 20")))
    with pytest.raises(
        ConfigError, match=r"'lab' of .*hasn't ended after 0.3 s.*by hand: sh -c 'exec sleep 20'"
    ):
        load_account(None)
    [said] = caplog.messages
    assert "waits for its login program, 0 s more: sh -c 'exec sleep 20'" in said


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
    monkeypatch.setattr("k8s.kubeconfig.SILENT_S", 0.1)
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
