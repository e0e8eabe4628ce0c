"""Bases in 4 and 8 bit on bitsandbytes' CPU backend, adapters in float32."""

from __future__ import annotations

import pytest
import torch

from linchain_cli.chain import chain_layers
from linchain_cli.data.batches import Batch
from linchain_cli.run import read_jsonl
from linchain_cli.training import loss
from linchain_cli.training.runner import run_training


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_base_trains_and_resumes_exactly(recipe_of, dies_after, quantization, kind):
    changes = {
        "model.quantization": quantization,
        "adapter.dropout": 0.1,
        "adapter.rank": 64,
    }
    whole = run_training(recipe_of({**changes, "name": "whole"}))
    layers = chain_layers(whole.model)
    assert {type(layer.base).__name__ for layer in layers.values()} == {kind}
    weight = next(iter(layers.values())).base.weight
    assert not weight.is_floating_point()
    if quantization == "nf4":
        state = weight.quant_state
        assert state.quant_type == "nf4" and state.nested, "double quantisation"
        assert weight.numel() * 2 == 64 * 64
    assert {parameter.dtype for parameter in whole.parameters.values()} == {torch.float32}
    losses = [row["loss"] for row in read_jsonl(whole.run.metrics_path) if "loss" in row]
    assert losses[-1] < losses[0] - 0.1

    with dies_after(3):
        run_training(recipe_of(changes))
    job = run_training(recipe_of(changes), resume=True)
    for path in ("adapter/chain.safetensors", "checkpoints/step-000006/optimizer.safetensors", "rows.jsonl"):
        assert (job.run.path / path).read_bytes() == (whole.run.path / path).read_bytes()


def test_gradients_go_through_a_4_bit_base_exactly(tiny_llama_dir):
    """Against ordinary layers that hold the rounded weights. bitsandbytes has a path on CPUs whose gradient
    ends early.
    """
    from bitsandbytes.functional import dequantize_4bit

    from linchain_cli.chain import ChainConfig, inject
    from linchain_cli.model.head import check_split
    from linchain_cli.model.loading import load_model

    rounded, plain = (
        load_model(tiny_llama_dir, dtype="float32", device="cpu", quantization=q) for q in ("nf4", "none")
    )
    for path, module in rounded.named_modules():
        if type(module).__name__ == "Linear4bit":
            plain.get_submodule(path).weight.copy_(
                dequantize_4bit(module.weight.data, module.weight.quant_state)
            )
    ids = torch.arange(3, 63).view(2, 30)
    batch = Batch(ids, torch.ones_like(ids), ids)
    found = []
    for model in (plain, rounded):
        # A forward pass without gradients, after which everything must still be differentiable.
        check_split(model)
        layers = inject(model, ChainConfig(rank=4, depth=1, alpha=4, target_modules=["q_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in layers.values():
                layer.B.normal_(0.0, 0.1, generator=generator)
        value = loss.add_gradients(model, batch, 0.01, torch.device("cpu"))
        found.append((value, [layer.A.grad for layer in layers.values()]))
    (expected, gradients), (value, their_gradients) = found
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()  # float32, other kernels


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_step_goes_the_way_of_the_unrounded_one(recipe_of, run_tiny, quantization):
    """Rounding the base changes the gradients by some percent, not their direction."""
    changes = {"training.max_steps": 1, "training.warmup_steps": 0, "training.save_every": 1}
    exact = run_tiny({**changes, "name": "exact"})
    rounded = run_training(recipe_of({**changes, "name": "rounded", "model.quantization": quantization}))
    norms = [read_jsonl(job.run.metrics_path)[0] for job in (exact, rounded)]
    assert norms[1]["loss"] == pytest.approx(norms[0]["loss"], rel=0.02)
    assert norms[1]["grad_norm"] == pytest.approx(norms[0]["grad_norm"], rel=0.2)
    first, second = (
        torch.cat(
            [
                (parameter.detach()).flatten()
                for name, parameter in job.parameters.items()
                if name.endswith(".B")
            ]
        )
        for job in (exact, rounded)
    )
    # Of signs, after Adam's first step.
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.6
