"""LoRA adapters: can this one be served, and does it fit its model?

What an adapter says of its model is a name, often a folder of whoever trained it or a mirror: no
proof of anything. Its matrices are one: for each module that it changes they must have the sizes
of the model's own.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.errors import NotAnAdapter, Place, WrongBase
from weights.plan import ADAPTER_CONFIG, ADAPTER_TENSORS

# vLLM's largest --max-lora-rank (vllm/config/lora.py).
LARGEST_RANK = 512
MATRIX = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# Of a weight whose shape is that of its module: packed and quantised ones have others.
PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

Shapes = Mapping[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Lora:
    """`base_model`: as its configuration names it. Of its `modules`, `compared` had the shape of
    the model's; the others aren't named as the model's tensors are (then the engine decides).
    """

    rank: int
    base_model: str
    modules: int
    compared: int


def check(folder: Path, base: Path, place: Place, base_place: Place) -> Lora:
    """What the adapter in `folder` is, compared with the model published in `base`.

    Raises NotAnAdapter for one that vLLM would not load, WrongBase for one of another model.
    """
    config = _config(folder / ADAPTER_CONFIG, place)
    sizes = _sizes(_shapes(folder / ADAPTER_TENSORS), place)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    rank = max([*ranks, *(size.rank for size in sizes.values())])
    if rank > LARGEST_RANK:
        raise _unfit(place, f"has rank {rank}, the largest that can be served is {LARGEST_RANK}")
    shapes = {
        name: shape
        for path in sorted(base.glob("*.safetensors"))
        for name, shape in _shapes(path).items()
    }
    compared = _compare(sizes, shapes, bool(config.get("fan_in_fan_out")), place, base_place)
    return Lora(rank, str(config.get("base_model_name_or_path") or ""), len(sizes), compared)


@dataclass(frozen=True)
class _Size:
    """Of a module's pair of matrices: rank × inputs, outputs × rank."""

    rank: int
    inputs: int
    outputs: int


def _config(path: Path, place: Place) -> dict[str, Any]:
    """adapter_config.json, if vLLM serves what it describes (vllm/lora/peft_helper.py)."""
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError("it is no object")
    except (ValueError, TypeError) as error:
        raise _unfit(place, f"has an {ADAPTER_CONFIG} that can't be read: {error}") from error
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise _unfit(place, f"is a {kind} adapter, and only LORA can be served")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise _unfit(place, f"has ranks {ranks} in its {ADAPTER_CONFIG}")
    for field, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(field) and config[field] != plain:
            raise _unfit(place, f"has {field}: {config[field]!r}, which can't be served")
    return config


def _sizes(shapes: Shapes, place: Place) -> dict[str, _Size]:
    """Module -> sizes, of the modules that have both matrices."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, (_, shape) in shapes.items():
        if (match := MATRIX.fullmatch(name)) and len(shape) == 2:
            found.setdefault(match[1], {})[match[2]] = shape
    if not found:
        raise _unfit(place, f"has no LoRA matrices in its {ADAPTER_TENSORS}")
    sizes = {}
    for module, pair in found.items():
        if len(pair) != 2 or pair["A"][0] != pair["B"][1]:
            raise _unfit(place, f"has matrices {pair} for module {module}, which are no pair")
        sizes[module] = _Size(pair["A"][0], pair["A"][1], pair["B"][0])
    return sizes


def _compare(
    sizes: Mapping[str, _Size], base: Shapes, transposed: bool, place: Place, base_place: Place
) -> int:
    """How many modules have the base's shape. Raises WrongBase."""
    modules = {name.rpartition(".")[0] for name in base}
    kinds = {_kind(module) for module in modules}
    compared = 0
    for module, size in sizes.items():
        if module not in modules and _kind(module) in kinds:
            raise _wrong(place, base_place, f"it changes {module}, which that hasn't got")
        dtype, shape = base.get(f"{module}.weight", ("", []))
        if dtype in PLAIN and len(shape) == 2:
            wanted = [size.inputs, size.outputs] if transposed else [size.outputs, size.inputs]
            if wanted != shape:
                raise _wrong(
                    place, base_place, f"{module} has shape {shape} there, {wanted} for the adapter"
                )
            compared += 1
    return compared


def _kind(module: str) -> str:
    """The module, whichever layer it is in."""
    return re.sub(r"\.\d+\.", ".*.", module)


def _shapes(path: Path) -> Shapes:
    """Tensor -> type and shape, of a file whose header was verified when it was fetched."""
    with path.open("rb") as source:
        header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
    header.pop("__metadata__", None)
    return {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}


def _unfit(place: Place, why: str) -> NotAnAdapter:
    return NotAnAdapter(
        f"{place} {why}",
        "correct repo and revision of the adapter in the model's catalog file",
        place=place,
    )


def _wrong(place: Place, base: Place, why: str) -> WrongBase:
    return WrongBase(
        f"{place} is no adapter of {base}: {why}",
        "promote it with the model that it was trained on: correct repo and revision of one of "
        "them in the catalog file",
        place=place,
    )
