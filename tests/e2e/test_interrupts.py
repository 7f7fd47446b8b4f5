"""Killed at any stage: someone answers, and the next run proceeds.

Each test starts from what the one before left, a killed run included.
"""

import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from tests.e2e.conftest import Run, Target, edit, with_a_short_benchmark

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("planted"), pytest.mark.timeout(400)]

OTHER = {"blue": "green", "green": "blue"}


@pytest.fixture(scope="module")
def target(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """With a shorter benchmark: what it measures is not these tests' matter."""
    return with_a_short_benchmark(target, tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def live(target: Target) -> str:
    """The live slot."""
    if not target.answers():
        run = target.promote("v1")
        assert run.status == 0, run.output[-6000:]
    slot = target.live_slot()
    assert slot is not None
    return slot


def kill_in(target: Target, stage: str, number: signal.Signals) -> Run:
    """Start a promotion and send the signal once `stage` has started."""
    process = target.start(revision="v3")
    seen = target.read_until(process, f"{stage} - STEP_START")
    # The benchmark is to have its Job; the move is nearer than any pause.
    time.sleep({"ttft_benchmark": 2, "promoted_model": 0}.get(stage, 0.3))
    os.kill(process.pid, number)
    run = target.finish(process, 90)
    return dataclasses.replace(run, output=seen + run.output)


def kill_after_the_move(target: Target, number: signal.Signals) -> Run:
    """Start a promotion and send the signal as soon as the Service selects the candidate."""
    process = target.start(revision="v3")
    killed = []

    def kill() -> None:
        os.kill(process.pid, number)
        killed.append(number)

    with target.when_moved(kill):
        run = target.finish(process)
    assert killed, run.output[-6000:]
    return run


def assert_cleared(target: Target, slot: str) -> None:
    """Nothing runs in the slot."""
    name = f"{target.model.object_name}-{slot}"
    candidate = target.get("deployment", name)
    assert candidate is None or candidate["spec"]["replicas"] == 0
    assert target.get("scaledobject", name) is None


def assert_recorded(target: Target, run: Run) -> None:
    """The record says that the run's candidate is what is live, and it is."""
    record = target.record()
    assert record is not None
    assert record["promotion"] == run.id
    assert (record["slot"], record["commit"]) == (target.live_slot(), target.live_commit())
    assert target.answers()


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("gpu_nodes", signal.SIGINT),
        ("model_revision", signal.SIGINT),
        ("model_weights", signal.SIGINT),
        ("vllm_deployment", signal.SIGTERM),
        ("gpu_smoke_test", signal.SIGINT),
        ("ttft_benchmark", signal.SIGTERM),
        ("keda_thresholds", signal.SIGINT),
    ],
)
def test_an_interrupt_cleans_up_after_itself(
    target: Target, live: str, stage: str, number: signal.Signals
) -> None:
    run = kill_in(target, stage, number)
    assert run.status != 0
    assert target.live_slot() == live
    assert target.answers()
    assert not target.lease_holder()
    assert_cleared(target, OTHER[live])


def test_an_interrupt_before_the_move_moves_whole_or_not_at_all(target: Target, live: str) -> None:
    run = kill_in(target, "promoted_model", signal.SIGTERM)
    assert not target.lease_holder()
    if target.live_slot() == live:
        assert run.status != 0
        assert (target.record() or {})["commit"] == target.live_commit()
        assert target.answers()
        assert_cleared(target, OTHER[live])
    else:
        assert_recorded(target, run)


def test_an_interrupt_after_the_move_leaves_a_record(target: Target, live: str) -> None:
    run = kill_after_the_move(target, signal.SIGTERM)
    assert target.live_slot() == OTHER[live]
    assert_recorded(target, run)
    assert not target.lease_holder()


@pytest.mark.parametrize("stage", ["vllm_deployment", "ttft_benchmark"])
def test_sigkill_leaves_the_live_one_alone(target: Target, live: str, stage: str) -> None:
    run = kill_in(target, stage, signal.SIGKILL)
    assert run.status == -signal.SIGKILL
    assert target.live_slot() == live
    assert target.answers()


def test_sigkill_before_the_move(target: Target, live: str) -> None:
    commit = target.live_commit()
    run = kill_in(target, "promoted_model", signal.SIGKILL)
    assert run.status == -signal.SIGKILL
    if target.live_slot() == live:
        assert target.live_commit() == commit
    assert target.answers()


def test_after_sigkill_in_the_move_the_next_run_proceeds(target: Target, live: str) -> None:
    """And puts into the record what was live before it, which the killed one could not."""
    killed = kill_after_the_move(target, signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    assert target.live_slot() == OTHER[live]
    assert target.answers()
    between = target.live_commit()
    run = target.promote("v1")
    assert run.status == 0, run.output[-6000:]
    assert target.live_slot() == live
    assert_recorded(target, run)
    previous = target.record("previous")
    assert previous is not None
    assert (previous["promotion"], previous["commit"]) == (killed.id, between)
    with dg.DagsterInstance.from_config(str(target.home)) as instance:
        in_dagster = instance.get_run_by_id(killed.id)
    assert in_dagster is not None
    assert in_dagster.status == dg.DagsterRunStatus.FAILURE
    assert not target.lease_holder()
    assert_cleared(target, OTHER[live])


def test_a_second_promotion_beside_a_running_one_is_refused(target: Target, checkout: Path) -> None:
    # The second waits 35 s for the Lease, in case its holder is dead: the first takes longer.
    model = checkout / f"catalog/models/{target.model_name}.yaml"
    edit(model, "rates: [6, 10, 16]", "rates: [6]")
    edit(model, "step_seconds: 4", "step_seconds: 45")
    slow = dataclasses.replace(target, checkout=checkout)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.finish, slow.start(revision="v1"))
        deadline = time.monotonic() + 60
        while not target.lease_holder() and time.monotonic() < deadline:
            time.sleep(0.5)
        second = target.promote("v3")
        assert second.status != 0
        assert "promotion-smollm2-135m" in second.output
        run = first.result()
    assert run.status == 0, run.output[-6000:]
