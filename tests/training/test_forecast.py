"""Predicted memory against what a real model keeps, and predicted time where there is something to time."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from linchain_cli.chain import ChainConfig, chain_layers, folded, inject
from linchain_cli.data.dataset import prepare_data
from linchain_cli.machine import SharedCpus
from linchain_cli.model.classifier import Outputs, head_names
from linchain_cli.model.config import empty_model, text_decoder_prefix
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import Recipe
from linchain_cli.training.forecast import Forecast, forecast, memory, recipe_epoch, time
from linchain_cli.training.forecast.memory import saved_bytes
from linchain_cli.training.forecast.model import forecast_model
from linchain_cli.training.forecast.time import computed_share

from ..classifiers import KINDS, make_checkpoint

CPU = torch.device("cpu")
CHAINS = ChainConfig(rank=4, depth=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(time, "_TIMING_SECONDS", 0.01)


@pytest.fixture
def make_recipe(tmp_path, commonsense_rows):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(commonsense_rows(60)))

    def make(directory: Path, model: dict | None = None, **training) -> Recipe:
        return Recipe(
            name="x",
            model={"path": str(directory), "dtype": "float32", **(model or {})},
            adapter={"rank": 4, "depth": 2, "target_modules": ["q_proj", "down_proj"]},
            data={"train": str(path), "validation": 10},
            training={"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2, **training},
        )

    return make


@pytest.fixture
def forecast_of(make_recipe, tmp_path):
    def make(directory: Path, config: ChainConfig = CHAINS, **training) -> Forecast:
        recipe = make_recipe(directory, **training)
        data = prepare_data(recipe.data, load_tokenizer(directory), cache_dir=tmp_path / "cache")
        return forecast(recipe, config, directory, data.train, data.validation, CPU)

    return make


def kept_bytes(model: torch.nn.Module, batch: int, length: int) -> int:
    """What a real forward pass keeps for the backward pass, but parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), folded(model):
        output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert output.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "kind, targets", [("tiny_llama_dir", ["q_proj", "down_proj"]), ("tiny_gpt2_dir", ["c_attn", "c_proj"])]
)
@pytest.mark.parametrize("depth", [0, 2])
def test_the_count_is_what_a_real_forward_keeps(request, make_recipe, kind, targets, depth):
    directory = request.getfixturevalue(kind)
    config = ChainConfig(rank=4, depth=depth, target_modules=targets)
    model_of_recipe = forecast_model(make_recipe(directory), config, directory, CPU)
    model_of_recipe.set_attn_implementation("eager")
    counted = saved_bytes(model_of_recipe, 3, 17)

    model = load_model(directory, dtype="float32", device=CPU, attention="eager")
    inject(model, config)
    assert counted == kept_bytes(model, 3, 17) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_are_counted_with_their_head(tmp_path, kind):
    directory, config = make_checkpoint(kind, tmp_path), ChainConfig(rank=4, target_modules=KINDS[kind][1])
    empty = empty_model(directory, Outputs(("bad", "good")))
    model = load_model(
        directory, dtype="float32", device=CPU, attention="eager", outputs=Outputs(("bad", "good"))
    )
    for each in (empty, model):
        inject(each, config, 1, text_decoder_prefix(model))
    empty.set_attn_implementation("eager")
    # DeBERTa keeps the mask itself, which is counted with wider numbers, or narrower ones.
    assert saved_bytes(empty, 3, 17) == pytest.approx(kept_bytes(model, 3, 17), rel=0.03)
    chains = sum(p.numel() for layer in chain_layers(empty).values() for p in (layer.A, layer.links, layer.B))
    _, trained = memory._parameters(empty)
    assert (
        sum(p.numel() for p in trained) - chains
        == sum(empty.get_parameter(n).numel() for n in head_names(empty))
        > 0
    )


def test_parts_of_the_memory(forecast_of, tiny_llama_dir):
    found = forecast_of(tiny_llama_dir).memory
    model = load_model(tiny_llama_dir, dtype="float32", device=CPU)
    assert found.base == 4 * sum(p.numel() for p in model.parameters())
    layers = inject(model, CHAINS)
    trained = sum(p.numel() for layer in layers.values() for p in (layer.A, layer.links, layer.B))
    assert found.optimizer == 8 * trained
    assert found.adapters == 8 * (trained + sum(layer.A.numel() for layer in layers.values()))
    assert found.process > 50e6  # Python, numpy and torch are here
    assert found.total == sum(asdict(found).values())


def test_tied_embeddings_count_once(forecast_of, tiny_tied_dir, tiny_llama_dir):
    tied, untied = forecast_of(tiny_tied_dir), forecast_of(tiny_llama_dir)
    head = load_model(tiny_llama_dir, dtype="float32", device=CPU).lm_head.weight
    assert untied.memory.base - tied.memory.base == 4 * head.numel()


def test_rounded_bases_are_smaller(make_recipe, tiny_llama_dir):
    sizes = {}
    for quantization in ("none", "int8", "nf4"):
        recipe = make_recipe(tiny_llama_dir, {"quantization": quantization})
        sizes[quantization] = memory.base_bytes(recipe, forecast_model(recipe, CHAINS, tiny_llama_dir, CPU))
    model = load_model(tiny_llama_dir, dtype="float32", device=CPU)
    linear = (
        sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        - model.lm_head.weight.numel()
    )
    assert sizes["none"] - sizes["int8"] == 3 * linear
    assert sizes["none"] - sizes["nf4"] == pytest.approx(3.484 * linear, rel=1e-3)


