"""Taking chains out or into the weights, and what does not go."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from linchain_cli.chain import ChainConfig, chain_layers, detach, disabled, folded, inject, merge, set_enabled
from linchain_cli.chain.inject import inject_at
from linchain_cli.errors import InputError

IDS = torch.tensor([[3, 14, 15, 92, 65]])


@pytest.fixture
def llama(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture
def gpt2(tiny_gpt2_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).eval()


def randomise_b(model: nn.Module) -> None:
    torch.manual_seed(1)
    for layer in chain_layers(model).values():
        nn.init.normal_(layer.B, std=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_injection_changes_no_bit_of_the_output(name, request):
    model = request.getfixturevalue(name)
    before = model(IDS).logits
    layers = inject(model, ChainConfig(rank=4, depth=3, alpha=8))
    assert layers
    assert torch.equal(model(IDS).logits, before)
    trained = {
        name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert trained == {"A", "links", "B"}


def test_falcons_own_linear_class_merges(small_model):
    model = small_model("falcon")
    layers = inject(model, ChainConfig(rank=4))
    assert type(next(iter(layers.values())).base).__name__ == "FalconLinear"
    randomise_b(model)
    adapted = model(IDS).logits
    merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_gives_the_adapted_model_and_detach_the_base(name, request):
    model = request.getfixturevalue(name)
    before = model(IDS).logits
    inject(model, ChainConfig(rank=4, depth=3, alpha=8))
    randomise_b(model)
    adapted = model(IDS).logits
    assert (adapted - before).abs().max() > 1e-2
    with disabled(model):
        assert torch.equal(model(IDS).logits, before)
    set_enabled(model, False)
    assert torch.equal(model(IDS).logits, before)
    set_enabled(model, True)
    merge(model)
    assert not chain_layers(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)


def test_detach_restores_the_base(llama):
    before = llama(IDS).logits
    names = list(llama.state_dict())
    inject(llama, ChainConfig(rank=4))
    randomise_b(llama)
    detach(llama)
    assert list(llama.state_dict()) == names
    assert torch.equal(llama(IDS).logits, before)


def test_a_tied_weight_is_refused_before_anything_is_spent(tiny_tied_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_tied_dir).eval()
    config = ChainConfig(rank=4, target_modules=["lm_head"])
    with pytest.raises(InputError, match="'lm_head' shares its weight with 'model.embed_tokens'"):
        inject(model, config)
    assert not chain_layers(model)
    inject_at(model, ["lm_head"], config, seed=0)  # as an adapter from elsewhere comes in
    with pytest.raises(InputError, match="shares its weight"):
        merge(model)


def test_a_second_injection_is_refused(llama):
    inject(llama, ChainConfig(rank=4))
    with pytest.raises(InputError, match="already"):
        inject(llama, ChainConfig(rank=4))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"depth": -1}, {"init": "ortogonal"}])
def test_an_impossible_chain_is_refused(wrong):
    with pytest.raises(InputError):
        ChainConfig(**wrong)


def test_a_model_that_multiplies_by_a_layers_weight_itself_trains_its_chain(small_model):
    """Mamba reads dt_proj's weight and bias, and never calls it."""
    model = small_model("mamba")
    before = model(IDS).logits
    inject(model, ChainConfig(rank=4, depth=2, alpha=400, target_modules=["dt_proj", "x_proj"]))
    assert torch.equal(model(IDS).logits, before)
    randomise_b(model)
    adapted = model(IDS).logits
    adapted.sin().sum().backward()
    gradients = [layer.B.grad.abs().max() for layer in chain_layers(model).values()]
    assert len(gradients) == 4 and min(gradients) > 0 and (adapted - before).abs().max() > 1e-3
    with folded(model):
        torch.testing.assert_close(model(IDS).logits, adapted)
    with disabled(model):
        assert torch.equal(model(IDS).logits, before)
    merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)
