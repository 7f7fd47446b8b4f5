"""What the asset shows of a smoke test."""

from dataclasses import replace

from assets.gpu_smoke_test import shown
from k8s.gpus import Gpu
from k8s.smoke import Answer, SmokeReport

GPU = Gpu(0, "NVIDIA L4", "GPU-1", memory_total_mib=23_034, memory_used_mib=4, driver="570.86")
REPORT = SmokeReport(
    gpus=(GPU,),
    driver=GPU.driver,
    health=200,
    model_id="smollm2-135m",
    model_root="/weights/x",
    answers=(Answer("What is the capital of France?", "Paris", "Lyon.", 7, 2, ok=False),),
    tokens_advanced=9,
    failures=("it answers 'Lyon.'",),
)


def test_what_was_asked_and_answered_is_shown() -> None:
    facts = {name: getattr(value, "value", value) for name, value in shown(REPORT).items()}
    assert facts == {
        "gpus": ["NVIDIA L4 GPU-1"],
        "driver": "570.86",
        "answers": [
            {"prompt": "What is the capital of France?", "expected": "Paris", "given": "Lyon."}
        ],
        "failures": ["it answers 'Lyon.'"],
    }


def test_an_engine_without_any_gpu_can_be_shown() -> None:
    facts = shown(replace(REPORT, gpus=(), driver="", answers=()))
    assert facts["gpus"].value == []
