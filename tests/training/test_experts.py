"""Runs whose chains are on routed experts."""

from __future__ import annotations

import os

import pytest
from safetensors.torch import load_file

from linchain_cli.run import read_jsonl

FAMILIES = ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text"]
SLOW = pytest.mark.skipif(
    "LINCHAIN_TEST_SLOW" not in os.environ, reason="a run of every family; LINCHAIN_TEST_SLOW=1 runs it"
)


@pytest.fixture
def experts_base(request, base_of):
    from linchain_cli.model.hashing import base_hash
    from linchain_cli.model.loading import load_model
    from linchain_cli.model.tokenizer import load_tokenizer
    from linchain_cli.training.base import Base, suit_to_training

    directory = base_of(request.param)
    model = load_model(directory, dtype="float32", device="cpu")
    suit_to_training(model)
    return Base(directory, model, load_tokenizer(directory), base_hash(directory))


@pytest.mark.parametrize(
    ("experts_base", "recompute"),
    [
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        *(pytest.param(family, False, marks=SLOW) for family in FAMILIES),
    ],
    indirect=["experts_base"],
)
def test_a_resumed_run_ends_with_the_same_bytes(experts_base, recipe_of, dies_after, recompute):
    from linchain_cli.chain import detach
    from linchain_cli.training.runner import run_training

    def run(name: str, **options):
        detach(experts_base.model)
        changes = {
            "name": name,
            "model.path": str(experts_base.directory),
            "adapter.target_modules": ["all-linear", "experts"],
            "adapter.dropout": 0.1,
            "training.gradient_checkpointing": recompute,
        }
        return run_training(recipe_of(changes), base=experts_base, **options).run

    whole = run("whole")
    with dies_after(3):
        run("stopped")
    resumed = run("stopped", resume=True)
    values = [each.adapter_dir / "chain.safetensors" for each in (whole, resumed)]
    assert values[0].read_bytes() == values[1].read_bytes()
    tensors = load_file(values[0])
    learned = [tensor for name, tensor in tensors.items() if name.endswith("experts.gate_up_proj.B")]
    assert learned and all(tensor.shape[0] == 4 and tensor.any() for tensor in learned)
    losses = [row["loss"] for row in read_jsonl(whole.metrics_path) if "loss" in row]
    assert losses[-1] < losses[0]
