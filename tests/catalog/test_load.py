"""A wrong catalog file is refused with file, line, field and what is allowed."""

import random
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from catalog import CatalogError, ModelSpec, PoolError, load_catalog
from catalog.load import HERE, load_file
from catalog.spec import STORED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("models", "clusters"):
        shutil.copytree(HERE / kind, tmp_path / kind)
    return tmp_path


def edit(folder: Path, file: str, old: str, new: str) -> int:
    """Replace `old` once; returns the line, from 1, on which it stood."""
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


def refusal(folder: Path) -> str:
    with pytest.raises(CatalogError) as caught:
        load_catalog(folder)
    return str(caught.value)


def test_the_catalog_of_this_repository_loads() -> None:
    catalog = load_catalog()
    assert {"smollm2-135m", "llama-3.1-8b-instruct", "qwen2.5-32b-instruct"} <= set(catalog.models)
    assert {"lab", "lab-vllm", "eks-example", "gke-example"} <= set(catalog.clusters)


@pytest.mark.parametrize("value", ["0.5", "0", '"1"', "-1", "9"])
def test_gpus_count_must_be_a_whole_number_of_gpus_of_a_node(folder: Path, value: str) -> None:
    line = edit(folder, "models/smollm2-135m.yaml", "count: 1", f"count: {value}")
    message = refusal(folder)
    assert f"models/smollm2-135m.yaml:{line}: gpus.count: " in message
    assert value.strip('"') in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("served_name:", "servedname:", "servedname: is no field here; allowed: repo, revision"),
        ("  cpu: 100m", "  cpu: lots", "resources.cpu: 'lots' is no Kubernetes quantity"),
        ("@sha256:8a69", "-8a69", "has no digest; pin it"),
        ("--dtype=bfloat16", "--model=x", "--model is set by the pipeline, from repo"),
        (
            "--dtype=bfloat16",
            "--lora-modules=a=/b",
            "--lora-modules is set by the pipeline, from a",
        ),
        ("rates: [6, 10, 16]", "rates: [10, 6, 16]", "the ladder must ascend"),
        ("max_replicas: 2", "max_replicas: 0", "scaling.max_replicas"),
        ("min_replicas: 1", "min_replicas: 3", "min_replicas: 3 is above max_replicas (2)"),
        ("start_seconds_min: 60", "start_seconds_min: 601", "601 is above start_seconds_max (600)"),
        ("  memory: 512Mi", "  memory: '0'", "resources.memory: '0' is no Kubernetes quantity"),
        ("growth: 0.02", "growth: .inf", "scaling.growth: must be a finite number, got inf"),
        (
            "prompt_tokens: 64",
            "prompt_tokens: 2",
            "traffic.prompt_tokens: 2 tokens can't be unique",
        ),
        ("timeout_seconds: 20", "timeout_seconds: 0.5", "traffic.timeout_seconds: 0.5 s must be"),
        ("prompt_tokens: 64", "prompt_tokens: 2033", "2049 tokens, --max-model-len allows 2048"),
        (
            "output_tokens: 16",
            "output_tokens: many",
            "traffic.output_tokens: must be a number, unif",
        ),
        ("output_tokens: 16", "output_tokens: trace", "traffic.output_tokens: is to come from a"),
        ("arrival: poisson", "trace: {path: x.jsonl}", "traffic.trace: nothing comes from it"),
        (
            "arrival: poisson",
            "trace: {path: ../x.jsonl}\n  arrival: trace",
            "traffic.trace.path: '../x.jsonl' must match [\\w.-]+\\.jsonl, e.g. chat.jsonl",
        ),
        (
            "arrival: poisson",
            "trace: {path: x.jsonl, prefixes: true}\n  arrival: trace",
            "traffic.trace.prefixes: need prompt_tokens: trace",
        ),
        (
            "arrival: poisson",
            "trace: {path: x.jsonl}\n  arrival: trace",
            "x.jsonl: can't be read: No such file",
        ),
        (
            "output_tokens: 16",
            "output_tokens: {uniform: {min: 9, max: 3}}",
            "traffic.output_tokens.uniform.min: 9 is above max (3)",
        ),
        (
            "output_tokens: 16",
            "output_tokens: {lognormal: {median: 9, p95: 90, most: 99}}",
            "lognormal.most: is no field here; allowed: median, p95, max",
        ),
        (
            "prompt_tokens: 64",
            "prompt_tokens: {lognormal: {median: 200, p95: 900, max: 4000}}",
            "4016 tokens, --max-model-len allows 2048",
        ),
        ("  growth: 0.02", "  max_replicas: 2", "'max_replicas' stands here twice"),
        ("smoke:", "smoke: [}", "is not valid YAML"),
        ("slo:", "slo: fast\nslos:", "slo: must be a mapping of fields to values, got 'fast'"),
        ("rates: [6, 10, 16]", "rates: 6", "traffic.rates: must be a list, got 6"),
        ("count: 1", "count: 0.5", "gpus.count: must be a whole number, got 0.5"),
        ("revision: main", "revision:", "revision: must be text, got nothing"),
        (
            "revision: main",
            "revision: 0123",
            "'0123' is 83 in YAML; write that, or put it in quotes",
        ),
        ("revision: main", "revision: ''", "revision: must not be empty, got ''"),
        ("revision: main", 'revision: "{{ .Values.rev }}"', "is no branch, tag or commit"),
        ("revision: main", "revision: ${REVISION}", "'${REVISION}' is no branch, tag or commit"),
        ("revision: main", "revision: ../../x", "'../../x' is no branch, tag or commit"),
        ("served_name: smollm2-135m", "served_name: --host=0.0.0.0", "served_name: '--host=0.0.0"),
        ("served_name: smollm2-135m", 'served_name: "{{ .x }}"', "served_name: '{{ .x }}' must"),
        ("image: ", "image: ${REGISTRY}/", "has no digest; pin it"),
        ("smoke:", 'env: {"a b": x}\nsmoke:', "'a b' is no name of a variable"),
        ("smoke:", "env: {my_password: x}\nsmoke:", "my_password: secrets don't belong"),
        ("smoke:", "env: {HF_HUB_OFFLINE: '0'}\nsmoke:", "env.HF_HUB_OFFLINE: is set by the pipe"),
        ("smoke:", "env: {CUDA_VISIBLE_DEVICES: '0'}\nsmoke:", "is set by the device plugin, say"),
        ("  memory: 512Mi", "  memory: 512m", "resources.memory: '512m' is 0.512 bytes, not with"),
        ("  memory: 512Mi", "  memory: '512'", "resources.memory: '512' is 512 bytes, not within"),
        ("  memory: 512Mi", "  memory: 9999999Ti", "resources.memory: '9999999Ti' is 1.09951e+19"),
        ("  cpu: 100m", "  cpu: 4Gi", "resources.cpu: '4Gi' is not within 1m and 1024 cores"),
        ("max_replicas: 2", "max_replicas: 2147483648", "must be at most 2147483647: Kubernetes"),
        ("start_seconds_max: 600", "start_seconds_max: 600000", "at most 86400: a day; these are"),
        ("drain_seconds: 10", "drain_seconds: 3000000000", "rollout.drain_seconds: must be at mo"),
        ("expect: Paris", 'expect: " "', "smoke.0.expect: ' ' must match"),
        ("expect: Paris", 'expect: ""', "smoke.0.expect: '' must match"),
        ("max_tokens: 32", "max_tokens: 2048", "smoke.0.max_tokens: with a prompt these are 2049"),
        ("count: 1", "products: [NVIDIA L4]\n  count: 1", "gpus.products.0: 'NVIDIA L4' must mat"),
        ("required_rate: 6", "required_rate: yes", "slo.required_rate: must be a number, got true"),
        ("required_rate: 6", "required_rate: '6'", "slo.required_rate: must be a number, got '6'"),
        ("required_rate: 6", "required_rate: 1:30", "required_rate: '1:30' is 90 in YAML; write"),
        ("required_rate: 6", "required_rate: 0x10", "required_rate: '0x10' is 16 in YAML; write"),
        ("max_replicas: 2", "max_replicas: 010", "scaling.max_replicas: '010' is 8 in YAML"),
        ("rates: [6, 10, 16]", "rates: [yes, 10]", "traffic.rates.0: must be a number, got true"),
        ("growth: 0.02", "growth: on", "scaling.growth: must be a number, got true"),
        ("shm: 64Mi", "shm: 1Gi", "1Gi is a part of memory (512Mi), and"),
        ("  cpu: 100m", "  cpu: 0.1m", "resources.cpu: '0.1m' is not within 1m and 1024 cores"),
        ("--dtype=bfloat16", "--runner=pooling", "--runner: must be generate, or nobody gets"),
        ("smoke:", "env: {A: '{{ .x }}'}\nsmoke:", "env.A: '{{ .x }}' is a template that nobody"),
        (
            "arrival: poisson",
            "gamma_shape: 0.5",
            "traffic.gamma_shape: 0.5 does nothing with arrival: poisson; say arrival: gamma, or",
        ),
        (
            "arrival: poisson",
            "rate_range: [1, 64]",
            "traffic.rate_range: does nothing with mode: ladder; say mode: search, or take it out",
        ),
        ("revision: main", "name: x\nrevision: main", "name: is taken from the file's name"),
    ],
)
def test_a_mistake_in_a_model_is_named(folder: Path, old: str, new: str, expected: str) -> None:
    line = edit(folder, "models/smollm2-135m.yaml", old, new)
    message = refusal(folder)
    assert f"models/smollm2-135m.yaml:{line}: " in message
    assert expected in message


