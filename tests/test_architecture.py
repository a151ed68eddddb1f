"""The floors of the house: imports point down, and `import vitrim` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitrim

SOURCE = Path(vitrim.__file__).parent

FLOORS = {
    "errors": 0,
    "config": 0,
    "runtime": 0,  # knows no torch
    "feature_files": 0,  # neither
    "predict": 0,  # nor this
    "tokens": 1,
    "costs": 2,
    "layers": 3,
    "models": 4,
    "families": 4,
    "methods": 5,
    "modes": 1,
    "budget": 6,
    "hub": 6,
    "rebuilt": 6,
    "features": 6,
    "as_timm": 6,
    "model": 6,
    "checkpoint": 6,
    "capabilities": 6,
    "convert": 7,
    "export": 7,
    "tools": 8,
    "latency": 9,
    "budgets": 10,
    "tasks": 11,
    "train": 11,
    "demo": 12,
    "cli": 13,
    "__main__": 13,
}
LINES = 36_171
"""Of all Python files in the package."""
SHARED_BY_METHODS = {"base", "records", "selection", "semantic"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[tuple[str, bool]]:
    """(dotted vitrim module, whether imported at module level) of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, id(node) in top) for name in names if name.startswith("vitrim.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    parts = path.relative_to(SOURCE).parts
    floor = FLOORS[room(parts)]
    for name, top_level in imported_modules(path):
        target = name.split(".")[1]
        if target not in FLOORS:  # a name of the package itself, such as __version__
            assert not top_level, f"{path.name} imports {name} at its top"
            continue
        assert FLOORS[target] <= floor, f"{path.name} (floor {floor}) imports {name}"
        if room(parts) == target == "methods" and path.name != "__init__.py":
            shared = name.split(".")[2] in SHARED_BY_METHODS
            assert shared, f"{path.name}: methods never import each other"


def module_of(path: Path) -> str:
    return ".".join(("vitrim", *path.relative_to(SOURCE).with_suffix("").parts))


def test_no_two_files_import_each_other():
    """Neither by way of others, nor inside of functions."""
    files = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    graph = {
        module: {
            target
            for name, _ in imported_modules(path)
            for target in (name, name.rpartition(".")[0])
            if target in files
        }
        for module, path in files.items()
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 500


def test_the_house_keeps_to_its_budget():
    """What grows past it makes something else shorter, or its commit says why the budget rises."""
    assert sum(len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")) <= LINES


def test_import_is_light():
    """Only torch, timm and what they bring are loaded by `import vitrim`."""
    optional = ["matplotlib", "accelerate", "sklearn", "typer", "rich", "tensorboard", "onnx"]
    code = f"import sys, vitrim; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_everything_public_is_there():
    assert all(hasattr(vitrim, name) for name in vitrim.__all__)
