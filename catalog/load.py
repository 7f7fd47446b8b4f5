"""Load the catalog. A wrong file is refused with file, line, field and what is allowed."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import ValidationError

from catalog.cluster import ClusterSpec
from catalog.model import ModelSpec
from catalog.spec import Misfit, Spec
from catalog.trace import TraceError, read_trace

HERE = Path(__file__).parent
MOST_TRACE_BYTES = 900_000

S = TypeVar("S", bound=Spec)
Place: TypeAlias = tuple[str | int, ...]


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
                f"Add catalog/models/{name}.yaml or correct the partition."
            )
        return self.models[name]

    def cluster(self, name: str) -> ClusterSpec:
        """The cluster of that name. Raises CatalogError with the known names."""
        if name not in self.clusters:
            raise CatalogError(
                f"no cluster {name!r} in the catalog; there are: {', '.join(self.clusters)}. "
                "Correct PROMOTION_CLUSTER or add catalog/clusters/<name>.yaml."
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
    for path in sorted(folder.glob("*.yaml")):
        try:
            specs[path.stem] = load_file(path, spec)
        except CatalogError as error:
            errors.append(str(error))
    if not specs and not errors:
        errors.append(f"{folder}: no *.yaml file there")
    return specs


def load_file(path: Path, spec: type[S]) -> S:
    """One file as a `spec`. Raises CatalogError."""
    shown = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_UniqueKeys)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except OSError as error:
        raise CatalogError(f"{shown}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CatalogError(f"{shown}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise CatalogError(f"{shown}:{line}: is not valid YAML: {error.problem}") from None
    if not isinstance(data, dict):
        raise CatalogError(
            f"{shown}:1: must be a mapping of fields, see catalog/models for examples"
        )
    if "name" in data:
        raise CatalogError(
            f"{shown}:{lines[('name',)]}: name: is taken from the file's name; remove it"
        )
    try:
        return spec.model_validate(_tuples({"name": path.stem, **data}))
    except ValidationError as error:
        raise CatalogError("\n".join(_mistakes(error, shown, lines, spec))) from None


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key stand twice and takes the last; a promotion must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the field {key!r} stands here twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _tuples(value: Any) -> Any:
    """Lists as tuples: frozen specs hold tuples, and strict validation takes no list for one."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _lines(node: yaml.Node | None, place: Place = ()) -> dict[Place, int]:
    """The line, from 1, on which each field stands."""
    lines: dict[Place, int] = {} if place else {(): 1}
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, item, item) for i, item in enumerate(node.value)]
    for key, at, value in children:
        lines[(*place, key)] = at.start_mark.line + 1
        lines |= _lines(value, (*place, key))
    return lines


def _mistakes(
    error: ValidationError, shown: str, lines: Mapping[Place, int], spec: type[Spec]
) -> list[str]:
    out = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        place: Place = (*detail["loc"], *(cause.place if isinstance(cause, Misfit) else ()))
        at = place
        while at not in lines:
            at = at[:-1]
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"is no field here; allowed: {', '.join(_fields(spec, place[:-1]))}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif not detail["type"].startswith("value_error"):
            message = f"{message}, got {detail['input']!r}"
        field = ".".join(map(str, place)) or "file"
        out.append(f"{shown}:{lines[at]}: {field}: {message}")
    return out


def _fields(spec: type[Spec], place: Place) -> list[str]:
    """The fields that the spec at `place` has."""
    import typing

    current: Any = spec
    for key in place:
        if isinstance(key, int):
            continue
        annotation = current.model_fields[key].annotation
        nested = [a for a in (annotation, *typing.get_args(annotation)) if _is_spec(a)]
        if not nested:
            return []
        current = nested[0]
    return [name for name in current.model_fields if name != "name" or current is not spec]


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _cross_check(
    models: Mapping[str, ModelSpec], clusters: Mapping[str, ClusterSpec], folder: Path
) -> list[str]:
    errors = []
    owners: dict[str, str] = {}
    pools = {pool.name for cluster in clusters.values() for pool in cluster.node_pools}
    for model in models.values():
        path = folder / "models" / f"{model.name}.yaml"
        shown = _shown(path)
        if model.object_name in owners:
            errors.append(
                f"{shown}:1: name: gives the same object name {model.object_name!r} as "
                f"{owners[model.object_name]}.yaml; rename one"
            )
        owners[model.object_name] = model.name
        if model.traffic.trace is not None and (problem := _trace(model, path.parent)):
            line = _lines(yaml.compose(path.read_text(encoding="utf-8")))[("traffic", "trace")]
            errors.append(f"{shown}:{line}: traffic.trace.path: {problem}")
        if model.node_pool is not None and model.node_pool not in pools:
            line = _lines(yaml.compose(path.read_text(encoding="utf-8"))).get(("node_pool",), 1)
            errors.append(
                f"{shown}:{line}: node_pool: no cluster has a node pool {model.node_pool!r}; "
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
        recorded, _ = read_trace(path)
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
