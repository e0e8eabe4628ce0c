"""A comparison of tiny arms: a recipe on the tiny Llama, and one comparison that was run once for all
tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from linchain_cli.run import ComparisonDirectory, RunDirectory, read_jsonl

WORDS = ["adapter.depth=0,3"]
TIMES = ("tokens_per_second", "step_seconds", "peak_memory_bytes")
RECIPE = """
name: tiny
output_dir: {root}
model: {{path: {model}}}
adapter: {{rank: 4, depth: 3, alpha: 8, init: kaiming}}
data: {{train: {rows}, validation: 12, max_length: 200}}
training:
  max_steps: 6
  global_batch_size: 4
  learning_rate: 3.0e-3
  warmup_steps: 1
  log_every: 1
  eval_every: 2
"""


def metrics(run: RunDirectory) -> list[dict]:
    """What a run logged, without what another run of the same takes longer or shorter for."""
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in read_jsonl(run.metrics_path)
    ]


def runs_of(directory: ComparisonDirectory) -> dict[str, RunDirectory]:
    return {path.name: RunDirectory(path) for path in sorted(directory.arms_dir.iterdir()) if path.is_dir()}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINCHAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory: pytest.TempPathFactory, commonsense_rows) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_text(json.dumps(commonsense_rows(60)))
    return path


@pytest.fixture(scope="session")
def write_recipe(tiny_llama_dir: Path, rows_path: Path) -> Callable[..., Path]:
    """`write_recipe(root)`: a recipe file whose comparison lies at root/tiny."""

    def write(root: Path) -> Path:
        path = root / "recipe.yaml"
        path.write_text(RECIPE.format(root=root, model=tiny_llama_dir, rows=rows_path))
        return path

    return write


@pytest.fixture
def recipe_path(write_recipe, tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def finished(write_recipe, tmp_path_factory):
    """(recipe file, comparison, results) of two arms with two seeds; tests only read it."""
    from linchain_cli.comparison.grid import expand
    from linchain_cli.comparison.runner import run_comparison

    root = tmp_path_factory.mktemp("comparison")
    path = write_recipe(root)
    return (
        path,
        ComparisonDirectory(root / "tiny"),
        run_comparison(expand(path, WORDS), [1, 2]),
    )


@pytest.fixture
def loads(monkeypatch):
    """The recipes a base model was loaded for."""
    from linchain_cli.comparison import runner

    seen, load = [], runner.load_base

    def counted(recipe, *others):
        seen.append(recipe.name)
        return load(recipe, *others)

    monkeypatch.setattr(runner, "load_base", counted)
    return seen
