"""Which files of a commit are fetched: one set of weights, nothing unsafe, everything complete.

Rules are pure functions over the Hub's file list, so that they are tried without a network.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from weights import manifest
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

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")
# Weights of other frameworks, or the same ones once more: left out beside safetensors.
SAME_WEIGHTS_AGAIN = (
    *(f"*{suffix}" for suffix in PICKLES),
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.gguf"),
    *("original/*", "onnx/*", "openvino/*", "coreml/*"),
)
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
NEVER = (".gitattributes", ".gitignore", ".cache/*")
CHAT_TEMPLATES = "*.jinja"
INDEX = "*.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What makes a LoRA adapter, as PEFT saves it and vLLM loads it (vllm/lora/lora_model.py). Beside
# them lie checkpoints, optimizer states and merged models, which nobody serves.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


def choose(files: Sequence[File], selection: Selection, place: Place) -> tuple[File, ...]:
    """The files to fetch of all that the commit has.

    Raises EmptyRepository, UnsafeName, NoWeights, PickleRefused, NotAnAdapter.
    """
    if not files:
        raise EmptyRepository(f"{place} has no files", "give a revision that has some", place=place)
    if selection.adapter:
        return _adapter(files, place)
    wanted = [file for file in files if _wanted(file.path, selection)]
    patterns = f"(allow {list(selection.allow)}, ignore {list(selection.ignore)})"
    if not wanted and (selection.allow or selection.ignore):
        raise NoWeights(
            f"{place}: the patterns leave none of its {len(files)} files {patterns}",
            "correct weights.allow and weights.ignore of the model (--allow, --ignore)",
            place=place,
        )
    for file in wanted:
        check_name(file.path, place)
    safetensors = [file.path for file in wanted if file.path.endswith(".safetensors")]
    usual = [path for path in safetensors if not _is_original(path)]
    if safetensors:
        wanted = [file for file in wanted if not _matches(file.path, SAME_WEIGHTS_AGAIN)]
    if usual:
        # consolidated*.safetensors are the same weights in Mistral's format: twice the bytes.
        wanted = [file for file in wanted if not _is_original(file.path)]
    weights = [file.path for file in wanted if file.path.endswith(WEIGHTS)]
    if not weights:
        raise NoWeights(
            f"{place}: none of its {len(files)} files is weights that may be fetched {patterns}",
            "correct weights.allow and weights.ignore of the model (--allow, --ignore), or its "
            "repo and revision",
            place=place,
        )
    pickles = [path for path in weights if path.endswith(PICKLES)]
    if pickles and not selection.allow_pickle:
        raise PickleRefused(
            f"{place} has its weights as pickles ({_some(pickles)}), and loading them runs code",
            "choose a revision with safetensors; if you trust this one, set "
            "weights.allow_pickle: true in the model's catalog file (--allow-pickle)",
            place=place,
        )
    return tuple(sorted(wanted, key=lambda file: file.path))


def _adapter(files: Sequence[File], place: Place) -> tuple[File, ...]:
    there = {file.path: file for file in files}
    missing = [path for path in (ADAPTER_CONFIG, ADAPTER_TENSORS) if path not in there]
    if missing == [ADAPTER_TENSORS] and "adapter_model.bin" in there:
        raise PickleRefused(
            f"{place} has its adapter as a pickle (adapter_model.bin), and loading it runs code",
            "choose a revision with adapter_model.safetensors",
            place=place,
        )
    if missing:
        raise NotAnAdapter(
            f"{place} is no LoRA adapter: it has no {' and no '.join(missing)}",
            "correct repo and revision of the adapter in the model's catalog file: both files must "
            "lie at the top of the repository",
            place=place,
        )
    return (there[ADAPTER_CONFIG], there[ADAPTER_TENSORS])


def check_name(path: str, place: Place) -> None:
    """Raise UnsafeName for a name that leaves the folder or collides with ours."""
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and ".." not in parts and not path.startswith("/")
    if not plain or "\\" in path or not path.isprintable() or ":" in parts[0]:
        raise UnsafeName(
            f"{place} has a file named {path!r}, which is no plain path below its folder",
            "don't use this repository, or leave the file out: weights.ignore (--ignore)",
            place=place.of(path),
        )
    if path == manifest.NAME:
        raise UnsafeName(
            f"{place} has a file {path}, the name of this program's own manifest",
            f"leave it out: weights.ignore: [{path}] (--ignore {path})",
            place=place.of(path),
        )


def first(files: Iterable[File]) -> tuple[File, ...]:
    """The small files that the rest of the plan is checked by: fetched before all others."""
    return tuple(
        file
        for file in files
        if fnmatchcase(file.path, INDEX) or PurePosixPath(file.path).name == TOKENIZER_CONFIG
    )


def check_shards(
    chosen: tuple[File, ...], everything: Sequence[File], folder: Path, place: Place
) -> tuple[File, ...]:
    """The plan, once the indexes lie in `folder`: every shard that they name must be in it.

    A whole model.safetensors beside an index that doesn't name it is the same weights again and
    is left out. Raises MissingShard.
    """
    paths = {file.path for file in chosen}
    known = {file.path for file in everything}
    for index in [file.path for file in chosen if fnmatchcase(file.path, INDEX)]:
        shards = {
            str(PurePosixPath(index).with_name(name))
            for name in weight_map(folder / index, place.of(index)).values()
        }
        missing = sorted(shards - paths)
        if missing:
            excluded = [path for path in missing if path in known]
            raise MissingShard(
                f"{index} of {place} names {_some(missing)}, which "
                + ("the patterns leave out" if excluded else "the commit doesn't have"),
                "correct weights.allow and weights.ignore of the model"
                if excluded
                else "the repository is broken: choose another revision",
                place=place.of(missing[0]),
            )
        whole = str(PurePosixPath(index).with_name("model.safetensors"))
        if whole not in shards:
            chosen = tuple(file for file in chosen if file.path != whole)
    return chosen


def weight_map(path: Path, place: Place) -> Mapping[str, str]:
    """Tensor -> file of a checkpoint's index. Raises MissingShard for one that is none."""
    try:
        found = json.loads(path.read_text())["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise TypeError("weight_map isn't an object of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise MissingShard(
            f"{place} is no index of a sharded checkpoint: {error}",
            "the repository is broken: choose another revision",
            place=place,
        ) from error
    return found