ADAPTERS = """adapters:
  - name: sql
    repo: lab/smollm2-135m-lora
    revision: main
  - name: legal.v2
    repo: lab/smollm2-135m-lora
    revision: v2
smoke:"""


@pytest.mark.parametrize(
    ("rate_range", "expected"),
    [
        ("[64, 1]", "traffic.rate_range: 64 is above 1: write [lowest, highest]"),
        ("[1]", "traffic.rate_range.1: is missing"),
        ("[1, 2, 3]", "traffic.rate_range: must have at most 2 items, not 3, got [1, 2, 3]"),
        ("[8, 64]", "slo.required_rate: 6 is not within traffic.rate_range (8 to 64)"),
    ],
)
def test_a_search_needs_its_range(folder: Path, rate_range: str, expected: str) -> None:
    new = f"mode: search\n  rate_range: {rate_range}"
    edit(folder, "models/smollm2-135m.yaml", "rates: [6, 10, 16]", new)
    [line] = refusal(folder).splitlines()
    assert expected in line


def test_the_ladder_is_run_at_the_required_rate_wherever_that_is(folder: Path) -> None:
    edit(folder, "models/smollm2-135m.yaml", "required_rate: 6", "required_rate: 40")
    assert load_catalog(folder).model("smollm2-135m").slo.required_rate == 40


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("models/smollm2-135m.yaml", "expect: Paris", "expects: Paris", ["expect", "expects"]),
        ("clusters/lab.yaml", "gpus: 4", "gpus: 0", ["node_pools.0.gpus"]),
    ],
)
def test_a_list_whose_one_item_is_wrong_is_not_called_too_short(
    folder: Path, file: str, old: str, new: str, expected: list[str]
) -> None:
    edit(folder, file, old, new)
    message = refusal(folder)
    assert "at least 1 item" not in message
    assert [line.split(": ")[1].removeprefix("smoke.0.") for line in message.splitlines()] == (
        expected
    )


