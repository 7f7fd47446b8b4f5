"""What is around a stage: the lock, the clearing up, and the one message."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import dagster as dg
import pytest

from assets import promotion as promotions
from assets.promotion import Promotion, Refused
from assets.resources import Cluster, Reports
from assets.stage import stage
from catalog import ClusterSpec
from k8s import rollout, traffic
from k8s.client import Client
from k8s.errors import Unreachable, WaitTimeout
from k8s.lease import Lease
from tests.assets.conftest import MODEL, TTL_S, Ran, candidate

Bare: TypeAlias = Callable[..., Ran]
Body: TypeAlias = Callable[[Promotion], None]


def job(*bodies: Body) -> dg.JobDefinition:
    """A job whose ops stage_0, stage_1, … run after one another."""

    def op(number: int, body: Body) -> dg.OpDefinition:
        @dg.op(name=f"stage_{number}", ins={"after": dg.In(dg.Nothing)})
        def run(context: dg.OpExecutionContext, cluster: Cluster, reports: Reports) -> None:
            with stage(context, cluster, reports) as promotion:
                body(promotion)

        return run

    @dg.job(name="stages", executor_def=dg.in_process_executor)
    def stages() -> None:
        last = None
        for number, body in enumerate(bodies):
            last = op(number, body)(last) if last is not None else op(number, body)()

    return stages


def refuse(_: Promotion) -> None:
    raise Refused("the answer was wrong: expected Paris, got Rome")


def nothing(_: Promotion) -> None:
    pass


def test_a_refusal_is_one_message_without_a_stack(bare: Bare) -> None:
    ran = bare(job(candidate, refuse, nothing))
    assert not ran.result.success
    error = ran.failure("stage_1")
    assert "expected Paris, got Rome" in error.message
    assert list(error.stack) == []
    assert error.cause is None
    assert [(s["stage"], s["outcome"]) for s in ran.stages] == [
        ("stage_0", "passed"),
        ("stage_1", "refused"),
    ]
    assert "expected Paris" in ran.stages[1]["decided_by"]
    assert not hasattr(sys, "tracebacklimit")  # the next run's bugs have stacks again


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (WaitTimeout("not ready after 60 s", last_state="Pending"), "failed"),
        (Refused("too slow"), "refused"),
        (ZeroDivisionError("a bug of ours"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_stage_takes_the_candidate_away(
    bare: Bare, error: BaseException, outcome: str
) -> None:
    def fail(_: Promotion) -> None:
        raise error

    ran = bare(job(candidate, fail))
    assert not ran.result.success
    assert ran.replicas("green") == 0
    assert ran.holder == ""
    assert ran.stages[-1]["outcome"] == outcome


def test_a_bug_keeps_its_stack(bare: Bare) -> None:
    def bug(_: Promotion) -> None:
        raise ZeroDivisionError("a bug of ours")

    error = bare(job(bug)).failure("stage_0")
    assert error.cause.cls_name == "ZeroDivisionError"
    assert any("in bug" in frame for frame in error.cause.stack)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_stage(bare: Bare, number: signal.Signals) -> None:
    def interrupted(_: Promotion) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("Dagster raises in the stage")

    ran = bare(job(candidate, interrupted))
    assert not ran.result.success
    assert "interrupted" in ran.failure("stage_1").message
    assert ran.replicas("green") == 0
    assert ran.holder == ""


def test_a_run_that_ends_before_the_last_stage_leaves_no_candidate(bare: Bare) -> None:
    ran = bare(job(candidate, nothing))
    assert ran.result.success
    assert ran.replicas("green") == 0
    assert ran.holder == ""


def test_what_is_live_is_not_taken_away(bare: Bare) -> None:
    def last_stage(promotion: Promotion) -> None:
        candidate(promotion)
        promotion.live = "smollm2-135m-green"
        raise Refused("after the move")

    ran = bare(job(last_stage))
    assert not ran.result.success
    assert "after the move smollm2-135m-green is live" in ran.failure("stage_0").message
    assert ran.replicas("green") == 1
    assert ran.holder == ""


def test_the_candidate_of_another_promotion_is_left_alone(bare: Bare) -> None:
    def of_another(promotion: Promotion) -> None:
        own, promotion.id = promotion.id, "another-run"
        candidate(promotion, "blue")
        promotion.id = own
        raise Refused("ours is bad")

    assert bare(job(of_another)).replicas("blue") == 1


def test_all_stages_of_a_run_hold_one_lease(bare: Bare) -> None:
    held: list[tuple[str, str]] = []

    def look(promotion: Promotion) -> None:
        lease = promotion.client.get("Lease", "promotion-smollm2-135m")
        held.append((lease["spec"]["holderIdentity"], promotion.id))

    ran = bare(job(look, look))
    assert held == [(ran.result.run_id, ran.result.run_id)] * 2
    assert ran.holder == ""


def test_a_lost_lease_ends_the_run(bare: Bare) -> None:
    def stolen(promotion: Promotion) -> None:
        other = {"spec": {"holderIdentity": "another-run"}}
        promotion.client.patch("Lease", "promotion-smollm2-135m", other)
        time.sleep(TTL_S)  # the heartbeat is faster

    ran = bare(job(stolen, nothing))
    assert "another-run" in ran.failure("stage_1").message


def test_a_retry_is_not_the_end(bare: Bare) -> None:
    tries: list[int] = []

    def flaky(promotion: Promotion) -> None:
        tries.append(len(tries))
        candidate(promotion)
        if len(tries) == 1:
            raise dg.RetryRequested(max_retries=1, seconds_to_wait=0)

    ran = bare(job(flaky))
    assert ran.result.success
    assert tries == [0, 1]
    assert [s["outcome"] for s in ran.stages] == ["passed"]


def test_what_a_killed_run_left_is_cleared_up_first(bare: Bare) -> None:
    def killed(promotion: Promotion) -> None:
        promotion.id = promotion.live = "killed-run"
        candidate(promotion)

    assert bare(job(killed)).replicas("green") == 1
    assert bare(job(nothing)).replicas("green") == 0


def test_a_run_beside_a_live_one_is_refused(bare: Bare, client: Client) -> None:
    with Lease.acquire(client, "promotion-smollm2-135m", "another-run", ttl_s=TTL_S) as other:
        ran = bare(job(candidate))
        message = ran.failure("stage_0").message
        other.release()
    assert "another-run" in message
    assert "kubectl" in message
    assert client.find("Deployment", "smollm2-135m-green") is None


def test_a_killed_run_is_succeeded_when_its_lease_has_expired(bare: Bare, client: Client) -> None:
    Lease.acquire(client, "promotion-smollm2-135m", "killed-run", ttl_s=TTL_S)  # no heartbeat
    assert bare(job(nothing)).result.success


def test_a_missing_platform_part_is_told_before_anything_is_changed(
    bare: Bare, client: Client, cluster: ClusterSpec
) -> None:
    client.delete("ServiceAccount", "vllm-engine")
    ran = bare(job(candidate))
    assert "ServiceAccount vllm-engine is missing" in ran.failure("stage_0").message
    assert "python -m k8s platform" in ran.failure("stage_0").message
    assert client.find("Lease", "promotion-smollm2-135m") is None


def fails_at_first(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, times: int = 1
) -> list[str]:
    """Makes the clearing up raise `error` so often, then work. Returns the log of its calls."""
    calls: list[str] = []
    really = rollout.abandon

    def abandon(*args: Any, **options: Any) -> list[str]:
        calls.append("abandon")
        if len(calls) <= times:
            raise error
        return really(*args, **options)

    monkeypatch.setattr(rollout, "abandon", abandon)
    return calls


@pytest.mark.parametrize(
    "error", [Unreachable("API server away"), KeyboardInterrupt(), ZeroDivisionError("a bug")]
)
def test_what_could_not_be_cleared_up_is_tried_again_when_the_run_ends(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = fails_at_first(monkeypatch, error)
    ran = bare(job(candidate, refuse))
    assert calls == ["abandon"] * 2
    assert ran.replicas("green") == 0
    assert ran.holder == ""


def test_an_outage_is_not_left_after_one_try(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotions, "BRING_BACK_PAUSE_S", 0.1)
    calls = fails_at_first(monkeypatch, Unreachable("API server away"), times=3)

    def made_room(promotion: Promotion) -> None:
        promotion.outage = True
        candidate(promotion)
        raise Refused("too slow")

    ran = bare(job(made_room))
    assert calls == ["abandon"] * 4
    assert ran.replicas("green") == 0
    assert ran.stages[-1]["outcome"] == "refused"


def test_an_outage_is_fought_for_only_once(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotions, "BRING_BACK_S", 1.0)
    monkeypatch.setattr(promotions, "BRING_BACK_PAUSE_S", 0.1)
    calls = fails_at_first(monkeypatch, Unreachable("API server away"), times=999)
    before_the_end: list[int] = []
    really = Promotion.end

    def end(promotion: Promotion) -> None:
        before_the_end.append(len(calls))
        really(promotion)

    monkeypatch.setattr(Promotion, "end", end)

    def made_room(promotion: Promotion) -> None:
        promotion.outage = True
        candidate(promotion)
        raise Refused("too slow")

    ran = bare(job(made_room))
    assert before_the_end == [len(calls) - 1]
    assert ran.holder == ""


def test_what_could_not_be_cleared_up_is_said_with_what_comes_next(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fails_at_first(monkeypatch, Unreachable("API server away"), times=9)
    bare(job(candidate, refuse))
    said = [line for line in capfd.readouterr().err.splitlines() if "Not everything" in line]
    assert [line.rpartition("API server away ")[2] for line in said] == [
        "It is tried once more when the run ends.",
        f"The next promotion of {MODEL} does it.",
    ]


def test_an_interrupt_claims_nothing_that_was_not_done(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at_first(monkeypatch, Unreachable("API server away"), times=9)

    def interrupted(promotion: Promotion) -> None:
        candidate(promotion)
        raise KeyboardInterrupt

    message = bare(job(interrupted)).failure("stage_0").message
    assert "cleared up by the next run" in message
    assert "what was live before is live now" not in message


def test_a_first_move_that_failed_and_left_users_with_the_candidate_is_told(bare: Bare) -> None:
    def half_moved(promotion: Promotion) -> None:
        candidate(promotion)
        traffic.apply_service(promotion.client, promotion.model, promotion.cluster, "green")
        raise WaitTimeout("the endpoints don't come right", last_state="")

    ran = bare(job(half_moved))
    assert "come right smollm2-135m-green is live." in ran.failure("stage_0").message
    assert ran.replicas("green") == 1


def test_a_report_that_can_not_be_written_fails_no_run(bare: Bare, tmp_path: Path) -> None:
    def in_the_way(promotion: Promotion) -> None:
        (tmp_path / promotion.model.name / promotion.id / "stages.jsonl").mkdir(parents=True)

    assert bare(job(in_the_way)).result.success


@pytest.mark.parametrize("given_back", [False, True])
def test_a_run_that_was_killed_is_told_to_dagster(
    bare: Bare, client: Client, given_back: bool
) -> None:
    stages = job(nothing)
    with dg.DagsterInstance.ephemeral() as instance:
        other = instance.create_run_for_job(stages, status=dg.DagsterRunStatus.STARTED)
        lease = Lease.acquire(client, f"promotion-{MODEL}", other.run_id, ttl_s=TTL_S)
        if given_back:  # then it is at its end, and tells Dagster itself
            lease.release()
        ran = bare(stages, instance)
        assert ran.result.success
        found = instance.get_run_by_id(other.run_id)
        assert found is not None
        if given_back:
            assert found.status == dg.DagsterRunStatus.STARTED
        else:
            assert found.status == dg.DagsterRunStatus.FAILURE
            [event] = [
                log.dagster_event
                for log in instance.all_logs(other.run_id, dg.DagsterEventType.RUN_FAILURE)
            ]
            assert event is not None
            assert f"Run {ran.result.run_id} has taken over" in (event.message or "")
