"""Which of vLLM's flags a model's `args` may hold, read as vLLM's parser reads them, and which
variables its `env` may.

That takes `--a_b` for `--a-b`, `--a.b` as a part of `--a`, and the start of a flag for the whole;
a switch has its `--no-…` (vllm/utils/argparse_utils.py, vllm/entrypoints/launchers/cli_args.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from catalog.spec import Misfit

_SET = {
    "repo": "--model --tokenizer --hf-config-path",
    "revision": "--revision --tokenizer-revision --code-revision",
    "served_name": "--served-model-name",
    "gpus.count": "--tensor-parallel-size -tp",
    "rollout.drain_seconds": "--shutdown-timeout",
    "adapters": "--enable-lora --lora-modules",
    "the adapters' own configuration": "--max-lora-rank",
}
# With * at its end: all flags that begin so.
_REFUSED = {
    "the Service and the probes ask by HTTP, at port 8000 of the Pod's address": (
        "--host --port --uds --grpc* --ssl-* --enable-ssl-refresh"
    ),
    "a replica needs the HTTP server with its completions": "--headless --tokens-only",
    "a replica is one Pod, and its gpus.count GPUs are for tensor parallel": (
        "--pipeline-parallel-size -pp --prefill-context-parallel-size -pcp --data-parallel-* -dp* "
        "--nnodes -n --node-rank -r --master-addr --master-port"
    ),
    "the pipeline asks the engine without a key": "--api-key",
    "secrets don't belong into the catalog, see weights.token_secret": "--hf-token",
    "smoke test, benchmark and autoscaling read the engine's metrics": "--disable-log-stats",
    "its content would escape these checks, write it as args": "--config",
    "vLLM would print it and end": "--help -h",
}
RESERVED_ARGS = {
    flag: f"is set by the pipeline, from {source}"
    for source, flags in _SET.items()
    for flag in flags.split()
} | {
    flag: f"can't be used here: {reason}"
    for reason, flags in _REFUSED.items()
    for flag in flags.split()
}

# Set in the engine's container, whatever the catalog says.
RESERVED_ENV = frozenset(
    (
        *("HOME", "TMPDIR", "USER", "VLLM_CACHE_ROOT", "VLLM_ENGINE_READY_TIMEOUT_S"),
        *("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"),
    )
)
# The device plugin says which GPUs a container has: others are other Pods'.
_DEVICES = ["NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]

_CONTEXT = "--max-model-len"
_TOKENS = r"(\d+)(?:(\.\d+)?([kmgt])|([KMGT]))?"
# What a value must match, and what to write.
_VALUES = {
    _CONTEXT: (rf"-1|(?i:auto)|(?=.*[1-9]){_TOKENS}", "must be tokens, e.g. 8192, 8k or auto"),
    "--load-format": (r"(?!dummy$).*", "dummy weights are random, take out the flag"),
    "--api-server-count": (r"0*[1-9]\d*", "must be 1 or more, or nobody is answered"),
    "-asc": (r"0*[1-9]\d*", "must be 1 or more, or nobody is answered"),
    "--gpu-memory-utilization": (
        r"0?\.\d*[1-9]\d*|1(\.0*)?",
        "must be a share of the memory, above 0 and at most 1, e.g. 0.92",
    ),
    "--runner": (r"auto|generate", "must be generate, or nobody gets an answer"),
    "--max-num-seqs": (r"0*[1-9]\d*", "must be a whole number of requests, e.g. 256"),
}


def check(args: Sequence[str]) -> None:
    """Raises Misfit, at its place in `args`, for one that can't work here or undoes what the
    pipeline vouches for."""
    takes_value = False
    for place, arg in enumerate(args):
        if not _is_flag(arg):
            # More than one value is right for some flags, so only a first one is looked at.
            if not takes_value:
                raise Misfit(f"{arg!r} is no flag, and belongs to none before it", place)
            continue
        name, equals, _ = arg.partition("=")
        if not re.fullmatch(r"--?[A-Za-z]\S*", name) or arg != arg.strip():
            raise Misfit(f"{arg!r} is no flag: write --flag=value, or two items", place)
        if re.match(r"-\w+-", name):
            raise Misfit(f"{arg!r} is no flag: a long one begins with --", place)
        takes_value = not equals and not re.match("--(no|enable)[-_]", name)
    for place, name, value in _given(args):
        if flag := next((flag for flag in RESERVED_ARGS if _means(name, flag)), ""):
            shown = flag if not flag.endswith("*") else name
            raise Misfit(f"{shown} {RESERVED_ARGS[flag]}", place)
        for flag, (pattern, what) in _VALUES.items():
            if _means(name, flag) and not re.fullmatch(pattern, (value or "").strip()):
                raise Misfit(f"{flag}: {what}; got {value or 'nothing'}", place)


def check_env(env: Mapping[str, str]) -> None:
    """Raises Misfit for a variable whose name can't be one, or isn't the model's to set."""
    for key, value in env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise Misfit(f"{key!r} is no name of a variable, e.g. VLLM_LOGGING_LEVEL", key)
        if re.search(r"TOKEN$|_KEY$|SECRET|PASSWORD", key.upper()):
            raise Misfit(f"{key}: secrets don't belong into the catalog", key)
        if key in RESERVED_ENV:
            raise Misfit("is set by the pipeline, take it out", key)
        if key in _DEVICES:
            raise Misfit("is set by the device plugin, say gpus.count", key)
        if "{{" in value:
            raise Misfit(f"{value!r} is a template that nobody rendered", key)


def max_model_len(args: Sequence[str]) -> int | None:
    """The longest prompt with its answer, in tokens, where `args` have a number for it. By
    human_readable_int of vLLM: 8k are 8000, 8K are 8192."""
    given = [value for _, name, value in _given(args) if value and _means(name, _CONTEXT)]
    found = re.fullmatch(_TOKENS, given[-1].strip()) if given else None
    if not found:
        return None
    whole, part, decimal, binary = found.groups()
    factor: int = (1024 if binary else 1000) ** " kmgt".index((binary or decimal or " ").lower())
    return int(Decimal(whole + (part or "")) * factor)


def _is_flag(arg: str) -> bool:
    return arg.startswith("-") and not re.match(r"-\.?\d", arg)


def _given(args: Sequence[str]) -> Iterator[tuple[int, str, str | None]]:
    """Place, flag and value of each flag; what follows a switch is taken for its value."""
    for place, arg in enumerate(args):
        if _is_flag(arg):
            name, equals, value = arg.partition("=")
            name = re.sub("^--no-", "--", name.partition(".")[0].replace("_", "-"))
            following = [other for other in args[place + 1 : place + 2] if not _is_flag(other)]
            yield place, name, value if equals else next(iter(following), None)


def _means(name: str, flag: str) -> bool:
    """Whether vLLM takes `name` for `flag`. One letter may have its value right behind it."""
    stem = flag.rstrip("*")
    return stem.startswith(name) or ((stem != flag or len(stem) == 2) and name.startswith(stem))