def test_an_empty_list_is_too_short(folder: Path) -> None:
    text = (folder / "clusters/lab.yaml").read_text()
    start, end = text.index("node_pools:"), text.index("simulated:")
    (folder / "clusters/lab.yaml").write_text(text[:start] + "node_pools: []\n" + text[end:])
    assert "node_pools: must have at least 1 item, not 0" in refusal(folder)


def test_adapters_are_loaded(folder: Path) -> None:
    edit(folder, "models/smollm2-135m.yaml", "smoke:", ADAPTERS)
    adapters = load_catalog(folder).models["smollm2-135m"].adapters
    assert [(a.name, a.revision) for a in adapters] == [("sql", "main"), ("legal.v2", "v2")]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: legal.v2", "name: sql", "adapters.1.name: 'sql' is the name of adapters.0 already"),
        (
            "name: sql",
            "name: smollm2-135m",
            "adapters.0.name: 'smollm2-135m' is the name of served_name already",
        ),
        ("name: sql", "name: a=b", "adapters.0.name: 'a=b' must match "),
        ("name: sql", "rank: 8\n    name: sql", "is no field here; allowed: name, repo, revision"),
        (
            "repo: lab/smollm2-135m-lora",
            "repo: adapters",
            "adapters.0.repo: 'adapters' must match ",
        ),
        ("revision: v2", "revision: 2", "adapters.1.revision: must be text, got 2; put it in"),
    ],
)
def test_a_mistake_in_an_adapter_is_named(folder: Path, old: str, new: str, expected: str) -> None:
    edit(folder, "models/smollm2-135m.yaml", "smoke:", ADAPTERS)
    line = edit(folder, "models/smollm2-135m.yaml", old, new)
    message = refusal(folder)
    assert f"models/smollm2-135m.yaml:{line}: " in message
    assert expected in message


