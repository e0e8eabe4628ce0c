"""`training.learning_rate: auto`: the table, what alpha and links change of it, where the number shows; and
`adapter.scale: match`."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from linchain_cli.chain import ChainLinear, load_adapter
from linchain_cli.chain.init import initialise
from linchain_cli.recipe import AdapterConfig, load_recipe
from linchain_cli.training import rate as rates
from linchain_cli.training.chains import chain_config
from linchain_cli.training.rate import active_parameters, auto_rate


def on_meta(kind: str, **fields) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **fields)
        )


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
QWEN_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("kind", "fields", "billions", "rate"),
    [
        ("llama", LLAMA_1B, 1.24, 1e-3),
        ("llama", LLAMA_8B, 8.03, 3e-4),
        ("qwen3_moe", QWEN_30B_A3B, 3.3, 1e-3),
    ],
)
def test_published_rates_by_family_and_size(kind, fields, billions, rate):
    """The sizes are those that the models are known by; of a mixture the ones that a token meets."""
    model = on_meta(kind, **fields)
    assert active_parameters(model) / 1e9 == pytest.approx(billions, rel=0.03)
    found = auto_rate(model, AdapterConfig(init="orthogonal"))
    assert found.rate == rate and kind in found.describe()


class OfKind(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.config = transformers.LlamaConfig()
        self.config.model_type = kind
        self.layer = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("adapter", "factor"),
    [
        ({"rank": 8}, 1),
        ({"rank": 64}, 1),  # alpha / rank has the rank cancelled already
        ({"alpha": 16}, 2),
        ({"alpha": 64}, 0.5),
        ({"depth": 3, "init": "kaiming"}, 3**1.5),
        ({"depth": 1, "init": "kaiming"}, 3**0.5),
        ({"depth": 3, "init": "kaiming", "scale": "match"}, 1),
        ({"depth": 6}, 1),
        ({"depth": 0, "init": "kaiming"}, 1),
    ],
)
def test_what_alpha_and_links_take_away_the_rate_gives_back(adapter, factor):
    found = auto_rate(OfKind("llama"), AdapterConfig(**adapter))
    assert found.rate == pytest.approx(1e-3 * factor, rel=0.03)


@pytest.mark.parametrize(
    ("parameters", "rate"), [(2.3e7, 2.5e-4), (1.84e8, 2.5e-4), (3.55e8, 1.5e-4), (1.5e9, 1e-4), (8e9, 1e-4)]
)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_classifiers_have_the_rates_of_loras_authors(monkeypatch, parameters, rate, task):
    """At alpha 16, theirs of RoBERTa, twice as much."""
    monkeypatch.setattr(rates, "active_parameters", lambda model: parameters)
    assert auto_rate(OfKind("llama"), AdapterConfig(), task).rate == rate
    found = auto_rate(OfKind("bert"), AdapterConfig(alpha=16), task)
    assert found.rate == 2 * rate and "times 32 / alpha" in found.describe()


def test_a_number_far_from_auto_is_told(recipe_of):
    model = OfKind("llama")
    note = rates.far_from_auto(recipe_of({"training.learning_rate": 1e-3}), model)
    assert note.startswith("training.learning_rate: 0.001, where auto would be 0.004: 0.001 for")
    assert rates.far_from_auto(recipe_of({"training.learning_rate": 3e-3}), model) is None
    assert rates.far_from_auto(recipe_of({"training.learning_rate": "auto"}), model) is None
    assert "0.01, where" in rates.far_from_auto(recipe_of({"training.learning_rate": 1e-2}), model)


def test_a_family_that_the_table_lacks_is_told():
    assert "gpt2, which the table lacks" in auto_rate(OfKind("gpt2"), AdapterConfig()).describe()


def test_a_quantised_layer_counts_for_what_it_stands_for():
    class Linear4bit(nn.Linear):
        """Two of bitsandbytes' numbers lie in one byte."""

        def __init__(self):
            super().__init__(64, 64, bias=False)
            self.weight = nn.Parameter(torch.zeros(64 * 32, 1, dtype=torch.uint8), requires_grad=False)

    model = OfKind("llama")
    model.layer = Linear4bit()
    assert active_parameters(model) == 64 * 64


def test_the_number_is_in_the_recipe_and_in_run_json(run_tiny, capsys):
    auto = {"training.learning_rate": "auto", "training.max_steps": 2, "adapter.alpha": 64}
    run = run_tiny(auto).run
    assert load_recipe(run.recipe_path).training.learning_rate == 5e-4
    status = run.read_status()
    assert status.learning_rate == 5e-4 and "times 32 / alpha" in status.auto_rate
    assert "learning rate 0.0005, by auto: 0.001 for" in capsys.readouterr().err
    # A run that is continued has the number to go on from, and its recipe may say either.
    longer = auto | {"training.max_steps": 3}
    assert run_tiny(longer, resume=True).state.step == 3


def test_a_number_of_the_recipe_stays(run_tiny, capsys):
    status = run_tiny({"training.max_steps": 2}).run.read_status()
    assert status.learning_rate == 0.01 and status.auto_rate is None
    assert "by auto" not in capsys.readouterr().err


@pytest.mark.parametrize("depth", [1, 3])
def test_match_starts_kaiming_links_at_loras_scale(recipe_of, base, depth):
    """The spread of what a chain adds after one step of B, which is what LoRA's adds: with kaiming links
    alone it is 3^(depth / 2) times as small."""

    def spread(**adapter) -> float:
        config = chain_config(recipe_of({f"adapter.{key}": value for key, value in adapter.items()}))
        found = []
        for seed in range(40):
            layer = ChainLinear(nn.Linear(64, 48), config.rank, config.depth, config.alpha)
            initialise(layer, "layer", config.init, seed)
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(256, 64, generator=generator)
            with torch.no_grad():  # Adam's first step: the sign of some gradient, as long as the rate
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator).sign() * 1e-3)
                found.append((layer(x) - layer.base(x)).var().item())
        return sum(found) / len(found)

    lora = spread(**{"depth": 0, "rank": 16})
    plain = spread(depth=depth, rank=16, init="kaiming")
    matched = spread(depth=depth, rank=16, init="kaiming", scale="match")
    assert plain / lora == pytest.approx(3**-depth, rel=0.25)
    assert matched / lora == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("init", ["orthogonal", "identity"])
def test_match_changes_nothing_where_nothing_is_lost(recipe_of, init):
    assert chain_config(recipe_of({"adapter.init": init, "adapter.scale": "match"})).alpha == 8


def test_chain_json_holds_the_alpha_that_the_chain_computes_with(run_tiny):
    """So that merging, exporting and inspecting need to know of alpha and rank alone."""
    job = run_tiny({"training.max_steps": 1, "adapter.init": "kaiming", "adapter.scale": "match"})
    adapter = load_adapter(job.run.adapter_dir)
    assert adapter.config.alpha == pytest.approx(8 * 3)
    layer = next(iter(job.layers.values()))
    assert layer.scaling == adapter.config.scaling == pytest.approx(6)
    # Another run may begin with it, at the same scale.
    again = {"adapter.init_from": str(job.run.adapter_dir), "name": "again", "training.max_steps": 1}
    run_tiny(again | {"adapter.init": "kaiming", "adapter.scale": "match"})
