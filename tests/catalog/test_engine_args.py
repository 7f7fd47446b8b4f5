"""What of vLLM's command line a model may have, in every way that vLLM takes it."""

import pytest

from catalog.engine_args import check, max_model_len
from catalog.spec import Misfit


@pytest.mark.parametrize(
    "args",
    [
        ["--dtype=bfloat16", "--enforce-eager", "--gpu-memory-utilization", "0.9"],
        ["--tokenizer-mode=auto", "--model-impl=auto", "--load-format=safetensors"],
        ["--compilation-config.mode", "3", "-cc.cudagraph_mode=NONE", "-O3", "-O", "2"],
        ["--compilation-config", '{"mode": 3}', '--hf-overrides={"a": "b = c"}'],
        ["--seed", "-1", "--max-model-len", "-1", "--no-enable-prefix-caching", "-dc={}"],
        ["--cudagraph-capture-sizes", "1", "2", "4", "--enable-expert-parallel"],
        ["--max_model_len=8k", "--api-server-count=2", "--root-path=/llm", "-q", "fp8"],
    ],
)
def test_what_works_is_taken(args: list[str]) -> None:
    check(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=x"], "--model is set by the pipeline, from repo"),
        (["--tensor_parallel_size=4"], "--tensor-parallel-size is set by the pipeline, from gpus"),
        (["--tensor-par", "4"], "--tensor-parallel-size is set by the pipeline, from gpus.count"),
        (["-t", "4"], "-tp is set by the pipeline, from gpus.count"),
        (["-tp=4"], "-tp is set by the pipeline, from gpus.count"),
        (["--lora-modules=a=/b"], "--lora-modules is set by the pipeline, from adapters"),
        (["--no-enable_lora"], "--enable-lora is set by the pipeline, from adapters"),
        (["--hf-config-path=/x"], "--hf-config-path is set by the pipeline, from repo"),
        (["--config", "/tmp/a.yaml"], "--config can't be used here: its content would escape"),
        (["--config.port", "9000"], "--config can't be used here: its content would escape"),
        (["--port=9000"], "--port can't be used here: the Service and the probes ask by HTTP"),
        (["--uds=/tmp/s"], "--uds can't be used here: the Service and the probes ask by HTTP"),
        (["--ssl-keyfile=/k"], "--ssl-keyfile can't be used here: the Service and the probes ask"),
        (["--grpc"], "--grpc can't be used here: the Service and the probes ask by HTTP"),
        (["--headless"], "--headless can't be used here: a replica needs the HTTP server"),
        (["--pipeline-parallel-size=2"], "--pipeline-parallel-size can't be used here: a replica"),
        (["-pp", "2"], "-pp can't be used here: a replica is one Pod"),
        (["--data_parallel_size=2"], "--data-parallel-size can't be used here: a replica is one"),
        (["--data-par=2"], "--data-par can't be used here: a replica is one Pod"),
        (["-dpl=2"], "-dpl can't be used here: a replica is one Pod"),
        (["-n2"], "-n can't be used here: a replica is one Pod"),
        (["--api-key=k"], "--api-key can't be used here: the pipeline asks the engine without"),
        (["--hf-token=hf_x"], "--hf-token can't be used here: secrets don't belong into the"),
        (["--disable-log-stats"], "--disable-log-stats can't be used here: smoke test, bench"),
        (["--help=all"], "--help can't be used here: vLLM would print it and end"),
        (["--load-format=dummy"], "--load-format: dummy weights are random, take out the flag"),
        (["--load_format", "dummy"], "--load-format: dummy weights are random, take out the"),
        (["--api-server-count=0"], "--api-server-count: must be 1 or more, or nobody is answered"),
        (
            ["--max-model-len=abc"],
            "--max-model-len: must be tokens, e.g. 8192, 8k or auto; got ab",
        ),
        (["--max_model_len", "0"], "--max-model-len: must be tokens, e.g. 8192, 8k or auto; got 0"),
        (["--max-model-len=-5"], "--max-model-len: must be tokens, e.g. 8192, 8k or auto; got -5"),
        (["--max-model-len"], "--max-model-len: must be tokens, e.g. 8192, 8k or auto; got noth"),
        (["--max-model-len =80"], "'--max-model-len =80' is no flag: write --flag=value, or two"),
        (["--gpu-memory-utilization=92"], "--gpu-memory-utilization: must be a share of the mem"),
        (["--gpu-memory-utilization"], "--gpu-memory-utilization: must be a share of the memory"),
        (["--gpu-memory-utilization", "0"], "a share of the memory, above 0 and at most 1, e.g."),
        (["--max-num-seqs=0"], "--max-num-seqs: must be a whole number of requests, e.g. 256"),
        (["-gpu-memory-utilization=0.9"], "is no flag: a long one begins with --"),
        (["--dtype=auto "], "'--dtype=auto ' is no flag: write --flag=value, or two items"),
        (["--model x"], "'--model x' is no flag: write --flag=value, or two items"),
        (["--"], "'--' is no flag: write --flag=value, or two items"),
        (["other/model"], "'other/model' is no flag, and belongs to none before it"),
        (["--dtype=auto", "other/model"], "'other/model' is no flag, and belongs to none before"),
        (["--enable-lora-x", "other/model"], "'other/model' is no flag, and belongs to none"),
    ],
)
def test_what_cannot_work_or_undoes_a_promise_is_refused(args: list[str], message: str) -> None:
    with pytest.raises(Misfit) as refused:
        check(["--enforce-eager", *args] if args[0].startswith("-") else args)
    assert message in str(refused.value)


def test_the_place_of_the_wrong_one_is_told() -> None:
    with pytest.raises(Misfit) as refused:
        check(["--dtype", "auto", "--port", "9000"])
    assert refused.value.place == (2,)


@pytest.mark.parametrize(
    ("args", "tokens"),
    [
        ([], None),
        (["--max-model-len=8192"], 8192),
        (["--max_model_len", "8k"], 8000),
        (["--max-model-len=8K"], 8192),
        (["--max-model-len=25.6k"], 25600),
        (["--max-m=1M"], 1024**2),
        (["--max-model-len=auto"], None),
        (["--max-model-len=-1"], None),
        (["--max-model-len=1", "--max-model-len=2"], 2),
    ],
)
def test_the_context_is_read_as_vllm_reads_it(args: list[str], tokens: int | None) -> None:
    assert max_model_len(args) == tokens
