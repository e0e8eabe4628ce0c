"""A place to work in, with a checkpoint, test files and a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from linchain_cli.chain import ChainConfig, adapter_of, inject, save_adapter
from linchain_cli.model.hashing import base_hash
from linchain_cli.model.loading import load_model
from linchain_cli.recipe import load_recipe
from linchain_cli.run import RunDirectory

TASKS = ("boolq", "piqa")


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_llama_dir, commonsense_rows):
    """A directory to work in: base/ (a checkpoint), data/<task>/test.json, runs/tuned (a finished run)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_dir, "base")
    for task, style in zip(TASKS, ("true/", "solution1/"), strict=True):
        own = [row for row in commonsense_rows(24) if f"Answer format: {style}" in row["instruction"]]
        Path("data", task).mkdir(parents=True)
        Path("data", task, "test.json").write_text(json.dumps(own))
    make_run("tuned")
    return tmp_path


def read(path):
    """A JSON file."""
    return json.loads(Path(path).read_text())


def make_run(name, status="finished", template="plain", seed=1, **data):
    """runs/<name>: a run on base/ whose adapter was drawn with that seed."""
    config = ChainConfig(4, 2, 8, target_modules=["q_proj", "v_proj"])
    recipe = {
        "name": name,
        "model": {"path": "base"},
        "adapter": {"rank": 4, "depth": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "everyday", "template": template, **data},
        "evaluation": {"tasks": ["boolq"]},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = RunDirectory(Path("runs") / name)
    run.create(load_recipe("recipe.yaml").to_yaml())
    run.update_status(status=status, finished_at="2024-01-01T00:00:00")
    model = load_model(Path("base"), dtype="float32", device="cpu")
    layers = inject(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B, std=0.3, generator=generator)
    save_adapter(
        adapter_of(model, config, {"path": "base", "hash": base_hash(Path("base"))}), run.adapter_dir
    )
    return run