@pytest.mark.parametrize("resource", ["cpu", "memory", '""', "gpu", "nvidia.com/"])
def test_gpus_resource_must_be_an_extended_one(folder: Path, resource: str) -> None:
    old, new = "  count: 1\n", f"  count: 1\n  resource: {resource}\n"
    line = edit(folder, "models/smollm2-135m.yaml", old, new) + 1
    assert f"models/smollm2-135m.yaml:{line}: gpus.resource: " in refusal(folder)


@pytest.mark.parametrize(
    ("args", "fits"),
    [
        ("[--max-model-len=80]", True),
        ("[--max_model_len=79]", False),
        ("[--max-model-len, '79', --enforce-eager]", False),
        ("[--max-model-len=1k]", True),
        ("[--max-model-len=auto]", True),
        ("[--max-model-len=8192, --max-model-len=79]", False),
        ("[--tokenizer-mode=auto, --model-impl=auto]", True),
    ],
)
def test_the_load_must_fit_into_the_context(folder: Path, args: str, fits: bool) -> None:
    edit(folder, "models/smollm2-135m.yaml", "args:\n  - --dtype=bfloat16\n", f"args: {args}\n")
    edit(folder, "models/smollm2-135m.yaml", "  - --max-model-len=2048\n", "")
    if fits:
        load_catalog(folder)
    else:
        assert "traffic.prompt_tokens: with output_tokens these are 80 tokens" in refusal(folder)


TRACED = "arrival: trace\n  trace: {path: chat.jsonl}"
RECORDED = '{"timestamp": %d, "input_length": %d, "output_length": 9}\n'


def test_a_trace_lies_beside_the_model(folder: Path) -> None:
    edit(folder, "models/smollm2-135m.yaml", "arrival: poisson", TRACED)
    edit(folder, "models/smollm2-135m.yaml", "prompt_tokens: 64", "prompt_tokens: trace")
    trace = folder / "models" / "chat.jsonl"
    trace.write_text("".join(RECORDED % (at, 10 + at) for at in range(3)))
    traffic = load_catalog(folder).model("smollm2-135m").traffic
    assert traffic.trace is not None
    assert traffic.prompt_tokens.trace
    trace.write_text(RECORDED % (0, 10) + RECORDED % (1, 2033))
    assert "2049 tokens, --max-model-len allows 2048" in refusal(folder)
    trace.write_text(RECORDED % (0, 10) + '{"timestamp": 1}\n')
    assert "traffic.trace.path: " in refusal(folder)
    assert "chat.jsonl:2: input_length: must be a whole number" in refusal(folder)
    trace.write_text((RECORDED % (0, 10)) * 20_000 + RECORDED % (1, 10))
    assert "at most 900000 fit into the ConfigMap" in refusal(folder)
    trace.write_text((RECORDED % (5, 10)) * 3)
    assert "chat.jsonl: all requests have one time, so there are no gaps" in refusal(folder)
    edit(folder, "models/smollm2-135m.yaml", "arrival: trace", "arrival: poisson")
    assert load_catalog(folder).model("smollm2-135m").traffic.trace is not None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("repo: HuggingFaceTB/SmolLM2-135M-Instruct\n", "", "1: repo: is missing"),
        ("  count: 1\n", "  products: []\n", "6: gpus.count: is missing"),
        ("arrival: poisson", "arrival: gamma", "20: traffic.gamma_shape: is missing: below 1 is"),
        ("rates: [6, 10, 16]", "mode: search", "20: traffic.rate_range: is missing: where to"),
        ("rates: [6, 10, 16]", "mode: ladder", "20: traffic.rates: is missing: the ladder, or"),
    ],
)
def test_a_missing_field_is_named(folder: Path, old: str, new: str, expected: str) -> None:
    edit(folder, "models/smollm2-135m.yaml", old, new)
    assert f"models/smollm2-135m.yaml:{expected}" in refusal(folder)


