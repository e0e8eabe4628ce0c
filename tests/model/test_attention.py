"""Grouped attention against transformers' eager one, on small random models of many architectures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linchain_cli.model.attention import FLAT_SDPA, GROUPED, grouped_attention, use_attention
from linchain_cli.model.head import hidden_states

from ..architectures import SMALL

IDS = torch.arange(3, 63).view(2, 30) % 117 + 3


@pytest.fixture
def run(hidden_and_gradient):
    """run(model): hidden states of texts longer than the sliding windows, and the embeddings' gradient."""
    return lambda model: hidden_and_gradient(model, lambda: hidden_states(model, IDS))


def test_values_and_gradients_are_those_of_eager_attention(architecture, small_model, own_attention, run):
    model = small_model(architecture)
    model.set_attn_implementation("eager")
    expected = run(model)
    assert use_attention(model, GROUPED) == (architecture not in own_attention)
    assert (model.config._attn_implementation == GROUPED) == (architecture not in own_attention)
    for ours, theirs in zip(run(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())


def test_it_needs_nothing_of_training(tiny_llama_dir):
    """Evaluations load a model without importing what reads flat rows."""
    program = (
        "import sys, pathlib; from linchain_cli.model.loading import load_model;"
        f" model = load_model(pathlib.Path({str(tiny_llama_dir)!r}), dtype='float32', device='cpu');"
        " print(model.config._attn_implementation, 'linchain_cli.model.flat_rows' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == [GROUPED, "False"]


def test_bfloat16_is_as_close_to_float32_as_eager_attention_is(small_model, run):
    reference = run(small_model("llama"))[0]
    errors = {}
    for implementation in ("eager", GROUPED):
        model = small_model("llama").bfloat16()
        model.set_attn_implementation(implementation)
        errors[implementation] = (run(model)[0].float() - reference).abs().mean()
    assert errors[GROUPED] < 1.1 * errors["eager"]


def test_capped_scores(small_model, run):
    """Small scores hardly show a cap, so the cap is a low one here."""
    model = small_model("gemma2")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1e-3
    model.set_attn_implementation("eager")
    expected = run(model)
    model.set_attn_implementation(GROUPED)
    for ours, theirs in zip(run(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())


def test_gradcheck():
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 4, 3, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)
    )
    mask = torch.full((4, 4), -1e9, dtype=torch.float64).triu(1)
    module = torch.nn.Identity().eval()
    assert torch.autograd.gradcheck(
        lambda *inputs: grouped_attention(module, *inputs, mask, softcap=2.0)[0], (query, key, value)
    )


@pytest.mark.parametrize("name", [GROUPED, FLAT_SDPA])
@pytest.mark.parametrize("given", ["s_aux", "position_bias", "indices"])
def test_what_is_not_in_the_formula_is_refused(small_model, name, given):
    model = small_model("llama")
    assert use_attention(model, name)
    with pytest.raises(NotImplementedError, match=f"attention with {given}"):
        model(input_ids=IDS, **{given: torch.zeros(1)})  # which it hands on


def test_attention_to_chosen_keys_stays_the_models_own():
    """A trial's few tokens all see each other: that further ones would not is no matter of values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "glm_moe_dsa" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no GLM 5")
    fields = {**SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    fields |= {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    fields |= {"v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm_moe_dsa", **fields)).float().eval()
    ids = torch.arange(1, 49)[None]
    for name in (GROUPED, FLAT_SDPA):
        model.set_attn_implementation("eager")
        expected = hidden_states(model, ids)
        use_attention(model, name)
        torch.testing.assert_close(hidden_states(model, ids), expected)


def test_sinks_keep_their_own_attention(small_model):
    model = small_model("llama")
    model.set_attn_implementation("eager")
    model.model.layers[0].self_attn.sinks = torch.zeros(4)
    assert not use_attention(model, GROUPED)


def test_other_answers_keep_eager_attention(small_model, monkeypatch):
    from transformers import AttentionInterface

    def wrong(*arguments, **options):
        output, weights = grouped_attention(*arguments, **options)
        return 1.01 * output, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, wrong)
    model = small_model("llama")
    model.set_attn_implementation("eager")
    assert not use_attention(model, GROUPED)
    assert model.config._attn_implementation == "eager"
