"""Load the catalog. A wrong file is refused with file, line, field and what is allowed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from yaml.constructor import SafeConstructor

from catalog.cluster import ClusterSpec
from catalog.mistakes import Place, dotted, mistakes, shown
from catalog.model import ModelSpec
from catalog.spec import Spec
from catalog.trace import TraceError, read_trace

HERE = Path(__file__).parent
MOST_TRACE_BYTES = 900_000
# Of YAML, what a spec has; more than these comes from aliases in aliases.
NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?(e[-+]?\d+)?|[-+]?\.(inf|nan)", re.IGNORECASE)
PLAIN = ("text", "number", "truth value", "null")
KINDS = {
    "str": "text",
    "int": "number",
    "float": "number",
    "bool": "truth value",
    "timestamp": "date",
}
MOST, MOST_VALUES, DEEPEST = 2**63, 10_000, 20
TEMPLATE = (
    "the catalog is plain YAML: render a template ({{ … }}) first, and put braces that are text "
    "in quotes"
)
TOO_MUCH = "is too deep or too large; does an alias (*) contain itself, or others many times?"

S = TypeVar("S", bound=Spec)


class CatalogError(Exception):
    """One or more catalog files are wrong; the message has a line `file:line: field: what` each."""


@dataclass(frozen=True)
class Catalog:
    """All models and clusters, by name."""

    models: Mapping[str, ModelSpec]
    clusters: Mapping[str, ClusterSpec]

    def model(self, name: str) -> ModelSpec:
        """The model of that name. Raises CatalogError with the known names."""
        if name not in self.models:
            raise CatalogError(
                f"no model {name!r} in the catalog; there are: {', '.join(self.models)}. "
                f"Name one of them, or add catalog/models/{name}.yaml."
            )
        return self.models[name]

    def cluster(self, name: str) -> ClusterSpec:
        """The cluster of that name. Raises CatalogError with the known names."""
        if name not in self.clusters:
            raise CatalogError(
                f"no cluster {name!r} in the catalog; there are: {', '.join(self.clusters)}. "
                f"Name one of them (PROMOTION_CLUSTER, --cluster), or add a file for it there."
            )
        return self.clusters[name]


def load_catalog(folder: Path = HERE) -> Catalog:
    """Read `folder`/models/*.yaml and `folder`/clusters/*.yaml.

    Raises CatalogError that lists every mistake of every file.
    """
    errors: list[str] = []
    models = _load_folder(folder / "models", ModelSpec, errors)
    clusters = _load_folder(folder / "clusters", ClusterSpec, errors)
    if not errors:
        errors += _cross_check(models, clusters, folder)
    if errors:
        raise CatalogError("\n".join(errors))
    return Catalog(models, clusters)


def _load_folder(folder: Path, spec: type[S], errors: list[str]) -> dict[str, S]:
    specs = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() not in (".yaml", ".yml"):
            continue
        if path.suffix != ".yaml":
            errors.append(f"{_relative(path)}:1: file: isn't read; rename to {path.stem}.yaml")
            continue
        try:
            specs[path.stem] = load_file(path, spec)
        except CatalogError as error:
            errors.append(str(error))
    if not specs and not errors:
        errors.append(f"{folder}: no *.yaml file there")
    return specs


def load_file(path: Path, spec: type[S]) -> S:
    """One file as a `spec`. Raises CatalogError."""
    fields, lines = _read(path)
    file = _relative(path)
    if "name" in fields:
        raise CatalogError(
            f"{file}:{lines[('name',)]}: name: is taken from the file's name; remove it"
        )
    try:
        return spec.model_validate({"name": path.stem, **fields})
    except ValidationError as error:
        raise CatalogError(
            "\n".join(
                f"{file}:{_line(lines, place)}: {dotted(place) or 'file'}: {message}"
                for place, message in mistakes(error, spec)
            )
        ) from None


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _line(lines: Mapping[Place, int], place: Place) -> int:
    """Where a field stands, or if it doesn't, what it should be in."""
    while place not in lines:
        place = place[:-1]
    return lines[place]


def _read(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The fields of a file, and the line, from 1, of each. Raises CatalogError."""
    file = _relative(path)
    lines: dict[Place, int] = {(): 1}
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        fields = _value(root, (), lines) if root else None
    except OSError as error:
        raise CatalogError(f"{file}:1: file: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CatalogError(f"{file}:1: file: is not UTF-8 text; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(str(error.problem or error.context).split())
        if "'\\t'" in problem:
            problem += "; indent with spaces"
        elif "<block end>" in problem and "<scalar>" not in problem:
            problem += "; fields of one mapping must begin in one column"
        if _template(text, error.context_mark) or _template(text, error.problem_mark):
            problem += f"; {TEMPLATE}"
        raise CatalogError(f"{file}:{line}: file: is not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise CatalogError(
            f"{file}:{line}: file: has the control character U+{error.character:04X}; remove it"
        ) from None
    except RecursionError:
        raise CatalogError(f"{file}:1: file: {TOO_MUCH}") from None
    except _Wrong as error:
        raise CatalogError(f"{file}:{error}") from None
    if not isinstance(fields, dict):
        what = "must be a mapping of fields" if root else "is empty"
        raise CatalogError(f"{file}:1: file: {what}, see catalog/models for examples")
    return fields, lines


def _template(text: str, mark: yaml.Mark | None) -> bool:
    """Whether there is something of a template in the marked line."""
    marked = text.splitlines()[mark.line : mark.line + 1] if mark else []
    return any("{{" in line or "{%" in line for line in marked)


class _Wrong(Exception):
    """YAML that is none of a spec: `line: field: what`."""

    def __init__(self, node: yaml.Node, place: Place, message: str) -> None:
        super().__init__(f"{node.start_mark.line + 1}: {dotted(place) or 'file'}: {message}")


def _value(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    """A node as fields, lists (as tuples: frozen specs hold those) and plain values; fills
    `lines`. Of YAML, it takes what JSON has too, and aliases. Raises _Wrong."""
    if len(place) > DEEPEST or len(lines) > MOST_VALUES:
        raise _Wrong(node, place[:3], TOO_MUCH)
    kind = _kind(node)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        fields: dict[str, Any] = {}
        for key, value in node.value:
            _check_key(key, place)
            at = (*place, key.value)
            if key.value in fields:
                raise _Wrong(key, at, f"the field {key.value!r} stands here twice; remove one")
            lines[at] = key.start_mark.line + 1
            fields[key.value] = _value(value, at, lines)
        return fields
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        for number, item in enumerate(node.value):
            lines[*place, number] = item.start_mark.line + 1
        return tuple(_value(item, (*place, n), lines) for n, item in enumerate(node.value))
    if not isinstance(node, yaml.ScalarNode):
        raise _Wrong(node, place, f"has the tag {node.tag}; write a plain list or mapping")
    if kind not in PLAIN:
        raise _Wrong(node, place, f"{shown(node.value)} is a {kind} in YAML; put it in quotes")
    try:
        plain = SafeConstructor().construct_object(node)
    except (ValueError, LookupError, ArithmeticError):
        raise _Wrong(node, place, f"{shown(node.value)} is no {kind}; put it in quotes") from None
    if isinstance(plain, int) and abs(plain) > MOST:
        raise _Wrong(node, place, "is too large a number; if it is text, put it in quotes")
    if kind == "number" and not NUMBER.fullmatch(node.value):
        # YAML 1.1 has octal 010, 1:30 for 90, 1_0 and 0x10.
        what = f"{shown(node.value)} is {plain} in YAML"
        raise _Wrong(node, place, f"{what}; write that, or put it in quotes if it is text")
    return plain


def _check_key(key: yaml.Node, place: Place) -> None:
    kind = _kind(key)
    if isinstance(key, yaml.MappingNode):
        raise _Wrong(key, place, f"has braces for a field's name; {TEMPLATE}")
    if not isinstance(key, yaml.ScalarNode):
        raise _Wrong(key, place, "has a list for a field's name; put text in quotes")
    if kind == "merge":
        raise _Wrong(key, place, "<< isn't taken; write the fields, or an alias for each value")
    if kind != "text":
        what = f"the name {shown(key.value)} is a {kind} in YAML; put it in quotes"
        raise _Wrong(key, place, what)


def _kind(node: yaml.Node) -> str:
    tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
    return KINDS.get(tag, tag)


def _cross_check(
    models: Mapping[str, ModelSpec], clusters: Mapping[str, ClusterSpec], folder: Path
) -> list[str]:
    errors = []
    owners: dict[str, str] = {}
    pools = {pool.name for cluster in clusters.values() for pool in cluster.node_pools}
    for model in models.values():
        path = folder / "models" / f"{model.name}.yaml"
        file = _relative(path)
        if model.object_name in owners:
            errors.append(
                f"{file}:1: name: gives the same object name {model.object_name!r} as "
                f"{owners[model.object_name]}.yaml; rename one"
            )
        owners[model.object_name] = model.name
        if model.traffic.trace is not None and (problem := _trace(model, path.parent)):
            line = _line(_read(path)[1], ("traffic", "trace"))
            errors.append(f"{file}:{line}: traffic.trace.path: {problem}")
        if model.node_pool is not None and model.node_pool not in pools:
            line = _line(_read(path)[1], ("node_pool",))
            errors.append(
                f"{file}:{line}: node_pool: no cluster has a node pool {model.node_pool!r}; "
                f"there are: {', '.join(sorted(pools))}"
            )
    return errors


def trace_file(model: ModelSpec, folder: Path = HERE / "models") -> Path:
    """Where the model's trace lies, which it must have."""
    assert model.traffic.trace is not None, "the model has a trace"
    return folder / model.traffic.trace.path


def _trace(model: ModelSpec, folder: Path) -> str:
    """What is wrong with a model's trace; empty if nothing is."""
    path = trace_file(model, folder)
    try:
        recorded, _ = read_trace(path, model.traffic.arrival)
    except TraceError as error:
        return str(error)
    if path.stat().st_size > MOST_TRACE_BYTES:
        return (
            f"{path}: has {path.stat().st_size} bytes, at most {MOST_TRACE_BYTES} fit into the "
            "ConfigMap that takes it to the benchmark; take a part of it"
        )
    return model.too_long(model.traffic.longest(recorded))


@cache
def catalog() -> Catalog:
    """The catalog of this repository, loaded once a process."""
    return load_catalog()