def test_a_spread_base_is_a_share_and_two_blocks(make_recipe, tiny_llama_dir):
    def size(processes: int = 4, **training) -> int:
        recipe = make_recipe(tiny_llama_dir, **training)
        return memory.base_bytes(recipe, forecast_model(recipe, CHAINS, tiny_llama_dir, CPU), processes)

    model = load_model(tiny_llama_dir, dtype="float32", device=CPU)
    block = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    whole, rest = size(), size() - 2 * block
    assert rest == 4 * (2 * model.lm_head.weight.numel() + model.model.norm.weight.numel())
    assert size(parallel="shard") == size(parallel="hybrid") == rest + 2 * block / 4 + 2 * block
    assert size(parallel="shard", offload_base=True) == rest + 2 * block
    assert size(1, parallel="shard") == whole


def test_recomputing_and_fused_attention_keep_less(make_recipe, tiny_llama_dir):
    def activations(attention: str, **training) -> int:
        recipe = make_recipe(tiny_llama_dir, {"attention": attention}, **training)
        return memory._activations(recipe, forecast_model(recipe, CHAINS, tiny_llama_dir, CPU), 2, 100, CPU)

    eager, fused = activations("eager"), activations("sdpa")
    # Layers, batch, heads, length², bytes: one copy of the attention weights.
    weights = 2 * 2 * 4 * 100 * 100 * 4
    assert eager - fused >= weights
    recomputed = activations("sdpa", gradient_checkpointing=True)
    assert recomputed < fused
    # Offloading is for GPUs: a CPU's memory is main memory.
    offloaded = {"gradient_checkpointing": True, "offload_activations": True}
    assert activations("sdpa", **offloaded) == recomputed


def test_time_is_of_the_whole_run(forecast_of, tiny_llama_dir):
    found = forecast_of(tiny_llama_dir)
    assert found.total_steps == 2 * math.ceil(50 / 8)
    assert found.time.train_seconds > 0 and found.time.validation_seconds > 0
    assert found.notes == ()


def test_time_grows_with_steps(forecast_of, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(time, "_seconds", lambda run, device: (run(), 1.0)[1])
    few, many = (
        forecast_of(tiny_llama_dir, epochs=None, max_steps=5),
        forecast_of(tiny_llama_dir, epochs=None, max_steps=50),
    )
    assert many.time.train_seconds == pytest.approx(10 * few.time.train_seconds, rel=1e-3)
    again = forecast_of(tiny_llama_dir, epochs=None, max_steps=5, gradient_checkpointing=True)
    assert again.time.train_seconds > few.time.train_seconds


def test_time_is_of_the_threads_that_training_would_take(forecast_of, tiny_llama_dir, monkeypatch):
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(SharedCpus, "look", lambda self: 1)
    used = []
    monkeypatch.setattr(time, "_seconds", lambda run, device: used.append(counts[-1]) or 1.0)
    assert forecast_of(tiny_llama_dir).time is not None
    assert set(used) == {1} and counts[-1] == 2


def test_what_cannot_be_timed_is_said(forecast_of, tiny_llama_dir, monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(time, "position_seconds", fails)
    found = forecast_of(tiny_llama_dir)
    assert found.time is None and "RuntimeError" in found.notes[0]
    monkeypatch.setattr(memory, "saved_bytes", fails)
    found = forecast_of(tiny_llama_dir)
    assert found.memory.activations is None and len(found.notes) == 2
    assert found.memory.total > found.memory.base


def test_auto_takes_the_whole_batch_at_most(make_recipe, tiny_llama_dir):
    class Rows:
        lengths = np.full(40, 10, np.int32)
        starts = None
        supervised_counts = np.full(40, 3, np.int32)

    recipe = make_recipe(tiny_llama_dir, micro_batch_size="auto")
    assert recipe_epoch(recipe, Rows(), CPU).longest_micro_batch == 80


def test_the_model_has_the_recipe_s_chains(make_recipe, tiny_llama_dir):
    model = forecast_model(make_recipe(tiny_llama_dir), CHAINS, tiny_llama_dir, CPU)
    assert len(chain_layers(model)) == 4
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_forecasting_leaves_the_random_state_alone(forecast_of, tiny_llama_dir):
    before = torch.get_rng_state()
    forecast_of(tiny_llama_dir)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_time_counts_common_beginnings_once(make_recipe, tmp_path):
    """Four rows of ten tokens, eight of them the same: 16 different ones, one step of counts."""

    class Encoded(list):
        lengths = np.full(4, 10, dtype=np.int32)
        starts = None

    rows = Encoded((np.array([*range(8), 20 + 2 * i, 21 + 2 * i]), np.ones(10, dtype=bool)) for i in range(4))
    one_by_one = make_recipe(tmp_path, global_batch_size=4, micro_batch_size=1)
    together = make_recipe(tmp_path, global_batch_size=4, micro_batch_size=4)
    assert computed_share(together, rows, CPU) == 16 / 40
    assert computed_share(one_by_one, rows, CPU) == 4 * 16 / 40, "each fills one step of counts"
