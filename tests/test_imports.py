"""Imports point down the list of folders, and three libraries have one home each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A folder may import those named with it.
MAY_IMPORT = {
    "pipelines": {"assets", "k8s", "loadtests", "weights", "catalog"},
    "assets": {"k8s", "loadtests", "weights", "catalog"},
    "k8s": {"catalog"},
    "loadtests": {"catalog"},
    "weights": {"catalog"},
    "catalog": set(),
    "lab": {"catalog"},
}
HOME = {
    "kubernetes": {"k8s"},
    "locust": {"loadtests"},
    "gevent": {"loadtests"},
    "dagster": {"assets", "pipelines"},
    "huggingface_hub": {"weights"},
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, top-level module) of every import in the file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            found.append((node.lineno, (node.module or "").partition(".")[0]))
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_lies_below_it(folder: str) -> None:
    assert sources(folder), f"{folder}/ has no Python files"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(folder)
        for line, module in imports(path)
        if module in MAY_IMPORT and module != folder and module not in MAY_IMPORT[folder]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", HOME)
def test_library_is_imported_only_in_its_home(library: str) -> None:
    users = {
        folder
        for folder in MAY_IMPORT
        for p in sources(folder)
        for _, m in imports(p)
        if m == library
    }
    assert users, f"nobody imports {library}"
    assert users <= HOME[library]


@pytest.mark.parametrize("folder", ["assets", "pipelines"])
def test_dagster_modules_keep_real_annotations(folder: str) -> None:
    """`from __future__ import annotations` breaks `config:` parameters."""
    wrong = [
        p.name for p in sources(folder) if (f := [m for _, m in imports(p)]) and "__future__" in f
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["assets", "pipelines"])
def test_dagster_modules_import_ours_as_they_load(folder: str) -> None:
    """Dagster has this folder on its path only while it loads the definitions."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(folder)
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MAY_IMPORT
    ]
    assert not wrong
