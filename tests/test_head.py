"""The split into backbone and head, on small random models of many architectures."""

from __future__ import annotations

import pytest
import torch

from linchain_cli.errors import InputError
from linchain_cli.head import check_split, head_logits, hidden_states

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
# Model type, and what its configuration needs besides SMALL (or in its place).
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {
        "logit_scale": 0.5,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "nemotron": {},
    "smollm3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}


def small_model(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = ARCHITECTURES[kind]
    names = set(AutoConfig.for_model(kind).to_dict()) | set(fields)
    known = {
        name: value
        for name, value in {**SMALL, **fields}.items()
        if name in names or name == "num_key_value_heads"
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_two_halves_are_the_whole(kind):
    model = small_model(kind)
    check_split(model)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        hidden = hidden_states(model, ids)
        chosen = head_logits(model, hidden[[0, 1, 1], [9, 0, 4]])
    torch.testing.assert_close(chosen, whole[[0, 1, 1], [9, 0, 4]], rtol=1e-5, atol=1e-5)
    assert chosen.std() > 1e-3, "constant logits would show nothing"


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2"])
def test_the_heads_gradient_reaches_the_hidden_states(kind):
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


def test_the_backbones_own_forward_is_back_afterwards():
    model = small_model("llama")
    assert "forward" not in vars(model.base_model)
    head_logits(model, torch.zeros(1, 32))
    assert "forward" not in vars(model.base_model)
    model.base_model.forward = own = model.base_model.forward
    with pytest.raises(RuntimeError):
        head_logits(model, torch.zeros(1, 31))
    assert model.base_model.forward is own


def test_a_model_that_does_more_between_the_halves_is_refused():
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
