"""What is written down before, with and after a move of the traffic."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from catalog import ModelSpec
from catalog.load import catalog
from k8s import fence, manifests, records, slots
from k8s.client import Client
from k8s.errors import KubernetesError, NotFound
from k8s.manifests import Release, Thresholds
from k8s.manifests.release import COMMIT, RECORD, ServedAdapter
from k8s.records import PromotionRecord
from tests.k8s.test_rollout import cluster, model, record, release

__all__ = ["cluster", "model", "release"]

OTHER = "e" * 40


def of(release: Release, run: str, commit: str | None = None, **spec: object) -> PromotionRecord:
    """The record of a promotion of `release`, or of another commit or spec."""
    model = release.model.model_copy(update=spec)
    update = {"commit": commit or release.commit, "spec": model}
    return record(release, "t", run).model_copy(update=update)


def test_what_is_announced_becomes_the_current_one(client: Client, release: Release) -> None:
    model = release.model
    assert records.read(client, model) == (None, None)
    first, second = of(release, "run-1"), of(release, "run-2", OTHER)
    records.write(client, first)
    assert records.announced(client, model) is None
    records.announce(client, second)
    assert records.read(client, model) == (first, None)
    assert records.announced(client, model) == second
    for _ in range(2):
        records.write(client, second)
        assert records.read(client, model) == (second, first)
    assert records.announced(client, model) is None


def test_who_promotes_what_is_live_keeps_what_a_rollback_brings_back(
    client: Client, release: Release
) -> None:
    model, old = release.model, of(release, "run-1", OTHER)
    records.write(client, old)
    records.write(client, of(release, "run-2"))
    for again in (
        of(release, "run-3"),
        of(release, "run-3", gpus=model.gpus.model_copy(update={"min_memory_mib": 1})),
        # Measured otherwise, by another name of the same commit: users get the same.
        of(
            release, "run-4", revision="v1.0", slo=model.slo.model_copy(update={"ttft_p95_ms": 1.0})
        ),
    ):
        records.announce(client, again)
        records.write(client, again)
        assert records.read(client, model) == (again, old)
        assert records.announced(client, model) is None
    changed = of(release, "run-5", args=(*model.args, "--max-num-seqs=7"))
    records.write(client, changed)
    assert records.read(client, model) == (changed, again)


def test_an_adapter_at_another_commit_is_something_else(client: Client, release: Release) -> None:
    adapter = ServedAdapter("sql", "lab/lora", "main", "a" * 40, 4, 1, "sha256:d")
    moved = dataclasses.replace(adapter, commit=OTHER)
    renamed = dataclasses.replace(adapter, revision="v1")
    first, same, other = (
        of(release, f"run-{i}").model_copy(update={"adapters": (served,)})
        for i, served in enumerate((adapter, renamed, moved))
    )
    assert first.serves_as(same)
    assert not first.serves_as(other)


def test_the_deployment_has_the_digest_of_its_record(client: Client, release: Release) -> None:
    written = record(release, "t1", "run-1")
    with pytest.raises(NotFound):
        records.stamp(client, written)
    client.apply(manifests.deployment(release))
    records.write(client, written)
    records.stamp(client, written)
    text = client.get("ConfigMap", records.name(release.model))["data"]["current"]
    seen = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    after = client.apply(manifests.deployment(release))
    assert slots.annotations(after)[RECORD] == seen, "an apply leaves it there"

    records.write(client, of(release, "run-2", OTHER))
    text = client.get("ConfigMap", records.name(release.model))["data"]["previous"]
    assert f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" == seen, "as long as it is kept"

    fence.clear(client, release, after)
    left = slots.annotations(client.get("Deployment", release.name))
    assert RECORD not in left, "a new candidate has no record yet"
    assert COMMIT in left


# Records of other versions

# Written by the first version, on the lab.
GOLDEN = (Path(__file__).parent / "records/format-1.json").read_text()


def store(client: Client, model: ModelSpec, **data: str) -> None:
    meta = {"name": records.name(model)}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
    client.apply(config, force=True)


def with_news(value: Any) -> Any:
    """With a field more in each object."""
    if isinstance(value, dict):
        return {name: with_news(item) for name, item in value.items()} | {"news": "?"}
    return [with_news(item) for item in value] if isinstance(value, list) else value


def test_a_record_of_the_first_version_is_read(client: Client, model: ModelSpec) -> None:
    store(client, model, current=GOLDEN)
    found, _ = records.read(client, model)
    assert found is not None
    assert found.commit == "a7b3eff073d072a5b20d0bd0ace059078f9cfde1"
    assert found.spec.args == ("--dtype=bfloat16", "--max-model-len=2048")
    assert found.thresholds == Thresholds(3, 1, 0.95, 7.0)
    assert found.adapters == (), "which that version didn't have"
    assert found.weights() == {(found.spec.repo, found.commit)}
    lab = catalog().cluster("lab")
    again = manifests.deployment(found.release(lab, slot="green", promotion="rollback"))
    assert again["metadata"]["name"] == "smollm2-135m-green"


def test_what_a_newer_version_added_is_ignored(client: Client, model: ModelSpec) -> None:
    store(client, model, current=GOLDEN, previous=json.dumps(with_news(json.loads(GOLDEN))))
    known, newer = records.read(client, model)
    assert known is not None
    assert newer is not None
    # Objects without fields of ours keep what they have.
    free: set[str] = {"gpus", "benchmark", "versions", "spec"}
    assert newer.model_dump(exclude=free) == known.model_dump(exclude=free)
    assert newer.spec.model_dump(exclude={"env"}) == known.spec.model_dump(exclude={"env"})


def test_what_was_live_is_kept_as_it_was_written(client: Client, release: Release) -> None:
    newer = json.dumps(with_news(json.loads(GOLDEN)))
    store(client, release.model, current=newer)
    second = record(release, "t2", "run-2")
    records.announce(client, second)
    assert client.get("ConfigMap", records.name(release.model))["data"]["current"] == newer
    records.write(client, second)
    data = client.get("ConfigMap", records.name(release.model))["data"]
    assert data == {"current": second.model_dump_json(), "previous": newer}


def test_a_rule_that_came_later_does_not_make_it_unreadable(
    client: Client, model: ModelSpec
) -> None:
    """Before models had adapters, somebody gave the engine one by hand."""
    args = ["--enable-lora", "--lora-modules=sql=/models/org/sql/main"]
    document = json.loads(GOLDEN)
    document["spec"]["args"] = args
    store(client, model, current=json.dumps(document))
    found, _ = records.read(client, model)
    assert found is not None
    assert list(found.spec.args) == args


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "has format 2, this version reads 1. Use the version that wrote it"),
        ({"commit": None}, "is no record of this version: commit: Input should be a valid string"),
        ({"format": "x"}, "is no record of this version: format: "),
    ],
)
def test_one_that_can_not_be_read_is_named(
    client: Client, model: ModelSpec, change: dict[str, Any], why: str
) -> None:
    store(client, model, current=json.dumps(json.loads(GOLDEN) | change))
    with pytest.raises(
        KubernetesError, match=f"ConfigMap {records.name(model)}, key current: "
    ) as e:
        records.read(client, model)
    assert why in str(e.value)


def test_a_catalog_file_stays_strict(model: ModelSpec) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        ModelSpec.model_validate(model.model_dump() | {"news": "?"})
