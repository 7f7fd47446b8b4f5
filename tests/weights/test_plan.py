"""One set of weights, nothing unsafe, everything complete."""

import json
from pathlib import Path

import pytest

from tests.weights.conftest import TEMPLATE, index
from weights import plan
from weights.errors import (
    EmptyRepository,
    MissingShard,
    NoChatTemplate,
    NotAnAdapter,
    NoWeights,
    PickleRefused,
    Place,
    UnsafeName,
)
from weights.manifest import File, Selection

PLACE = Place("org/name", "c" * 40)
COMMON = ("config.json", "tokenizer.json")


def files(*paths: str) -> list[File]:
    return [File(path, 1, sha256="0" * 64) for path in paths]


def chosen(*paths: str, **selection: object) -> set[str]:
    return {f.path for f in plan.choose(files(*paths), Selection(**selection), PLACE)}  # type: ignore[arg-type]


def test_safetensors_are_taken_and_the_same_weights_in_other_forms_left() -> None:
    again = (
        "pytorch_model.bin",
        "model.pth",
        "original/consolidated.00.pth",
        "original/params.json",
        "tf_model.h5",
        "onnx/model.onnx",
        "training_args.bin",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
    )
    kept = (*COMMON, "model.safetensors", "chat_template.jinja", "params.json")
    assert chosen(*kept, *again, ".gitattributes") == set(kept)


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def test_of_an_adapter_just_what_is_served() -> None:
    beside = (
        "README.md",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "tokenizer.json",
        "checkpoint-500/adapter_model.safetensors",
        "model.safetensors",
    )
    assert chosen(*ADAPTER, *beside, adapter=True) == set(ADAPTER)


def test_what_is_no_adapter() -> None:
    missing = "has no adapter_config.json and no adapter_model.safetensors"
    with pytest.raises(NotAnAdapter, match=f"{missing}$"):
        chosen(*COMMON, "model.safetensors", adapter=True)
    with pytest.raises(NotAnAdapter, match=r"has no adapter_config\.json$"):
        chosen("adapter_model.safetensors", adapter=True)
    with pytest.raises(NotAnAdapter, match=r"has no adapter_config\.json and no"):
        chosen(*(f"checkpoint-500/{path}" for path in ADAPTER), adapter=True)
    with pytest.raises(PickleRefused, match=r"adapter_model\.bin"):
        chosen("adapter_config.json", "adapter_model.bin", adapter=True)


def test_a_repository_with_consolidated_alone_keeps_it() -> None:
    only = ("consolidated.safetensors", "params.json", "tekken.json")
    assert chosen(*only) == set(only)


def test_shards_beside_consolidated_and_a_template_that_allow_forgets() -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    paths = (*COMMON, *shards, "model.safetensors.index.json", "consolidated.safetensors")
    got = chosen(*paths, "chat_template.jinja", allow=("*.safetensors", "*.json"))
    assert got == {*COMMON, *shards, "model.safetensors.index.json", "chat_template.jinja"}


def test_pickle_needs_permission() -> None:
    paths = (*COMMON, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    with pytest.raises(PickleRefused, match=r"pytorch_model-00001-of-00002\.bin") as refused:
        chosen(*paths)
    assert "allow_pickle" in refused.value.next_step
    assert chosen(*paths, allow_pickle=True) == set(paths)


def test_nothing_to_fetch_is_said() -> None:
    with pytest.raises(EmptyRepository):
        chosen()
    with pytest.raises(NoWeights):
        chosen(*COMMON)
    with pytest.raises(NoWeights, match=r"ignore \['\*\.safetensors'\]"):
        chosen(*COMMON, "model.safetensors", ignore=("*.safetensors",))
    for pattern in ({"ignore": ("*",)}, {"allow": ("nothing-like-this",)}):
        [(name, given)] = pattern.items()
        with pytest.raises(NoWeights, match="the patterns leave none of its") as refused:
            chosen(*COMMON, "model.safetensors", **pattern)
        assert f"{name} {list(given)}" in str(refused.value)
        assert f"--{name}" in refused.value.next_step


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "a/../../b.json", "/etc/passwd", "a//b.json", "a\\b", "C:/x", "a\nb"],
)
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(UnsafeName) as refused:
        chosen("model.safetensors", name)
    assert refused.value.place == PLACE.of(name)


def test_our_manifests_name_is_refused_unless_left_out() -> None:
    with pytest.raises(UnsafeName, match="manifest"):
        chosen("model.safetensors", "MANIFEST.json")
    left = chosen("model.safetensors", "MANIFEST.json", ignore=("MANIFEST.json",))
    assert left == {"model.safetensors"}


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(
        index(a="model-1.safetensors", b="model-2.safetensors")
    )
    everything = files("model-1.safetensors", "model.safetensors.index.json")
    with pytest.raises(MissingShard, match=r"model-2\.safetensors, which the commit doesn't have"):
        plan.check_shards(tuple(everything), everything, tmp_path, PLACE)
    excluded = [*everything, *files("model-2.safetensors")]
    with pytest.raises(MissingShard, match="the patterns leave out"):
        plan.check_shards(tuple(everything), excluded, tmp_path, PLACE)


def test_a_whole_file_beside_the_shards_is_the_same_weights_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index(a="model-1.safetensors"))
    everything = files("model-1.safetensors", "model.safetensors", "model.safetensors.index.json")
    left = plan.check_shards(tuple(everything), everything, tmp_path, PLACE)
    assert "model.safetensors" not in {file.path for file in left}


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    everything = files("model.safetensors.index.json")
    with pytest.raises(MissingShard, match="no index"):
        plan.check_shards(tuple(everything), everything, tmp_path, PLACE)


def test_chat_wants_a_template_of_either_kind(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(NoChatTemplate, match="400"):
        plan.check_chat(["tokenizer_config.json"], tmp_path, PLACE)
    plan.check_chat(["tokenizer_config.json", "chat_template.jinja"], tmp_path, PLACE)
    config.write_text(json.dumps(TEMPLATE))
    plan.check_chat(["tokenizer_config.json"], tmp_path, PLACE)
