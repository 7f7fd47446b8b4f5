"""The smoke test against stubs of engines of each kind, through a real port-forward."""

import dataclasses
from typing import Any

import pytest

from catalog import ModelSpec
from catalog.load import catalog
from k8s import smoke
from k8s.client import Client
from k8s.gpus import Gpu
from k8s.manifests import Release, unresolved
from k8s.rollout import Rollout
from tests.k8s.api_faults import FaultyApi
from tests.k8s.manifests import rendered
from tests.k8s.simulated_node import SimulatedNode
from tests.k8s.stub_engine import StubEngine, serving

LAB = catalog().cluster("lab")
SMOLLM = catalog().model("smollm2-135m")
SMI = [
    "index, name, uuid, memory.total [MiB], memory.used [MiB], driver_version",
    "0, NVIDIA L4 SIMULATED, GPU-0, 23034 MiB, 0 MiB, 0.0.0-simulated",
]
GOOD_GPU = Gpu(0, "NVIDIA L4 SIMULATED", "GPU-0", 23034, 0, "580")


def release(model: ModelSpec = SMOLLM) -> Release:
    return Release(model, LAB, "a" * 40, "blue", "run-1", 60, unresolved(model))


def good(model: ModelSpec = SMOLLM) -> StubEngine:
    return StubEngine(model.served_name, release(model).weights_path)


def report_of(
    client: Client,
    node: SimulatedNode,
    name: str,
    engine: StubEngine,
    monkeypatch: pytest.MonkeyPatch,
    model: ModelSpec = SMOLLM,
    smi: list[str] = SMI,
) -> smoke.SmokeReport:
    monkeypatch.setattr(smoke, "COUNTERS_S", 0.5)
    # The simulated node's Pods have one container, and so its log stands for the check's.
    monkeypatch.setattr(smoke, "GPU_CHECK", "main")
    pod = node.pod(name)
    pod.start()
    pod.write(*smi)
    with serving(engine):
        monkeypatch.setattr(smoke, "PORT", engine.port)
        rollout = Rollout("d", name, "127.0.0.1", node.name, "sha256:x", "t", 1.0)
        return smoke.smoke_test(client, release(model), rollout)


def test_a_good_engine(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = good()
    report = report_of(client, node, name, engine, monkeypatch)
    assert report.failures == ()
    assert report.passed
    assert report.health == 200
    assert report.driver == "0.0.0-simulated"
    assert report.tokens_advanced == 17
    [answer] = report.answers
    assert (answer.text, answer.tokens, answer.ok) == ("It is Paris.", 7, True)
    assert "1 of 1 known answers right" in report.summary()
    [post] = engine.posts
    # Sampling is always sent, thinking is off.
    assert post["temperature"] == 0
    assert post["max_tokens"] == 32
    assert post["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"message": {"content": "L'Étoile, la Marseillaise"}}, "expected 'Paris', given 'L'Éto"),
        ({"message": {"content": "L'Étoile"}}, "prompt 'What is the capital of France"),
        ({"message": {"content": None}}, "7 tokens and no text"),
        ({"message": {"content": None, "reasoning": "Paris"}}, "Raise max_tokens"),
        ({"message": {}}, "no text"),
        ({"name": "other"}, "says the model is 'other', served_name is 'smollm2-135m'"),
        ({"root": "/models/other"}, "says the weights are '/models/other', not '/models/Hugg"),
        ({"health": 503}, "/health answers 503"),
        ({"counts": False}, "advanced by 0 prompt and 0 generated tokens, the answers used 10"),
        (
            {"counts": False, "says_usage": False},
            "advanced by 0 prompt and 0 generated tokens, the answers used 1 and 1 or more",
        ),
        ({"refuses": "messages"}, "messages is not supported"),
    ],
)
def test_a_bad_engine(
    client: Client,
    node: SimulatedNode,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    why: str,
) -> None:
    report = report_of(client, node, name, dataclasses.replace(good(), **change), monkeypatch)
    assert not report.passed
    assert why in report.summary().replace('"', "'")