def test_what_was_promoted_once_stays_readable_when_rules_get_stricter() -> None:
    spec = load_catalog().model("smollm2-135m").model_dump()
    spec["args"] = ("--max-model-len=8k", "--data-parallel-size=2")
    spec["traffic"] |= {"gamma_shape": 2.0, "rate_range": (8.0, 64.0)}
    assert ModelSpec.model_validate(spec, context=STORED).traffic.gamma_shape == 2
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(spec)


def test_an_image_without_digest_needs_pull_policy_never(folder: Path) -> None:
    edit(folder, "clusters/lab.yaml", "pull_policy: Never", "pull_policy: IfNotPresent")
    assert "lab.local/promotion-jobs:1' has no digest" in refusal(folder)


def test_credentials_in_the_hub_endpoint_are_refused(folder: Path) -> None:
    edit(folder, "clusters/lab.yaml", "http://hub.lab", "http://u:hf_CANARY@hub.lab")
    message = refusal(folder)
    assert "hub_endpoint" in message


def test_all_mistakes_of_all_files_are_listed(folder: Path) -> None:
    edit(folder, "models/smollm2-135m.yaml", "count: 1", "count: 0")
    edit(folder, "clusters/lab.yaml", "namespace: llm", "namespace: LLM")
    message = refusal(folder)
    assert "models/smollm2-135m.yaml" in message
    assert "clusters/lab.yaml" in message


def test_two_models_may_not_share_object_names(folder: Path) -> None:
    models = folder / "models"
    shutil.copy(models / "llama-3.1-8b-instruct.yaml", models / "llama-3-1-8b-instruct.yaml")
    assert "same object name 'llama-3-1-8b-instruct'" in refusal(folder)


def test_a_node_pool_that_no_cluster_has_is_named(folder: Path) -> None:
    file = "models/llama-3.1-8b-instruct.yaml"
    line = edit(folder, file, "node_pool: gpu-24g", "node_pool: gpu-80g")
    assert f"{file}:{line}: node_pool: no cluster has a node pool 'gpu-80g'" in refusal(folder)


