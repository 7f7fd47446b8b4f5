"""What is written down before, with and after a move of the traffic."""

from k8s import records
from k8s.client import Client
from k8s.manifests import Release
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
