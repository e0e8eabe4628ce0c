"""Which modules are matched, how a mismatch is told, and what no chain adapts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from linchain_cli.chain import ChainConfig, chain_layers, coverage, inject, linear_shape, match_modules
from linchain_cli.errors import InputError


@pytest.fixture
def llama(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


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
    assert "down_proj (2)" in message and message.endswith("; all-linear takes all but the head.")
    assert not chain_layers(llama)
    with pytest.raises(InputError, match=r"Write a list: \[q_proj, v_proj\]"):
        match_modules(llama, "q_proj, v_proj")


def test_a_broken_regex_is_told(llama):
    with pytest.raises(InputError, match="no regular expression"):
        match_modules(llama, "q_(proj")


def test_a_module_that_is_not_linear_is_named_as_such(llama):
    with pytest.raises(InputError, match="LlamaRMSNorm, which are not linear"):
        match_modules(llama, ["input_layernorm"])


def test_routed_experts_are_met_where_they_are_named(small_model):
    model = small_model("qwen2_moe")  # which has a shared expert with linear layers beside the routed ones
    down = {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    both = down | {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)}
    assert set(match_modules(model, ["experts.down_proj"]).paths) == down
    assert set(match_modules(model, r".*\.experts\.down_proj").paths) == down
    assert (
        set(match_modules(model, ["experts"]).paths) == both == set(match_modules(model, "mlp.experts").paths)
    )
    linear = set(match_modules(model, "all-linear").paths)
    for bare in ("down_proj", ["down_proj"], "all-linear", ["all-linear"]):
        assert set(match_modules(model, bare).paths) <= linear
    found = match_modules(model, ["all-linear", "experts"])
    assert set(found.paths) == linear | both and found.per_pattern["experts"] == len(both)


def test_experts_that_are_computed_in_an_unknown_way_are_named_as_such():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4, 3))

    model = nn.ModuleDict({"experts": Experts(), "up": nn.Linear(4, 3)})
    with pytest.raises(
        InputError, match="only meets 3-D expert parameters .e.g. experts.weight., which a chain"
    ):
        match_modules(model, r".*experts.*")


def test_prefix_limits_matching(llama):
    assert len(match_modules(llama, ["q_proj"], prefix="model.layers.0").paths) == 1
    with pytest.raises(InputError, match="outside the text decoder"):
        match_modules(llama, ["q_proj"], prefix="model.embed_tokens")


class Router(nn.Linear):
    """As in PhiMoE and Llama 4: which experts, and how much of each."""

    def forward(self, x):
        return super().forward(x).topk(1)


class Renamed(nn.Linear):
    """Nothing more than a linear layer, as transformers has several."""


class Rewritten(nn.Linear):
    """As Falcon writes it."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def test_only_what_is_a_plain_linear_layer_can_carry_a_chain():
    assert linear_shape(Router(4, 3)) is None
    assert linear_shape(Renamed(4, 3)) == linear_shape(Rewritten(4, 3)) == (4, 3)
    model = nn.ModuleDict({"router": Router(4, 3), "renamed": Renamed(4, 3), "up": nn.Linear(4, 3)})
    assert match_modules(model, "all-linear").paths == ("renamed", "up")
    with pytest.raises(InputError, match="1 modules of type Router, which are not linear layers"):
        match_modules(model, ["router"])


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_models_with_such_routers_train_with_all_linear(small_model, kind):
    model = small_model(kind)
    ids = torch.arange(3, 13)[None]
    before = model(ids).logits
    layers = inject(model, ChainConfig(rank=2))
    assert layers and not any("router" in path for path in layers)
    assert torch.equal(model(ids).logits, before)


def test_missing_targets_of_a_mixture_of_experts_are_told_together(small_model):
    """The default targets of a recipe, where the feed-forward layers are experts."""
    with pytest.raises(InputError) as error:
        match_modules(small_model("qwen3_moe"), ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    message = str(error.value)
    assert "'up_proj' matches no linear module. It only meets routed experts" in message
    assert "name them: experts.gate_up_proj." in message
    assert "'down_proj' matches no linear module" in message and "name them: experts.down_proj." in message
    assert "Its routed experts: experts.gate_up_proj (2), experts.down_proj (2)." in message
    assert "adapter.target_modules=[q_proj,k_proj,v_proj]" in message and "Did you mean" not in message


def test_weights_without_a_chain_are_counted_by_kind(llama):
    found = coverage(llama, match_modules(llama, ["q_proj", "v_proj", "up_proj", "down_proj"]).paths)
    attention, narrow, wide = 64 * 64, 64 * 32, 64 * 128
    assert found.weights == 2 * (2 * attention + 2 * narrow + 3 * wide)
    assert found.without_chain == {
        "mlp.gate_proj": 2 * wide,
        "self_attn.o_proj": 2 * attention,
        "self_attn.k_proj": 2 * narrow,
    }
    assert found.share == pytest.approx(1 - (2 * wide + 2 * attention + 2 * narrow) / found.weights)
    layers = inject(llama, ChainConfig(rank=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    assert coverage(llama, tuple(layers)) == found
    assert list(chain_layers(llama)) == list(layers)


def test_experts_and_recurrent_layers_are_named(small_model):
    mixtral = small_model("mixtral")
    found = coverage(mixtral, match_modules(mixtral, "all-linear").paths)
    experts = {kind: count for kind, count in found.without_chain.items() if "experts" in kind}
    assert set(experts) == {
        "experts.gate_up_proj (3-D expert parameters)",
        "experts.down_proj (3-D expert parameters)",
    }
    assert sum(experts.values()) == 2 * 4 * 3 * 32 * 48
    assert f"experts.gate_up_proj (3-D expert parameters) {2 * 4 * 2 * 32 * 48 / found.weights:.1%}" in (
        found.describe()
    )
    assert found.frozen_experts == ("experts.gate_up_proj", "experts.down_proj")
    assert "names them: experts.gate_up_proj, experts.down_proj" in found.describe()
    covered = coverage(mixtral, match_modules(mixtral, ["all-linear", "experts"]).paths)
    assert covered.without_chain.keys() == {"mlp.gate"} and not covered.frozen_experts
    mamba = small_model("mamba")
    found = coverage(mamba, match_modules(mamba, ["in_proj"]).paths)
    assert {"mixer.out_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.conv1d", "mixer.A_log"} == set(
        found.without_chain
    )
    assert "and 3 other kinds" in found.describe(most=2)
