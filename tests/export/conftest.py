"""Tiny models of many architectures, adapters with B ≠ 0 for them, and runs as `linchain train` leaves
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

COMMON = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**COMMON, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {"vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma2": ("Gemma2Config", HEADS),
    "gemma3_text": ("Gemma3TextConfig", HEADS),
    "gemma3": ("Gemma3Config", {"text_config": HEADS, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "mistral": ("MistralConfig", COMMON),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2_bare": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    ),
    "phi": ("PhiConfig", COMMON),
    "phi3": ("Phi3Config", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    # In its files q, k, v and gate are one matrix, in the model four.
    "hrm_text": ("HrmTextConfig", COMMON),
}


def _model_class(config, bare: bool):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if bare:
        return AutoModel
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """`base_of(architecture, dtype=float32)`: the directory of a random checkpoint with a tokenizer, made
    once.

    `gpt2_bare` is saved from the model without its head, so that its keys lack the prefix `transformer.`.
    """
    made: dict[tuple[str, torch.dtype], Path] = {}

    def build(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in made:
            import transformers

            name, options = ARCHITECTURES[architecture]
            config = getattr(transformers, name)(**options)
            directory = tmp_path_factory.mktemp(architecture)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = _model_class(config, architecture.endswith("_bare")).from_config(config, dtype=dtype)
            model.save_pretrained(directory)
            transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_dir).save_pretrained(directory)
            made[architecture, dtype] = directory
        return made[architecture, dtype]

    return build


@pytest.fixture(scope="session")
def adapter_of_base() -> Callable[..., Any]:
    """`adapter_of_base(base, targets="all-linear", rank=4, depth=3, alpha=8)`: a chain whose A, links and B
    are random."""

    def build(
        base: Path, targets="all-linear", rank: int = 4, depth: int = 3, alpha: float = 8.0, seed: int = 1
    ):
        from linchain_cli.chain import ChainConfig, adapter_of, chain_layers, inject
        from linchain_cli.model.loading import base_hash, load_model, text_decoder_prefix

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
        run.update_status(status="finished", finished=now())
        return run

    return build