def test_a_model_on_a_cluster_without_its_pool_is_refused_with_the_reason() -> None:
    catalog = load_catalog()
    with pytest.raises(PoolError, match="the model wants node_pool gpu-24g"):
        catalog.cluster("lab").pool(catalog.model("llama-3.1-8b-instruct"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CatalogError, match=r"no model 'gpt-2'.*smollm2-135m.*Name one of them"):
        load_catalog().model("gpt-2")
    with pytest.raises(CatalogError, match=r"no cluster 'prod'.*lab.*Name one of them"):
        load_catalog().cluster("prod")


@pytest.mark.parametrize("suffix", ["yml", "YAML", "Yml"])
def test_a_file_that_would_not_be_read_is_to_be_renamed(folder: Path, suffix: str) -> None:
    path = folder / "models" / f"mine.{suffix}"
    path.write_text("repo: a/b\n")
    assert f"models/mine.{suffix}:1: file: isn't read; rename to mine.yaml" in refusal(folder)


GOOD = (HERE / "models/smollm2-135m.yaml").read_text()


def revision(text: str) -> str:
    """The good file with another revision."""
    return GOOD.replace("revision: main", f"revision: {text}")


# Each alias stands for ten of the one before it: 10^9 values.
BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (revision("{{ .Values.rev }}"), "3: revision: has braces for a field's name; the catalog"),
        (revision("{{ .Values.rev }}"), "is plain YAML: render a template ({{ … }}) first"),
        (revision("x\n{{- if .Values.chat }}\nchat: true"), "'; the catalog is plain YAML: render"),
        (revision("{{ .Values.rev }}-1"), "found '<scalar>'; the catalog is plain YAML: render"),
        (revision("x\n{% if chat %}"), "4: file: is not valid YAML: found character '%' that"),
        (revision("x\n{% if chat %}"), "any token; the catalog is plain YAML: render a template"),
        (
            revision("x\n? [a, b]\n: c"),
            "4: file: has a list for a field's name; put text in quotes",
        ),
        (revision("2026-13-45"), "3: revision: '2026-13-45' is a date in YAML; put it in quotes"),
        (revision("2026-01-02"), "3: revision: '2026-01-02' is a date in YAML; put it in quotes"),
        (revision("1.5e+5"), "3: revision: must be text, got 150000.0; put it in quotes"),
        (revision("on"), "3: revision: must be text, got true; put it in quotes"),
        (revision("0x_"), "3: revision: '0x_' is no number; put it in quotes"),
        (revision("!!int v1"), "3: revision: 'v1' is no number; put it in quotes"),
        (revision("!!bool maybe"), "3: revision: 'maybe' is no truth value; put it in quotes"),
        (revision("!!float ''"), "3: revision: '' is no number; put it in quotes"),
        (revision("!!timestamp x"), "3: revision: 'x' is a date in YAML; put it in quotes"),
        (revision("!!binary '!'"), "3: revision: '!' is a binary in YAML; put it in quotes"),
        (revision("!Ref x"), "3: revision: 'x' is a !Ref in YAML; put it in quotes"),
        (revision("!!set {a}"), "3: revision: has the tag tag:yaml.org,2002:set; write a plain"),
        (revision("!!python/object/apply:os.abort []"), "3: revision: has the tag "),
        (revision("1" + ":59" * 400), "3: revision: is too large a number; if it is text, put"),
        (revision("1" + ":59" * 400 + ".5"), "3: revision: '1:59"),
        (revision("0x" + "f" * 9000), "3: revision: is too large a number"),
        (revision("9" * 9000), "3: revision: '99999"),
        (revision("*x"), "3: file: is not valid YAML: found undefined alias"),
        (revision("ma\x07in"), "3: file: has the control character U+0007; remove it"),
        (revision("\x00"), "3: file: has the control character U+0000; remove it"),
        (revision('"\\ud800"'), "3: revision: must be characters that exist, got '\\ud800'"),
        (revision('x\n"a\\nb": 1'), "4: 'a\\nb': is no field here; allowed: repo, "),
        (revision("x\n1: y"), "4: file: the name '1' is a number in YAML; put it in quotes"),
        (revision("x\nenv: {ON: y}"), "4: env: the name 'ON' is a truth value in YAML; put"),
        (
            revision("x\n\ty: 1"),
            "found character '\\t' that cannot start any token; indent with spaces",
        ),
        (revision("x\n  y: 1"), "mapping values are not allowed here"),
        (
            GOOD.replace("  memory: 512Mi", " memory: 512Mi"),
            "but found '<block mapping start>'; fields of one mapping must begin in one column",
        ),
        (revision("x\n---\ny: 1"), "4: file: is not valid YAML: but found another document"),
        (GOOD.replace("args:", "args: &a [*a]\nargv:"), "12: args.0.0: is too deep or too large"),
        (GOOD.replace("slo:", "slo: &a\n  x: *a"), "28: slo.x.x: is too deep or too large"),
        (BOMB, "is too deep or too large; does an alias (*) contain itself, or others many"),
        ("[" * 3000, "1: file: is too deep or too large"),
        (
            revision("x\nenv: &e {A: b}").replace("slo:", "slo:\n  <<: *e"),
            "30: slo: << isn't taken",
        ),
        ("", "1: file: is empty, see catalog/models for examples"),
        ("# nothing yet\n", "1: file: is empty, see catalog/models for examples"),
        ("hello\n", "1: file: must be a mapping of fields, see catalog/models for examples"),
        ("- repo: a/b\n", "1: file: must be a mapping of fields, see catalog/models"),
        (b"repo: \xff\n", "1: file: is not UTF-8 text; save it as UTF-8"),
        (GOOD.encode("utf-16"), "1: file: is not UTF-8 text; save it as UTF-8"),
    ],
    ids=lambda value: str(len(value)),
)
def test_a_nasty_file_is_one_clear_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = tmp_path / "nasty.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CatalogError) as refused:
        load_file(path, ModelSpec)
    [line] = str(refused.value).splitlines()
    assert line.startswith(f"{path}:")
    assert expected in line
    assert len(line.removeprefix(str(path))) < 400


def test_a_folder_of_a_file_s_name_is_one_clear_line(folder: Path) -> None:
    (folder / "models" / "folder.yaml").mkdir()
    assert "models/folder.yaml:1: file: can't be read: Is a directory" in refusal(folder)


# What editors, templates and slips of the finger leave in a file.
BITS = ["{", "}", "[", "]", "*", "&a ", "!", "%", "@", "`", "'", '"', ":", "? ", "- ", "|", ">"]
BITS += [
    "#",
    "<<: ",
    "~",
    "=",
    ",",
    ".inf",
    "0x",
    "2026-01-01",
    "!!int ",
    "---",
    "...",
    "{{x}}",
    "*a",
]
BITS += ["\n", "\t", "\r", "\x00", "\x1b", "\u2028", "\ufeff", "é", "&a [*a]", "<<: *a\n"]


