"""Adapters with B ≠ 0 for tiny models, and runs as `linchain train` leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def adapter_of_base() -> Callable[..., Any]:
    """`adapter_of_base(base, targets="all-linear", rank=4, depth=3, alpha=8)`: a chain whose A, links and B
    are random."""

    def build(
        base: Path, targets="all-linear", rank: int = 4, depth: int = 3, alpha: float = 8.0, seed: int = 1
    ):
        from linchain_cli.chain import ChainConfig, adapter_of, chain_layers, inject
        from linchain_cli.model.config import text_decoder_prefix
        from linchain_cli.model.hashing import base_hash
        from linchain_cli.model.loading import load_model

        model = load_model(base, dtype="float32", device="cpu")
        config = ChainConfig(rank=rank, depth=depth, alpha=alpha, init="kaiming", target_modules=targets)
        inject(model, config, seed, text_decoder_prefix(model))
        generator = torch.Generator().manual_seed(seed)
        for layer in chain_layers(model).values():
            layer.B.data.copy_(0.2 * torch.randn(layer.B.shape, generator=generator))
        return adapter_of(model, config, {"path": str(base), "revision": None, "hash": base_hash(base)})

    return build


@pytest.fixture
def make_run(tmp_path: Path, adapter_of_base) -> Callable[..., Any]:
    """`make_run(base, name="run", data="everyday", quantization="none", **adapter)`: a finished run's
    directory."""

    def build(base: Path, name: str = "run", data: str = "everyday", quantization: str = "none", **options):
        from linchain_cli.chain import save_adapter
        from linchain_cli.recipe import Recipe
        from linchain_cli.run import RunDirectory, now

        adapter = adapter_of_base(base, **options)
        config = adapter.config
        targets = config.target_modules
        recipe = Recipe.model_validate(
            {
                "name": name,
                "output_dir": str(tmp_path / "runs"),
                "model": {"path": str(base), "quantization": quantization},
                "adapter": {
                    "rank": config.rank,
                    "depth": config.depth,
                    "alpha": config.alpha,
                    "target_modules": targets if isinstance(targets, str) else list(targets),
                },
                "data": {"train": data, "max_length": 64},
            }
        )
        run = RunDirectory(recipe.run_path)
        run.create(recipe.to_yaml())
        save_adapter(adapter, run.adapter_dir)
        run.update_status(status="finished", finished_at=now())
        return run

    return build
