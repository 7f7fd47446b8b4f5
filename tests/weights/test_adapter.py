"""An adapter is compared with its model by the sizes of its matrices (not by what it says)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lab import model as lab_model
from tests.weights.conftest import REPO, World, model
from tests.weights.test_main import finish
from weights import adapter
from weights.errors import NotAnAdapter, Place, WeightsError, WrongBase
from weights.manifest import Selection

OF, BASE = Place("org/lora", "a" * 40), Place("org/model", "b" * 40)
CONFIG = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "/home/me/model", "bias": "none"}
Shapes = dict[str, tuple[int, ...]]

MODEL: Shapes = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.1.self_attn.q_proj.weight": (12, 8),
}


def write(path: Path, shapes: Shapes, dtype: Any = np.float16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(shape, dtype) for name, shape in shapes.items()}, path)


def matrices(module: str, inputs: int, outputs: int, rank: int = 2) -> Shapes:
    return {
        f"base_model.model.{module}.lora_A.weight": (rank, inputs),
        f"base_model.model.{module}.lora_B.weight": (outputs, rank),
    }


Q0 = matrices("model.layers.0.self_attn.q_proj", 8, 12)
DOWN0 = matrices("model.layers.0.mlp.down_proj", 16, 8)


def check(folder: Path, shapes: Shapes, base: Shapes = MODEL, **config: Any) -> adapter.Lora:
    write(folder / "lora/adapter_model.safetensors", shapes)
    (folder / "lora/adapter_config.json").write_text(json.dumps(CONFIG | config))
    # In two shards, as a large model is.
    write(folder / "base/model-00001-of-00002.safetensors", dict(list(base.items())[:2]))
    write(folder / "base/model-00002-of-00002.safetensors", dict(list(base.items())[2:]))
    return adapter.check(folder / "lora", folder / "base", OF, BASE)


def test_one_that_fits(tmp_path: Path) -> None:
    found = check(tmp_path, Q0 | DOWN0)
    assert found == adapter.Lora(rank=2, base_model="/home/me/model", modules=2, compared=2)


def test_the_rank_is_the_largest(tmp_path: Path) -> None:
    both = Q0 | matrices("model.layers.0.mlp.down_proj", 16, 8, rank=6)
    assert check(tmp_path, both, rank_pattern={"down_proj": 6}).rank == 6
    assert check(tmp_path, both).rank == 6, "as its matrices have it"
    assert check(tmp_path, both, r=7).rank == 7, "as vLLM compares it"


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (
            matrices("model.layers.0.self_attn.q_proj", 8, 16),
            r"q_proj has shape \[12, 8\] there, \[16, 8\] for the adapter",
        ),
        (Q0 | matrices("model.layers.0.mlp.down_proj", 24, 8), r"\[8, 16\] there, \[8, 24\]"),
        (
            Q0 | matrices("model.layers.2.self_attn.q_proj", 8, 12),
            r"layers.2\S+, which that hasn't",
        ),
    ],
    ids=["wider", "other inputs", "more layers"],
)
def test_one_of_another_model(tmp_path: Path, shapes: Shapes, why: str) -> None:
    with pytest.raises(WrongBase, match=rf"org/lora@a+ is no adapter of org/model@b+: .*{why}"):
        check(tmp_path, shapes)


def test_what_is_named_otherwise_is_not_compared(tmp_path: Path) -> None:
    """Checkpoints of some models name their tensors otherwise than PEFT sees the modules."""
    renamed = matrices("language_model.layers.0.self_attn.q_proj", 99, 99)
    found = check(tmp_path, renamed | Q0)
    assert (found.modules, found.compared) == (2, 1)
    assert check(tmp_path, renamed).compared == 0


def test_quantised_weights_have_no_shape_to_compare(tmp_path: Path) -> None:
    write(
        tmp_path / "q/model.safetensors",
        {"model.layers.0.self_attn.q_proj.weight": (48, 1)},
        np.uint8,
    )
    write(tmp_path / "lora/adapter_model.safetensors", Q0)
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(CONFIG))
    assert adapter.check(tmp_path / "lora", tmp_path / "q", OF, BASE).compared == 0


def test_conv1d_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    turned = matrices("model.layers.0.self_attn.q_proj", 12, 8)
    assert check(tmp_path, turned, fan_in_fan_out=True).compared == 1


@pytest.mark.parametrize(
    ("shapes", "config", "why"),
    [
        (Q0, {"peft_type": "PREFIX_TUNING"}, "is a PREFIX_TUNING adapter"),
        (Q0, {"r": "8"}, r"has ranks \['8'\]"),
        (Q0, {"r": 0}, r"has ranks \[0\]"),
        (Q0, {"r": 1024}, "has rank 1024, the largest that can be served is 512"),
        (Q0, {"use_dora": True}, "has use_dora: True, which can't be served"),
        (Q0, {"bias": "all"}, "has bias: 'all'"),
        (Q0, {"modules_to_save": ["embed_tokens"]}, "has modules_to_save"),
        ({"lm_head.weight": (8, 8)}, {}, "has no LoRA matrices"),
        (dict(list(Q0.items())[:1]), {}, "which are no pair"),
    ],
)
def test_what_can_not_be_served(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(NotAnAdapter, match=why) as error:
        check(tmp_path, shapes, **config)
    assert "catalog file" in error.value.next_step


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path / "adapter_model.safetensors", Q0)
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match="can't be read"):
        adapter.check(tmp_path, tmp_path, OF, BASE)


# As the Job runs it


def test_fetched_compared_and_found_again(world: World) -> None:
    base = world.commit(model())
    files = lab_model.adapter_files()
    lora = world.server.hub.commit("lab/lora", files)
    finish(world.start(*world.fetch_arguments(base)), 0)
    arguments = ("fetch", "--repo", "lab/lora", "--commit", lora, "--root", str(world.root))
    command = (*arguments, f"--adapter-of={REPO}@{base}")
    *_, told, result = finish(world.start(*command), 0)
    assert (result["rank"], result["modules"], result["compared"], result["hit"]) == (
        4,
        30,
        0,
        False,
    )
    assert f"its adapter_config.json says that it is for {lab_model.REPO}" in told["message"]
    published = Path(result["path"])
    assert {path.name for path in published.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "MANIFEST.json",
    }
    assert (published / "adapter_model.safetensors").read_bytes() == files[
        "adapter_model.safetensors"
    ]
    before = len(world.server.requests)
    assert finish(world.start(*command), 0)[-1]["hit"] is True
    assert len(world.server.requests) == before


def test_a_model_is_no_adapter_and_nothing_of_it_is_fetched(world: World) -> None:
    commit = world.commit(model())
    finish(world.start(*world.fetch_arguments(base := world.commit(model(x__txt=b"x")))), 0)
    world.server.requests.clear()
    command = (*world.fetch_arguments(commit), f"--adapter-of={REPO}@{base}")
    [*_, error] = finish(world.start(*command), 1)
    assert error["error"] == "NotAnAdapter"
    assert "has no adapter_config.json" in error["message"]
    assert not [r for r in world.server.requests if "/resolve/" in r.path]


def test_its_model_must_be_published_before(world: World) -> None:
    """Else it would be compared with nothing, and pass."""
    lora = world.commit(lab_model.adapter_files())
    command = (*world.fetch_arguments(lora), f"--adapter-of=lab/base@{'b' * 40}")
    [error] = finish(world.start(*command), 1)
    assert error["error"] == "NotPublished"
    assert f"lab/base@{'b' * 40} isn't published on this volume" in error["message"]
    assert "fetch it first: python -m weights fetch --repo lab/base" in error["next"]
    assert not world.server.requests, "nothing is downloaded for it"


@pytest.mark.parametrize("of", ["lab/model", "lab/model@main", "@", "../x@" + "a" * 40])
def test_what_it_is_an_adapter_of_must_be_a_commit(world: World, of: str) -> None:
    [error] = finish(world.start(*world.fetch_arguments("a" * 40), f"--adapter-of={of}"), 2)
    assert error["error"] == "UsageError"


def test_the_manifest_says_that_it_is_one(world: World) -> None:
    lora = world.commit(lab_model.adapter_files())
    world.fetch(lora, adapter=True)
    document = json.loads((world.root / REPO / lora / "MANIFEST.json").read_text())
    assert Selection(**document["selection"]).adapter is True
