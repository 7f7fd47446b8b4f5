"""Values go from stage to stage of one run, and to no other run."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from pydantic import BaseModel

from assets.values import RunValues

PARTITIONS = dg.StaticPartitionsDefinition(["a-model"])


@dataclass(frozen=True)
class Part:
    name: str
    pairs: tuple[tuple[int, float], ...]


class Whole(BaseModel):
    part: Part


WHOLE = Whole(part=Part("x", ((1, 2.5),)))


@dg.asset(partitions_def=PARTITIONS)
def first() -> Whole:
    return WHOLE


@dg.asset(partitions_def=PARTITIONS)
def second(first: Whole) -> Part:
    assert first == WHOLE
    return first.part


def materialize(
    folder: Path, instance: dg.DagsterInstance, *selected: str
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [first, second],
        selection=list(selected),
        partition_key="a-model",
        instance=instance,
        resources={"io_manager": RunValues(folder=str(folder))},
        raise_on_error=False,
    )


def test_dataclasses_and_models_survive(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialize(tmp_path, instance, "first", "second")
    assert result.success
    stored = tmp_path / "a-model" / result.run_id / "second.json"
    assert '"x"' in stored.read_text()


def test_a_later_run_does_not_go_on_from_an_earlier_one(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(tmp_path, instance, "first", "second").success
        alone = materialize(tmp_path, instance, "second")
    assert not alone.success
    failure = alone.failure_data_for_node("second")
    assert failure is not None
    assert failure.error is not None
    assert "first has not run in this run" in failure.error.message
    assert "whole `promote` job" in failure.error.message


@pytest.fixture(autouse=True)
def stacks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PromotionFailed turns stacks off; here is no Cluster resource to turn them on."""
    import sys

    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
