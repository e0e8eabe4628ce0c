"""Trials: what counts as the same, forwards that are replaced and put back, models that would be changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, inject, merge
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.model.attention import GROUPED, use_attention
from linchain_cli.model.fast import (
    alike,
    changing_nothing,
    forget_failed_forward,
    is_replaced,
    probe_ids,
    record,
    replace_forward,
)
from linchain_cli.model.flat_rows import attention_way
from linchain_cli.model.loading import load_model
from linchain_cli.training.base import suit_to_training


def test_dimensions_that_are_large_for_every_token_hide_nothing():
    torch.manual_seed(0)
    hidden = torch.randn(20, 64)
    hidden[:, 3] += 1e4
    assert alike(hidden + 1e-5 * torch.randn(20, 64), hidden, torch.float32)
    wrong = hidden.clone()
    wrong[:, 4:] = wrong[:, 4:].roll(1, 0)
    assert not alike(wrong, hidden, torch.bfloat16)
    rounded = torch.randn(20, 64).bfloat16()
    assert alike(rounded, rounded.float() * (1 + 2**-9), torch.bfloat16)
    assert not alike(rounded.float() * (1 + 2**-9), rounded.float(), torch.float32)
    assert not alike(hidden * float("nan"), hidden, torch.float32)


def test_a_replaced_forward_is_bound_and_put_back():
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    own = layer(x)
    first = replace_forward(layer, lambda self, x: 2 * type(self).forward(self, x))
    torch.testing.assert_close(layer(x), 2 * own)
    twin = copy.deepcopy(layer)
    nn.init.zeros_(twin.weight), nn.init.ones_(twin.bias)
    assert torch.equal(twin(x), torch.full((4, 2), 2.0)), "a copy computes with its own weights"
    second = replace_forward(layer, lambda self, x: x)
    assert torch.equal(layer(x), x) and is_replaced(layer)
    second()
    torch.testing.assert_close(layer(x), 2 * own)
    first()
    assert torch.equal(layer(x), own) and not is_replaced(layer)


def test_suiting_a_model_to_training_can_be_taken_back(small_model):
    model = small_model("llama")
    use_attention(model, GROUPED)
    undo = suit_to_training(model)
    assert attention_way(model, 8) is not None and any(map(is_replaced, model.modules()))
    undo()
    assert attention_way(model, 8) is None and not any(map(is_replaced, model.modules()))


def test_a_model_that_changes_its_weights_is_refused(small_model):
    model = small_model("llama")

    def rescale(module, _inputs, _output):
        module.mlp.up_proj.weight.data.mul_(2)

    handle = model.model.layers[0].register_forward_hook(rescale)
    with pytest.raises(InputError, match="changes its own weights.*layers.0.mlp.up_proj.weight"):
        suit_to_training(model)
    handle.remove()
    suit_to_training(model)


def test_rwkv_keeps_its_weights(small_model, tmp_path):
    """It would halve some in its first forward in eval mode: chains beside them count twice and more."""
    model = small_model("rwkv")
    with pytest.raises(InputError, match="RwkvForCausalLM changes its own weights"):
        suit_to_training(model)
    small_model("rwkv").save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path, dtype="float32", device="cpu"), torch.arange(3, 13)[None]
    suit_to_training(loaded)
    # Up to the norms' epsilon, which halved states make more of.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    for layer in inject(loaded, ChainConfig(rank=2)).values():
        nn.init.normal_(layer.B)
    adapted = loaded(ids).logits
    merge(loaded)
    torch.testing.assert_close(loaded(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    trained = loaded.train()(ids).logits  # as transformers trains it, never rescaled
    torch.testing.assert_close(trained, adapted, rtol=1e-4, atol=1e-4)


def test_buffers_are_put_back():
    module = nn.Module()
    module.register_buffer("written", torch.zeros(3))
    module.register_buffer("replaced", torch.ones(3), persistent=False)
    written = module.written
    with changing_nothing(module):
        module.written += 1
        module.replaced = torch.zeros(5)
    assert module.written is written and torch.equal(written, torch.zeros(3))
    assert torch.equal(module.replaced, torch.ones(3))


def test_a_spread_base_that_cannot_begin_anew_says_so():
    """Rather than that the model changes its weights, which are whole after a forward that failed."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.reshard = lambda: None  # what torch's FSDP2 gives a module, before 2.13 without reset_iter_state
    with pytest.raises(LinchainError, match="after which torch .* cannot go on .* with torch 2.13 it can"):
        with changing_nothing(model):
            model[0].weight.data += 1
            forget_failed_forward(model)
    begun = []
    model.reset_iter_state = lambda: begun.append(1)
    forget_failed_forward(model)
    assert begun == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_single_bit_is_noticed(dtype):
    module = nn.Linear(3, 5, bias=False).requires_grad_(False)
    module.weight.data = torch.ones(5, 3, dtype=dtype)
    with pytest.raises(InputError), changing_nothing(module):
        module.weight.view(torch.uint8)[4, -1] ^= 1


def test_probes_fit_the_vocabulary(small_model):
    ids = probe_ids(small_model("llama"), 2, 100)
    assert ids.shape == (2, 100) and ids.max() < 120


def test_the_record_goes_with_a_copy(small_model):
    model = small_model("llama")
    record(model)["found"] = True
    twin = copy.deepcopy(model)
    assert record(twin)["found"]
    record(twin)["found"] = False
    assert record(model)["found"]
