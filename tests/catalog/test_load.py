"""A wrong catalog file is refused with file, line, field and what is allowed."""

import shutil
from pathlib import Path

import pytest

from catalog import CatalogError, PoolError, load_catalog
from catalog.load import HERE


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
        ("required_rate: 6", "required_rate: 40", "slo.required_rate: 40 is above the last"),
        ("rates: [6, 10, 16]", "rates: [10, 6, 16]", "the ladder must ascend"),
        ("max_replicas: 2", "max_replicas: 0", "scaling.max_replicas"),
        ("min_replicas: 1", "min_replicas: 3", "min_replicas: 3 is above max_replicas (2)"),
        ("start_seconds_min: 60", "start_seconds_min: 601", "601 is above start_seconds_max (600)"),
        ("  memory: 512Mi", "  memory: '0'", "resources.memory: '0' is no Kubernetes quantity"),
        ("growth: 0.02", "growth: .inf", "scaling.growth: Input should be a finite number"),
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
            "traffic.trace.path: String should match",
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
        ("name: sql", "name: a=b", "adapters.0.name: String should match pattern"),
        ("name: sql", "rank: 8\n    name: sql", "is no field here; allowed: name, repo, revision"),
        ("repo: lab/smollm2-135m-lora", "repo: adapters", "adapters.0.repo: String should match"),
        ("revision: v2", "revision: 2", "adapters.1.revision: Input should be a valid string"),
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
    ("args", "flag"),
    [
        ("[--enforce-eager, --tensor_parallel_size=4]", "--tensor-parallel-size"),
        ("[--enforce-eager, --tensor-par, '4']", "--tensor-parallel-size"),
        ("[--enforce-eager, -t, '4']", "-tp"),
        ("[--enforce-eager, -tp=4]", "-tp"),
        ("[--enforce-eager, --config, /tmp/a.yaml]", "--config"),
    ],
)
def test_a_reserved_flag_is_known_however_vllm_takes_it(folder: Path, args: str, flag: str) -> None:
    old = "args:\n  - --dtype=bfloat16\n  - --max-model-len=2048\n"
    line = edit(folder, "models/smollm2-135m.yaml", old, f"args: {args}\n")
    expected = f"smollm2-135m.yaml:{line}: args.1: {flag} is set by the pipeline, from "
    assert expected in refusal(folder)


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
    trace.write_text((RECORDED % (0, 10)) * 20_000)
    assert "at most 900000 fit into the ConfigMap" in refusal(folder)


def test_a_missing_field_is_named(folder: Path) -> None:
    edit(folder, "models/smollm2-135m.yaml", "repo: HuggingFaceTB/SmolLM2-135M-Instruct\n", "")
    assert "models/smollm2-135m.yaml:1: repo: is missing" in refusal(folder)


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
    with pytest.raises(CatalogError, match=r"no model 'gpt-2'.*smollm2-135m"):
        load_catalog().model("gpt-2")


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