def test_whatever_stands_in_a_file_only_a_catalog_error_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "nasty.yaml"
    rng = random.Random(1)
    refused = 0
    for _ in range(400):
        text = GOOD
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(BITS) + text[at + rng.choice((0, 1, 30)) :]
        path.write_bytes(text.encode())
        try:
            load_file(path, ModelSpec)
        except CatalogError as error:
            refused += 1
            for line in str(error).splitlines():
                assert re.match(r".*nasty\.yaml:\d+: \S.*: \S", line), repr(line)
    assert refused > 200


@pytest.mark.parametrize("start", ["\ufeff", "# a comment\n", "---\n"])
def test_a_byte_order_mark_and_the_like_do_no_harm(tmp_path: Path, start: str) -> None:
    path = tmp_path / "smollm2-135m.yaml"
    path.write_bytes((start + GOOD.replace("\n", "\r\n")).encode())
    assert load_file(path, ModelSpec) == load_catalog().model("smollm2-135m")


def test_an_alias_stands_for_what_it_names_and_a_mistake_is_where_it_was_written(
    folder: Path,
) -> None:
    file = "models/smollm2-135m.yaml"
    answer = edit(folder, file, "  - prompt: What", "  - &paris\n    prompt: What")
    edit(folder, file, "traffic:", "  - *paris\ntraffic:")
    smoke = load_catalog(folder).model("smollm2-135m").smoke
    assert len(smoke) == 2
    assert smoke[0] == smoke[1]
    edit(folder, file, "max_tokens: 32", "max_tokens: 0")
    lines = refusal(folder).splitlines()
    assert [line.split("smollm2-135m.yaml:")[1].split(": must")[0] for line in lines] == [
        f"{answer + 3}: smoke.0.max_tokens",
        f"{answer + 3}: smoke.1.max_tokens",
    ]


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"cpu": "2500m"}, "lab: cpu of a node is 2, resources.cpu is 2500m"),
        ({"memory": "8.5Gi"}, "lab: memory of a node is 8Gi, resources.memory is 8.5Gi"),
        ({"memory": "9G"}, "resources.memory is 9G"),
        ({"cpu": "2", "memory": "8192Mi"}, ""),
        ({"cpu": "2000m", "memory": "8388608Ki"}, ""),
    ],
)
def test_a_pod_that_no_node_can_hold_is_refused(resources: dict[str, str], why: str) -> None:
    catalog = load_catalog()
    model = catalog.model("smollm2-135m")
    model = model.model_copy(update={"resources": model.resources.model_copy(update=resources)})
    if not why:
        assert catalog.cluster("lab").pool(model).name == "lab"
        return
    with pytest.raises(PoolError) as refused:
        catalog.cluster("lab").pool(model)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("http://hub.lab.svc:8880", "http://hub.lab.svc:88800", "hub_endpoint: 'http://hub"),
        ("labels: {}", "labels: {a b: c}", "node_pools.0.labels.a b: 'a b' must match"),
        ("labels: {}", "labels: {a: b c}", "node_pools.0.labels.a: 'b c' must match"),
        ("namespace: llm", "namespace: kube-system", "namespace: 'kube-system' has Pods of others"),
        ("namespace: llm", "namespace: default", "namespace: 'default' has Pods of others"),
        ("address: http://", "address: http://:9090 #", "prometheus.address: 'http://:9090' must"),
        ("jobs: ", "jobs: lab local #", "images.jobs: 'lab local' must match"),
        ("jobs: ", "jobs: '' #", "images.jobs: '' must match"),
        ("size: ", "size: 5m #", "storage.size: '5m' is 0.005 bytes, not within"),
        ("address: http://", "address: http://a:b@", "prometheus.address: 'http://a:b@"),
    ],
)
def test_a_mistake_in_a_cluster_is_named(folder: Path, old: str, new: str, expected: str) -> None:
    line = edit(folder, "clusters/lab.yaml", old, new)
    message = refusal(folder)
    assert f"clusters/lab.yaml:{line}: " in message
    assert expected in message


def test_a_name_that_no_service_may_have_is_refused(folder: Path) -> None:
    (folder / "models/smollm2-135m.yaml").rename(folder / "models/1model.yaml")
    assert "name: '1model' must match [a-z]" in refusal(folder)
