"""The last block's feed-forward layer at labelled positions only: the same loss, the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from linchain_cli.chain import ChainConfig, chain_layers, inject
from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.model.attention import use_grouped_attention
from linchain_cli.model.head import hidden_states
from linchain_cli.model.last_block import reading_only, trim_last_block
from linchain_cli.training import loss
from linchain_cli.training.base import suit_to_training
from linchain_cli.training.blocks import set_up_blocks

# Their feed-forward layer adds the residual itself (bloom, mpt), or is no module of its own (opt).
WITHOUT = {"bloom", "mpt", "opt"}
IDS = torch.arange(3, 43).view(2, 20)
READ = torch.tensor([4, 5, 19, 30])


def test_what_is_read_stays_the_same_and_gradients_agree(architecture, small_model, hidden_and_gradient):
    model = small_model(architecture)
    expected = hidden_and_gradient(model, lambda: hidden_states(model, IDS).flatten(0, 1)[READ])
    assert trim_last_block(model) == (architecture not in WITHOUT)
    untrimmed = hidden_states(model, IDS).flatten(0, 1)

    def trimmed():
        with reading_only(model, READ):
            return hidden_states(model, IDS).flatten(0, 1)

    found = hidden_and_gradient(model, lambda: trimmed()[READ])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # Elsewhere something else is computed, or nothing was saved.
    same = torch.isclose(trimmed(), untrimmed, rtol=1e-4, atol=1e-5).all(1)
    assert bool(same.all()) == (architecture in WITHOUT)
    torch.testing.assert_close(hidden_states(model, IDS).flatten(0, 1), untrimmed)


def batch(labels: torch.Tensor) -> Batch:
    return Batch(IDS, torch.ones_like(IDS), labels)


def labels(*positions: int) -> torch.Tensor:
    flat = torch.full((IDS.numel(),), IGNORED)
    flat[list(positions)] = IDS.flatten()[list(positions)]
    return flat.view_as(IDS)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("positions", [(5, 6, 21, 31), (7,), (), (*range(1, 20), *range(21, 40))])
def test_a_training_steps_gradients_are_those_of_the_whole_block(small_model, flat, recompute, positions):
    model = small_model("llama")
    torch.manual_seed(0)
    inject(model, ChainConfig(rank=4, depth=2, alpha=8, target_modules="all-linear", init="kaiming"), seed=0)
    for layer in chain_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    plain = copy.deepcopy(model)
    assert not flat or use_grouped_attention(model)
    suit_to_training(model)
    for each in (plain, model):
        set_up_blocks(each, recompute=recompute, compiled=False)
    seen = []
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda module, x: seen.append(x[0].shape[:-1].numel())
    )
    losses = [
        loss.backward(each, batch(labels(*positions)), 0.25, torch.device("cpu")) for each in (plain, model)
    ]
    whole = 48 if flat else 40  # of 40 tokens, flat rows make a multiple of 16
    assert seen[0] == (len(positions) if 0 < len(positions) < 20 else whole)
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_block_whose_other_positions_are_read_stays_whole(small_model):
    """Here the hidden states at one position are those of the one before."""
    model = small_model("llama")
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x.roll(1, dims=1))
    assert not trim_last_block(model)
    assert "forward" not in vars(model.model.layers[-1].mlp)
