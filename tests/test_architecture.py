"""Imports point downwards, rooms on one level do not know each other, and modules form no cycle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "linchain_cli"

# Highest level first; a room is a package or a few modules.
LEVELS = [
    {"cli": ["cli", "__main__"]},
    {"commands": ["commands"]},
    {"comparison": ["comparison"]},
    {
        "training": ["training"],
        "evaluation": ["evaluation"],
        "export": ["export"],
        "importing": ["importing"],
        "report": ["report"],
    },
    {"data": ["data"]},
    {
        "chain": ["chain"],
        "model": ["model"],
        "recipe": ["recipe"],
        "run": ["run"],
        "result_files": ["result_files"],
    },
    {
        "base": [
            *("__init__", "errors", "storage", "directories", "cache", "records", "locks"),
            *("machine", "shipped", "console", "stopping", "streams"),
        ]
    },
]
ROOM_OF = {module: room for level in LEVELS for room, modules in level.items() for module in modules}
LEVEL_OF = {room: number for number, level in enumerate(LEVELS) for room in level}

# What `linchain --help` and recipe validation go through: no torch, and nothing else that takes its time to
# import.
LIGHT = [
    *(
        "cli",
        "__main__",
        "commands",
        "recipe",
        "run",
        "errors",
        "storage",
        "directories",
        "records",
        "locks",
        "shipped",
        "console",
        "stopping",
        "streams",
        "__init__",
    )
]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "matplotlib",
    "numpy",
    "pandas",
    "gguf",
    "huggingface_hub",
}


def modules() -> dict[str, Path]:
    """Every module's dotted name below the package: `chain.layer`, `errors`, `chain` for
    chain/__init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names that a file imports, also within functions unless `top_level_only`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _executed_on_import(tree) if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _executed_on_import(tree: ast.AST) -> list[ast.AST]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += [node, *_executed_on_import(node)]
    return found


def own_imports(path: Path) -> set[str]:
    """The package's own modules that a file imports."""
    found = set()
    for name in imports(path):
        if name != "linchain_cli" and not name.startswith("linchain_cli."):
            continue
        inner = name.removeprefix("linchain_cli").removeprefix(".")
        candidates = (inner, inner.rpartition(".")[0], "__init__")
        found.add(next(candidate for candidate in candidates if candidate in MODULES))
    return found


def room(module: str) -> str:
    return ROOM_OF[module.partition(".")[0]]


def test_every_module_has_a_room():
    unknown = {module for module in MODULES if module.partition(".")[0] not in ROOM_OF}
    assert not unknown, f"give them a place in LEVELS: {unknown}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    wrong = {
        other
        for other in own_imports(MODULES[module])
        if room(other) != room(module) and LEVEL_OF[room(other)] <= LEVEL_OF[room(module)]
    }
    assert not wrong, f"{module} may not import {wrong}"


def test_modules_form_no_cycle():
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    while graph:
        imported = set().union(*graph.values())
        on_no_cycle = {module for module, below in graph.items() if not below or module not in imported}
        assert on_no_cycle, f"these import each other in a circle: {sorted(graph)}"
        graph = {module: below - on_no_cycle for module, below in graph.items() if module not in on_no_cycle}


@pytest.mark.parametrize("module", [module for module in MODULES if module.partition(".")[0] in LIGHT])
def test_light_modules_import_nothing_heavy_at_their_top_level(module):
    tops = {name.partition(".")[0] for name in imports(MODULES[module], top_level_only=True)}
    assert not tops & HEAVY


def test_the_levels_can_be_violated(tmp_path):
    """The checks see imports within functions, and skip those that only a type checker follows."""
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "class A:\n    import numpy\ndef f():\n"
        "    from linchain_cli.chain import layer\n    import linchain_cli.storage\n"
    )
    assert own_imports(path) == {"chain.layer", "storage"}
    assert {name.partition(".")[0] for name in imports(path, top_level_only=True)} == {"typing", "numpy"}
