"""Which modules are matched, how a mismatch is told, and taking chains out or into the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from linchain_cli.chain import (
    ChainConfig,
    chain_layers,
    detach,
    disabled,
    inject,
    match_modules,
    merge,
    set_enabled,
)
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


def test_names_regex_and_all_linear(llama):
    assert match_modules(llama, ["q_proj", "up_proj"]).per_pattern == {"q_proj": 2, "up_proj": 2}
    assert match_modules(llama, ["layers.1.self_attn.q_proj"]).paths == ("model.layers.1.self_attn.q_proj",)
    assert len(match_modules(llama, r"layers\.0\..*_proj").paths) == 7
    assert match_modules(llama, "k_proj").per_pattern == {"k_proj": 2}
    everything = match_modules(llama, "all-linear").paths
    assert len(everything) == 14 and "lm_head" not in everything


def test_a_module_met_twice_is_adapted_once(llama):
    assert len(match_modules(llama, ["q_proj", "self_attn.q_proj"]).paths) == 2


def test_a_pattern_without_a_match_lists_what_there_is(llama):
    with pytest.raises(InputError) as error:
        inject(llama, ChainConfig(target_modules=["q_proj", "qproj"]))
    message = str(error.value)
    assert "'qproj' matches no linear module" in message
    assert "Did you mean 'q_proj'?" in message
    assert "down_proj (2)" in message
    assert not chain_layers(llama)


def test_a_broken_regex_is_told(llama):
    with pytest.raises(InputError, match="no regular expression"):
        match_modules(llama, "q_(proj")


def test_a_module_that_is_not_linear_is_named_as_such(llama):
    with pytest.raises(InputError, match="LlamaRMSNorm, which are not linear"):
        match_modules(llama, ["input_layernorm"])


def test_expert_parameters_are_named_as_such():
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    with pytest.raises(InputError, match="only meets 3-D expert parameters"):
        match_modules(model, r".*experts.*")


def test_prefix_limits_matching(llama):
    assert len(match_modules(llama, ["q_proj"], prefix="model.layers.0").paths) == 1
    with pytest.raises(InputError, match="outside the text decoder"):
        match_modules(llama, ["q_proj"], prefix="model.embed_tokens")


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


def test_merging_into_a_tied_weight_is_refused(tiny_tied_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_tied_dir).eval()
    inject(model, ChainConfig(rank=4, target_modules=["lm_head"]))
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
