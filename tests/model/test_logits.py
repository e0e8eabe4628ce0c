"""Logits at chosen positions are those of the whole, on models that do something behind the output projection
too.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linchain_cli.chain import ChainConfig, inject, merge
from linchain_cli.errors import LinchainError
from linchain_cli.model import logits
from linchain_cli.model.logits import last_logits, logits_at

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
# Soft-capped, scaled, plain, tied.
ARCHITECTURES = {
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "llama": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2},
}


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**SIZES, **ARCHITECTURES[request.param]})
    return AutoModelForCausalLM.from_config(config).eval()


def test_they_are_the_whole_models_logits(model):
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.zeros(3, 7, dtype=torch.bool)
    positions[0, [1, 6]] = positions[2, 0] = True
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with logits_at(model, positions):
            chosen = model(input_ids=ids).logits
        assert chosen.shape == (1, 3, 50)
        torch.testing.assert_close(chosen[0], whole[positions], rtol=1e-5, atol=1e-5)
        last, cache = last_logits(model, ids)
        torch.testing.assert_close(last, whole[:, -1], rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == 7
        assert model(input_ids=ids).logits.shape == whole.shape  # nothing is left behind


def test_gradients_flow_from_there(model):
    ids = torch.arange(6)[None]
    positions = torch.zeros(1, 6, dtype=torch.bool)
    positions[0, 3] = True
    embedding = model.get_input_embeddings().weight
    with logits_at(model, positions):
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    found = embedding.grad.clone()
    embedding.grad = None
    model(input_ids=ids).logits[positions].float().logsumexp(-1).sum().backward()
    torch.testing.assert_close(found, embedding.grad, rtol=1e-4, atol=1e-6)


def test_positions_of_another_shape_are_an_error(model):
    with pytest.raises(LinchainError, match="positions to read"):
        with logits_at(model, torch.ones(1, 5, dtype=torch.bool)):
            model(input_ids=torch.arange(6)[None])
    assert model(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 50)


def test_a_forward_that_never_reaches_the_projection_is_an_error(model):
    with pytest.raises(LinchainError, match="never called its output projection"):
        with logits_at(model, torch.ones(1, 6, dtype=torch.bool)):
            pass


def test_a_head_with_a_chain_is_projected_with_it():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SIZES, **ARCHITECTURES["llama"]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.nn.init.normal_(inject(model, ChainConfig(rank=2, target_modules=["lm_head"]))["lm_head"].B)
    ids, positions = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad(), logits_at(model, positions, float32=True):
        found = model(input_ids=ids).logits[0]
    merge(model)
    with torch.no_grad(), logits_at(model, positions, float32=True):
        torch.testing.assert_close(found, model(input_ids=ids).logits[0], rtol=1e-2, atol=1e-2)
    assert found.dtype == torch.float32


def test_half_precision_is_projected_in_float32(monkeypatch):
    monkeypatch.setattr(logits, "VOCABULARY_BLOCK", 16)
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **{**SIZES, **ARCHITECTURES["gemma2"]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, positions = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool)
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), logits_at(model, positions, float32=True):
        found = model(input_ids=ids).logits[0]
    handle.remove()
    assert found.dtype == torch.float32
    expected = seen[0][0].double() @ model.get_output_embeddings().weight.double().T
    expected = 5.0 * torch.tanh(expected / 5.0)  # the model's own soft-capping still follows
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), logits_at(model, positions):
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
