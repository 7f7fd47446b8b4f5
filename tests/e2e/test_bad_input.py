"""Mistakes and refusals: one clear message, exit status not 0, nothing changed, no traceback."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Run, Target, edit

pytestmark = pytest.mark.cluster


@pytest.fixture
def unchanged(target: Target) -> Iterator[None]:
    before = target.state()
    yield
    # Jobs of a refused run may be kept for their logs until their ttl; nothing that serves changes.
    after = {k: v for k, v in target.state().items() if not k.startswith("Job/")}
    assert after == {k: v for k, v in before.items() if not k.startswith("Job/")}
    assert not target.lease_holder()


def assert_refused(run: Run, *parts: str) -> None:
    assert run.status != 0, run.output[-4000:]
    for part in parts:
        assert part in run.output, run.output[-4000:]
    assert "Traceback (most recent call last)" not in run.output, run.output[-4000:]


@pytest.mark.usefixtures("planted", "unchanged")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"partition": "gpt-2"}, ("gpt-2", "smollm2-135m")),
        ({"partition": None}, ("dagster/partition", "smollm2-135m")),
        ({"revision": "no-such-branch"}, ("no-such-branch", "HuggingFaceTB/SmolLM2-135M-Instruct")),
        ({"partition": "llama-3.1-8b-instruct"}, ("gpu-24g", "llama-3.1-8b-instruct")),
    ],
    ids=["unknown partition", "no partition", "unknown revision", "no pool for it"],
)
def test_a_wrong_order_is_refused(
    target: Target, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    assert_refused(target.promote(**options), *parts)


@pytest.mark.usefixtures("planted", "unchanged")
@pytest.mark.parametrize(
    ("repo", "parts"),
    [
        ("lab/gated", ("lab/gated", "gated")),
        ("lab/private", ("lab/private",)),
        ("lab/no-such-repo", ("lab/no-such-repo",)),
    ],
)
def test_a_hub_that_refuses(
    target: Target, checkout: Path, repo: str, parts: tuple[str, ...]
) -> None:
    edit(checkout / "catalog/models/smollm2-135m.yaml", "HuggingFaceTB/SmolLM2-135M-Instruct", repo)
    assert_refused(dataclasses.replace(target, checkout=checkout).promote(), *parts)


@pytest.mark.usefixtures("unchanged")
def test_a_wrong_catalog_file(target: Target, checkout: Path) -> None:
    edit(checkout / "catalog/models/smollm2-135m.yaml", "count: 1", "count: 0.5")
    run = dataclasses.replace(target, checkout=checkout).promote()
    assert_refused(run, "catalog/models/smollm2-135m.yaml:", "gpus.count", "0.5")


def test_a_missing_kubeconfig(target: Target, tmp_path: Path) -> None:
    away = dataclasses.replace(target, kubeconfig=tmp_path / "nowhere")
    assert_refused(away.promote(), "nowhere", "KUBECONFIG")


def test_an_unreachable_api_server(target: Target, tmp_path: Path) -> None:
    import re

    text = re.sub(r"server: .*", "server: https://127.0.0.1:1", target.kubeconfig.read_text())
    (tmp_path / "config").write_text(text)
    away = dataclasses.replace(target, kubeconfig=tmp_path / "config")
    assert_refused(away.promote(), "127.0.0.1:1")


@pytest.mark.usefixtures("unchanged")
def test_an_unknown_cluster(target: Target) -> None:
    away = dataclasses.replace(target, extra={"PROMOTION_CLUSTER": "moon"})
    assert_refused(away.promote(), "moon", "lab")


@pytest.mark.usefixtures("unchanged")
def test_a_missing_namespace(target: Target, checkout: Path) -> None:
    ours = f"namespace: {target.cluster.namespace}"
    edit(checkout / f"catalog/clusters/{target.cluster.name}.yaml", ours, "namespace: elsewhere")
    run = dataclasses.replace(target, checkout=checkout).promote()
    assert_refused(run, "elsewhere")
