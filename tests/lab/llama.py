"""SmolLM2 in plain numpy: just enough to ask a checkpoint a question without an engine."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

# GPT-2's pre-tokenizer for ASCII text, with each digit on its own.
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


class Llama:
    """A checkpoint folder with its tokenizer. Arrays are float32."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: weight.astype(np.float32)
            for name, weight in load_file(folder / "model.safetensors").items()
        }
        document = json.loads((folder / "tokenizer.json").read_text())
        self.vocab: dict[str, int] = document["model"]["vocab"]
        self.ranks = {merge: rank for rank, merge in enumerate(document["model"]["merges"])}
        self.special = {token["content"]: token["id"] for token in document["added_tokens"]}
        self.tokens = {number: token for token, number in self.vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with special tokens in it."""
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            for word in WORDS.findall(part):
                ids += [self.vocab[piece] for piece in self._merge(list(map(_visible, word)))]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ASCII tokens."""
        return "".join(self.tokens[i] for i in ids).replace("Ġ", " ").replace("Ċ", "\n")

    def greedy(self, prompt: str, limit: int) -> str:
        """The likeliest answer, until the end token or `limit` tokens."""
        answer: list[int] = []
        self.past: dict[int, tuple[Any, Any]] = {}  # keys and values so far, by layer
        position, new = 0, self.encode(prompt)
        while len(answer) < limit:
            following = int(np.argmax(self.logits(new, position)))
            if following == self.config["eos_token_id"]:
                break
            answer.append(following)
            position, new = position + len(new), [following]
        return self.decode(answer)

    def logits(self, ids: list[int], position: int) -> Any:
        """Scores of the token that follows `ids`, which stand at `position` in the text."""
        config, weights = self.config, self.weights
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        angles = np.outer(
            position + np.arange(len(ids)), config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        )
        turn = np.tile(angles, 2).astype(np.float32)
        cos, sin = np.cos(turn), np.sin(turn)
        mask = np.full((len(ids), position + len(ids)), -np.inf, np.float32)
        mask = np.triu(mask, position + 1)
        x = weights["model.embed_tokens.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."

            def project(part: str, value: Any, name: str = name) -> Any:
                return value @ self.weights[f"{name}{part}.weight"].T

            y = self._norm(x, f"{name}input_layernorm.weight")
            q, k, v = (
                project(f"self_attn.{part}_proj", y).reshape(len(ids), -1, size).swapaxes(0, 1)
                for part in "qkv"
            )
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if layer in self.past:
                k = np.concatenate([self.past[layer][0], k], 1)
                v = np.concatenate([self.past[layer][1], v], 1)
            self.past[layer] = k, v
            k, v = k.repeat(heads // groups, 0), v.repeat(heads // groups, 0)
            scores = q @ k.swapaxes(1, 2) * np.float32(size**-0.5) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            attention = scores / scores.sum(-1, keepdims=True) @ v
            x = x + project("self_attn.o_proj", attention.swapaxes(0, 1).reshape(len(ids), -1))
            y = self._norm(x, f"{name}post_attention_layernorm.weight")
            gate = project("mlp.gate_proj", y)
            gate = gate / (1 + np.exp(-gate))
            x = x + project("mlp.down_proj", gate * project("mlp.up_proj", y))
        last = self._norm(x[-1:], "model.norm.weight")
        return (last @ weights["model.embed_tokens.weight"].T)[0]

    def _norm(self, x: Any, name: str) -> Any:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name]

    def _merge(self, pieces: list[str]) -> list[str]:
        while len(pieces) > 1:
            pairs = [f"{a} {b}" for a, b in pairwise(pieces)]
            best = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], 1 << 30))
            if pairs[best] not in self.ranks:
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return pieces


def _visible(character: str) -> str:
    return {" ": "Ġ", "\n": "Ċ"}.get(character, character)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin
