"""The split into backbone and head, on small random models of many architectures."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from linchain_cli.errors import InputError
from linchain_cli.model.config import empty_model
from linchain_cli.model.head import (
    backbone,
    check_split,
    head_logits,
    head_weight,
    hidden_states,
    untrained_tokens,
)

from ..architectures import SMALL


def test_the_two_halves_are_the_whole(architecture, small_model):
    model = small_model(architecture)
    check_split(model)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        hidden = hidden_states(model, ids)
        chosen = head_logits(model, hidden[[0, 1, 1], [9, 0, 4]])
    torch.testing.assert_close(chosen, whole[[0, 1, 1], [9, 0, 4]], rtol=1e-5, atol=1e-5)
    assert chosen.std() > 1e-3, "constant logits would show nothing"


@pytest.mark.parametrize("kind", ["llama4_text", "modernbert-decoder"])
def test_a_backbone_is_found_where_the_models_own_names_mislead(kind, small_model):
    """Llama 4's text model names no base model; ModernBERT's `decoder` is its output layer."""
    model = small_model(kind)
    check_split(model)
    assert backbone(model) is model.model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2"])
def test_the_heads_gradient_reaches_the_hidden_states(kind, small_model):
    model = small_model(kind)
    ids = torch.arange(3, 13)[None]
    hidden = hidden_states(model, ids)[0].requires_grad_()
    head_logits(model, hidden)[4, 7].backward()
    captured = []
    handle = model.base_model.register_forward_hook(
        lambda *args: captured.append(args[2].last_hidden_state.requires_grad_())
    )
    model(input_ids=ids, use_cache=False).logits[0, 4, 7].backward()
    handle.remove()
    torch.testing.assert_close(hidden.grad, captured[0].grad[0])


def test_the_backbones_own_forward_is_back_afterwards(small_model):
    model = small_model("llama")
    assert "forward" not in vars(model.base_model)
    head_logits(model, torch.zeros(1, 32))
    assert "forward" not in vars(model.base_model)
    model.base_model.forward = own = model.base_model.forward
    with pytest.raises(RuntimeError):
        head_logits(model, torch.zeros(1, 31))
    assert model.base_model.forward is own


def test_a_model_that_does_more_between_the_halves_is_refused(small_model):
    model = small_model("llama")

    class Odd(type(model)):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = (
                output.logits + 0.1 * self.model.embed_tokens(input_ids).sum(-1, keepdim=True).cos()
            )
            return output

    model.__class__ = Odd
    with pytest.raises(InputError, match="Odd computes more between its hidden states and its logits"):
        check_split(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma3TextConfig", {**SMALL, "head_dim": 8, "use_bidirectional_attention": True}),
        ("BertGenerationConfig", SMALL),
        ("XLNetConfig", {"vocab_size": 120, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    ],
)
def test_a_model_that_sees_what_it_should_predict_is_refused(name, options):
    """transformers counts them among the causal ones; what they are stands in their configuration."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(InputError, match=f"{type(model).__name__} .* sees the tokens that it should predict"):
        check_split(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # whose head has a weight of its own, and the embeddings'
def test_tokens_that_the_head_never_learned_are_told(kind, small_model, tmp_path):
    model = copy.deepcopy(small_model(kind))
    weight = head_weight(model, tmp_path)
    assert untrained_tokens(weight, range(3, 100)) == []
    weight[[5, 6]] = 0
    weight[7] = 1e-23
    weight[9] = weight[40]
    assert untrained_tokens(weight, range(3, 100)) == [5, 6, 7, 9, 40]
    assert untrained_tokens(weight, [8, 40, 41]) == [40]
    assert untrained_tokens(weight.to(torch.bfloat16), [4, 6, 8, 9]) == [6, 9]
    # As the checkpoint has it, where the model does not.
    model.save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    torch.testing.assert_close(head_weight(empty, tmp_path), weight, rtol=0, atol=0)
    (tmp_path / "model.safetensors").unlink()
    assert head_weight(empty, tmp_path) is None
