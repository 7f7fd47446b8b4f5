"""What is written down before, with and after a move of the traffic."""

import hashlib

import pytest

from k8s import fence, manifests, records, slots
from k8s.client import Client
from k8s.errors import NotFound
from k8s.manifests import Release
from k8s.manifests.release import COMMIT, RECORD
from tests.k8s.test_rollout import cluster, model, record, release

__all__ = ["cluster", "model", "release"]


def test_what_is_announced_becomes_the_current_one(client: Client, release: Release) -> None:
    model = release.model
    first, second = record(release, "t1", "run-1"), record(release, "t2", "run-2")
    records.write(client, first)
    assert records.announced(client, model) is None
    records.announce(client, second)
    assert records.read(client, model) == (first, None)
    assert records.announced(client, model) == second
    records.write(client, second)
    assert records.read(client, model) == (second, first)
    assert records.announced(client, model) is None


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

    records.write(client, record(release, "t2", "run-2"))
    text = client.get("ConfigMap", records.name(release.model))["data"]["previous"]
    assert f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" == seen, "as long as it is kept"

    fence.clear(client, release, after)
    left = slots.annotations(client.get("Deployment", release.name))
    assert RECORD not in left, "a new candidate has no record yet"
    assert COMMIT in left
