"""Checks that a model's weights are really there, as an engine finds out by loading them."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """The folder holds no model that can be loaded; worded as vLLM would."""


@dataclass(frozen=True)
class ModelFiles:
    """What was found: the bytes of all weights, tensors, and the longest context."""

    bytes: int
    tensors: int
    max_position_embeddings: int
    architecture: str


def inspect_model(folder: Path) -> ModelFiles:
    """Reads config.json and the header of every safetensors file. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(
            f"OSError: {folder} is not a local folder (HF_HUB_OFFLINE: it can't be downloaded)"
        )
    config = _json(folder / "config.json")
    names = config.get("architectures") or ["unknown"]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"RuntimeError: Cannot find any model weights with `{folder}` (*.safetensors)"
        )
    index = folder / "model.safetensors.index.json"
    shards = set(_json(index).get("weight_map", {}).values()) if index.exists() else set()
    if missing := shards - {path.name for path in weights}:
        raise ModelError(f"RuntimeError: {index} names missing files: {sorted(missing)}")
    return ModelFiles(
        bytes=sum(path.stat().st_size for path in weights),
        tensors=sum(_tensors(path) for path in weights),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        architecture=str(names[0]),
    )


def inspect_adapter(name: str, folder: Path, max_rank: int) -> None:
    """Reads a LoRA adapter's config and its safetensors header. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"ValueError: Loading lora {name} failed: No adapter found for {folder}")
    rank = _json(folder / "adapter_config.json").get("r")
    if not isinstance(rank, int) or rank > max_rank:
        raise ModelError(f"ValueError: LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    tensors = folder / "adapter_model.safetensors"
    if not tensors.is_file():
        raise ModelError(f"ValueError: {folder} doesn't contain tensors")
    _tensors(tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"OSError: can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"ValueError: {path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"ValueError: {path} is no JSON object")
    return data


def _tensors(path: Path) -> int:
    """The number of tensors, once the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ModelError(f"SafetensorError: {path}: header too large for the file")
        try:
            header = json.loads(file.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"SafetensorError: {path}: invalid header") from None
    if max(ends, default=0) != size - 8 - length:
        raise ModelError(f"SafetensorError: {path}: incomplete, tensors end beyond the file")
    return len(ends)


def read_through(folder: Path) -> None:
    """Reads all weights once, as loading them does."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.read(1 << 22):
                pass