def test_an_engine_that_knows_no_template_arguments(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = dataclasses.replace(good(), refuses="chat_template_kwargs")
    assert report_of(client, node, name, engine, monkeypatch).failures == ()
    assert len(engine.posts) == 2


def test_a_model_without_chat(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SMOLLM.model_copy(update={"chat": False})
    engine = good()
    assert report_of(client, node, name, engine, monkeypatch, model).passed
    assert engine.posts[0]["prompt"].startswith("What is the capital of France?")


WITH_ADAPTERS = rendered.with_adapters()
ROOT = f"/models/lab/smollm2-135m-lora/{'0' * 40}"


def test_each_adapter_is_asked(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = good()
    engine.adapters = {"sql": ROOT, "legal.v2": ROOT}
    report = report_of(client, node, name, engine, monkeypatch, WITH_ADAPTERS)
    assert report.failures == ()
    assert {of: answer.text for of, answer in report.adapters.items()} == {
        "sql": "SELECT 1;",
        "legal.v2": "SELECT 1;",
    }
    assert "adapters that answer: sql, legal.v2; " in report.summary()
    assert [post["model"] for post in engine.posts] == ["smollm2-135m", "sql", "legal.v2"]
    assert report.tokens_advanced == 3 * 17


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapters": {"sql": ROOT}}, f"adapter legal.v2 is '{ROOT}', /v1/models doesn't have it"),
        (
            {"adapters": {"sql": ROOT, "legal.v2": "/models/old"}},
            f"adapter legal.v2 is '{ROOT}', /v1/models says it is '/models/old'",
        ),
        ({"adapters": {"sql": ROOT}}, "adapter legal.v2, prompt 'What is the capital of France?"),
        ({"adapter_says": None}, "adapter sql, prompt 'What is the capital of France?"),
        ({"adapter_says": ""}, "7 tokens and no text"),
    ],
)
def test_a_bad_adapter(
    client: Client,
    node: SimulatedNode,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    why: str,
) -> None:
    engine = dataclasses.replace(good(), adapters={"sql": ROOT, "legal.v2": ROOT})
    engine = dataclasses.replace(engine, **change)
    report = report_of(client, node, name, engine, monkeypatch, WITH_ADAPTERS)
    assert not report.passed
    assert why in report.summary()


def test_an_engine_that_is_away(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = node.pod(name)
    pod.start()
    pod.write(*SMI)
    monkeypatch.setattr(smoke, "PORT", 1)
    monkeypatch.setattr(smoke, "QUICK_S", 2.0)
    monkeypatch.setattr(smoke, "ANSWER_S", 2.0)
    rollout = Rollout("d", name, "127.0.0.1", node.name, "sha256:x", "t", 1.0)
    report = smoke.smoke_test(client, release(), rollout)
    assert report.health == 0
    assert "/health doesn't answer" in report.summary()


@pytest.mark.parametrize("cut_at", ["metrics", "complete"])
def test_a_cut_connection_refuses_no_candidate(
    faulty: Client,
    faults: FaultyApi,
    node: SimulatedNode,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: str,
) -> None:
    engine = good()
    asked = []
    answer = getattr(engine, cut_at)

    def cut_the_first(*args: Any) -> Any:
        asked.append(args)
        said = answer(*args)
        if len(asked) == 1:
            faults.cut()
        return said

    monkeypatch.setattr(engine, cut_at, cut_the_first)
    report = report_of(faulty, node, name, engine, monkeypatch)
    assert report.failures == ()
    # The engine has counted what never came too, and the report says so.
    twice = cut_at == "complete"
    assert report.asked_again == int(twice)
    assert report.tokens_advanced == 17 * (1 + twice)
    assert ("advanced by 34, with 1 asked again after a cut" in report.summary()) == twice


def test_a_connection_that_is_always_cut_fails_it(
    faulty: Client,
    faults: FaultyApi,
    node: SimulatedNode,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = good()
    asked = []

    def complete(*args: Any) -> Any:
        asked.append(args)
        faults.cut()
        return 200, {}

    monkeypatch.setattr(engine, "complete", complete)
    report = report_of(faulty, node, name, engine, monkeypatch)
    assert not report.passed
    assert len(asked) == 2


def test_nvidia_smi_found_nothing(
    client: Client, node: SimulatedNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(client, node, name, good(), monkeypatch, smi=["No devices were found"])
    assert report.failures[0].endswith(
        "nvidia-smi printed no list of GPUs, but: No devices were found"
    )


# GPUs


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"memory_total_mib": 81559, "memory_used_mib": 80900}, "holds 80900 MiB of 81559 MiB"),
        ({"memory_used_mib": 600}, ""),
        ({"memory_total_mib": None, "memory_used_mib": None}, ""),
        ({"product": "Tesla T4"}, "GPU 0 is a Tesla T4, the node pool should have NVIDIA-L4"),
    ],
)
def test_gpus(change: dict[str, Any], why: str) -> None:
    failures = smoke.check_gpus([dataclasses.replace(GOOD_GPU, **change)], release())
    assert failures == [] if not why else why in failures[0]


def test_the_wrong_number_of_gpus() -> None:
    assert smoke.check_gpus([GOOD_GPU, GOOD_GPU], release()) == [
        "the Pod sees 2 GPUs, 1 were asked for"
    ]


@pytest.mark.parametrize(
    ("cluster", "product"),
    [
        ("eks-example", "NVIDIA L4"),
        ("gke-example", "NVIDIA L4"),
    ],
)
def test_products_are_spelled_in_many_ways(cluster: str, product: str) -> None:
    spec = Release(
        catalog().model("llama-3.1-8b-instruct"),
        catalog().cluster(cluster),
        "a" * 40,
        "blue",
        "run-1",
        60,
    )
    gpu = dataclasses.replace(GOOD_GPU, product=product)
    assert smoke.check_gpus([gpu], spec) == []
    small = dataclasses.replace(gpu, memory_total_mib=15360)
    assert smoke.check_gpus([small], spec) == ["GPU 0 has 15360 MiB, gpus.min_memory_mib is 22000"]
    [unknown] = smoke.check_gpus([dataclasses.replace(gpu, memory_total_mib=None)], spec)
    assert "gpus.min_memory_mib can't be checked" in unknown
