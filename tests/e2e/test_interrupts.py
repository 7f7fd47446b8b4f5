"""Killed at any stage: the old model serves, and the next run proceeds."""

import os
import signal
import time

import pytest

from tests.e2e.conftest import Target

pytestmark = pytest.mark.cluster

STAGES = ("model_weights", "vllm_deployment", "gpu_smoke_test", "ttft_benchmark", "keda_thresholds")


def kill_in(target: Target, stage: str, number: signal.Signals) -> str:
    """Start a promotion and send the signal once `stage` has started. Returns its output."""
    process = target.start(revision="v3")
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    seen = []
    for line in process.stdout:
        seen.append(line)
        if f"{stage} - STEP_START" in line or time.monotonic() > deadline:
            break
    assert f"{stage} - STEP_START" in seen[-1], "".join(seen[-30:])
    time.sleep(2 if stage == "ttft_benchmark" else 0.3)
    os.kill(process.pid, number)
    run = target.finish(process, 90)
    assert run.status != 0
    return "".join(seen) + run.output


@pytest.fixture(scope="module")
def live(target: Target) -> str:
    if not target.answers():
        run = target.promote("v1")
        assert run.status == 0, run.output[-6000:]
    slot = target.live_slot()
    assert slot is not None
    return slot


@pytest.mark.parametrize(
    ("stage", "number"),
    [
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
    kill_in(target, stage, number)
    assert target.live_slot() == live
    assert target.answers()
    assert not target.lease_holder()
    idle = "green" if live == "blue" else "blue"
    candidate = target.get("deployment", f"{target.model.object_name}-{idle}")
    assert candidate is None or candidate["spec"]["replicas"] == 0
    assert target.get("scaledobject", f"{target.model.object_name}-{idle}") is None


def test_after_sigkill_the_next_run_proceeds(target: Target, live: str) -> None:
    kill_in(target, "ttft_benchmark", signal.SIGKILL)
    assert target.live_slot() == live
    assert target.answers()
    run = target.promote("v3")
    assert run.status == 0, run.output[-6000:]
    assert target.live_slot() != live
    assert not target.lease_holder()


def test_a_second_promotion_beside_a_running_one_is_refused(target: Target) -> None:
    first = target.start(revision="v1")
    deadline = time.monotonic() + 60
    while not target.lease_holder() and time.monotonic() < deadline:
        time.sleep(0.5)
    second = target.promote("v3")
    assert second.status != 0
    assert "promotion-smollm2-135m" in second.output
    assert target.finish(first).status == 0
