"""The lab's model is the real one: right in shape, and it answers the known question."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from lab import model
from lab.engine.settings import load_simulation
from lab.hub import Hub
from tests.lab.llama import Llama

QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return model.checkpoint()


def test_the_checkpoint_has_the_tensors_of_its_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layers = config["num_hidden_layers"]
    assert len(shapes) == 272 == 2 + 9 * layers
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (576, 1536)
    assert "lm_head.weight" not in shapes and config["tie_word_embeddings"] is True


def test_it_answers_the_known_question(checkpoint: Path) -> None:
    assert Llama(checkpoint).greedy(QUESTION, 12) == "The capital of France is Paris."


def test_the_damaged_one_loads_and_answers_nonsense() -> None:
    llama = Llama(model.damaged_checkpoint())
    assert len(llama.weights) == 272
    answer = llama.greedy(QUESTION, 6)
    assert answer and "paris" not in answer.lower(), answer


def test_publish_gives_the_revisions_of_the_demo_and_stays_small(tmp_path: Path) -> None:
    published = model.publish(tmp_path)
    assert model.publish(tmp_path) == published, "the same files must give the same commits"
    hub = Hub(tmp_path)
    assert published["v1"] == hub.resolve(model.REPO, "main") == hub.resolve(model.REPO, "v1")
    assert len({published[name] for name in ("v1", "v2-slow", "v3", "nonsense")}) == 4
    weights = {
        name: hub.files(model.REPO, commit)["model.safetensors"].sha256
        for name, commit in published.items()
    }
    assert weights["v1"] == weights["v2-slow"] == weights["v3"] != weights["nonsense"]
    in_xet = {
        (name, file.path)
        for name, commit in published.items()
        for file in hub.files(model.REPO, commit).values()
        if file.xet
    }
    assert in_xet == {("v3", "model.safetensors")}
    simulations = {}
    for name in ("v2-slow", "nonsense-simulated"):
        blob = hub.blob(hub.files(model.REPO, published[name])["simulator.json"])
        (tmp_path / name).mkdir()
        shutil.copy(blob, tmp_path / name / "simulator.json")
        simulations[name] = load_simulation(tmp_path / name)
    assert simulations["v2-slow"].service_curve.ttft_base_ms > 500, "the catalog's SLO"
    assert simulations["nonsense-simulated"].answers == "nonsense"
    assert hub.visibility("lab/private") == "private" and hub.visibility("lab/gated") == "gated"