def check_chat(paths: Iterable[str], folder: Path, place: Place) -> None:
    """Raise NoChatTemplate unless a template is there: a *.jinja or in tokenizer_config.json."""
    paths = list(paths)
    if any(fnmatchcase(PurePosixPath(path).name, CHAT_TEMPLATES) for path in paths):
        return
    for path in paths:
        if PurePosixPath(path).name == TOKENIZER_CONFIG:
            try:
                document: Any = json.loads((folder / path).read_text())
            except ValueError:
                continue
            if isinstance(document, dict) and document.get("chat_template"):
                return
    raise NoChatTemplate(
        f"{place} has no chat template (neither *.jinja nor chat_template in {TOKENIZER_CONFIG}): "
        "every chat request would be refused with 400",
        "choose an instruction-tuned revision, or set chat: false in the model's catalog file",
        place=place,
    )


def _wanted(path: str, selection: Selection) -> bool:
    if _matches(path, NEVER) or _matches(path, selection.ignore):
        return False
    # A chat template is kept whatever `allow` says: without it chat answers 400.
    return (
        not selection.allow or _matches(path, selection.allow) or _matches(path, (CHAT_TEMPLATES,))
    )


def _is_original(path: str) -> bool:
    return PurePosixPath(path).name.startswith("consolidated")


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """As the Hub's client matches: a pattern that ends in / stands for the whole folder."""
    return any(
        fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern)
        for pattern in patterns
    )


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
