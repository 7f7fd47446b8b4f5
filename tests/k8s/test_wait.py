"""Waits: until, fail, deadline, and the last state."""

import threading
import time
from typing import Any

import pytest

from k8s.client import Client
from k8s.errors import ConditionFailed, Forbidden, WaitTimeout
from k8s.wait import wait
from tests.k8s.api_faults import Fault, FaultyApi

Obj = dict[str, Any]


def config_map(name: str, **data: str) -> Obj:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def stage(obj: Obj | None) -> str:
    return obj["data"]["stage"] if obj else "absent"


def later(client: Client, name: str, *stages: str) -> None:
    def run() -> None:
        for value in stages:
            time.sleep(0.3)
            client.apply(config_map(name, stage=value))

    threading.Thread(target=run, daemon=True).start()


def test_until_with_progress(client: Client, name: str) -> None:
    seen: list[str] = []
    later(client, name, "pulling", "running", "ready")
    obj = wait(
        client,
        "ConfigMap",
        name,
        until=lambda obj: stage(obj) == "ready",
        deadline_s=20,
        state=stage,
        progress=seen.append,
    )
    assert obj is not None
    assert seen == ["absent", "pulling", "running", "ready"]


def test_until_absent(client: Client, name: str) -> None:
    client.create(config_map(name, stage="x"))
    threading.Timer(0.3, client.delete, ("ConfigMap", name)).start()
    gone = wait(
        client, "ConfigMap", name, until=lambda obj: obj is None, deadline_s=20, state=stage
    )
    assert gone is None


def test_fails_at_once_with_the_reason(client: Client, name: str) -> None:
    later(client, name, "pulling", "broken")
    started = time.monotonic()
    with pytest.raises(ConditionFailed, match=f"ConfigMap {client.namespace}/{name}: it broke"):
        wait(
            client,
            "ConfigMap",
            name,
            until=lambda obj: stage(obj) == "ready",
            fail=lambda obj: "it broke" if stage(obj) == "broken" else None,
            deadline_s=20,
            state=stage,
        )
    assert time.monotonic() - started < 5


def test_conditions_may_depend_on_time(client: Client, name: str) -> None:
    client.create(config_map(name, stage="quiet"))
    started = time.monotonic()
    wait(
        client,
        "ConfigMap",
        name,
        until=lambda _: time.monotonic() - started > 1,
        deadline_s=20,
        state=stage,
    )
    assert time.monotonic() - started < 5


def test_deadline_names_the_last_state(client: Client, name: str) -> None:
    client.create(config_map(name, stage="pulling"))
    started = time.monotonic()
    with pytest.raises(WaitTimeout, match="not done after 1 s; last state: pulling") as error:
        wait(client, "ConfigMap", name, until=lambda _: False, deadline_s=1, state=stage)
    assert error.value.last_state == "pulling"
    assert time.monotonic() - started < 4


def test_server_away_until_the_deadline(faulty: Client, faults: FaultyApi, name: str) -> None:
    faulty.create(config_map(name, stage="pulling"))
    threading.Timer(0.5, lambda: faults.add(Fault(".", times=10**6, status=503))).start()
    threading.Timer(0.6, faults.cut).start()
    with pytest.raises(WaitTimeout, match=r"last state: pulling; now: .*HTTP status 503"):
        wait(faulty, "ConfigMap", name, until=lambda _: False, deadline_s=2, state=stage)


def test_missing_permission_ends_it(faulty: Client, faults: FaultyApi, name: str) -> None:
    faults.add(Fault("GET .*configmaps", status=403))
    with pytest.raises(Forbidden):
        wait(faulty, "ConfigMap", name, until=lambda _: False, deadline_s=20, state=stage)


def test_interrupts_pass_through(client: Client, name: str) -> None:
    def interrupt(_: Obj | None) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait(client, "ConfigMap", name, until=interrupt, deadline_s=20, state=stage)
