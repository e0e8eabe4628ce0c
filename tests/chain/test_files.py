"""The adapter's files: bytes that depend on values alone, damage told by name, other depths of the same
function."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from linchain_cli.chain import (
    ChainConfig,
    adapter_files,
    adapter_of,
    attach,
    chain_layers,
    delta_weight,
    detach,
    inject,
    load_adapter,
    save_adapter,
    with_depth,
)
from linchain_cli.errors import InputError

IDS = torch.tensor([[3, 14, 15, 92, 65]])
CONFIG = ChainConfig(rank=4, depth=3, alpha=8, target_modules=["q_proj", "down_proj"])
BASE = {"path": "somewhere", "hash": "0" * 64}


@pytest.fixture
def model(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    inject(model, CONFIG, seed=3)
    torch.manual_seed(2)
    for layer in chain_layers(model).values():
        nn.init.normal_(layer.B, std=0.05)
    return model


@pytest.fixture
def saved(model, tmp_path):
    save_adapter(adapter_of(model, CONFIG, BASE), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_round_trip_is_bitwise(model, saved):
    adapter = load_adapter(saved)
    assert adapter.base == BASE
    assert (adapter.config.rank, adapter.config.depth, adapter.config.alpha) == (4, 3, 8)
    before = model(IDS).logits
    detach(model)
    attach(model, adapter)
    assert torch.equal(model(IDS).logits, before)
    assert adapter_files(adapter_of(model, CONFIG, BASE)) == {
        path.name: path.read_bytes() for path in saved.iterdir()
    }


def test_tensor_names_are_module_paths(saved):
    from safetensors.torch import load_file

    tensors = load_file(saved / "chain.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.links"].shape == (3, 4, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 4 * 3


def test_adapters_are_switched_without_reloading(model, saved):
    first = model(IDS).logits
    detach(model)
    base = model(IDS).logits
    inject(model, CONFIG, seed=9)
    detach(model)
    attach(model, load_adapter(saved))
    assert torch.equal(model(IDS).logits, first)
    detach(model)
    assert torch.equal(model(IDS).logits, base)


def test_an_adapter_of_another_model_is_refused(saved, tiny_gpt2_dir):
    other = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir)
    with pytest.raises(InputError, match="does not fit this model: it adapts 'model.layers"):
        attach(other, load_adapter(saved))
    assert not chain_layers(other)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
def test_another_depth_is_the_same_function(saved, depth):
    adapter = load_adapter(saved)
    other = with_depth(adapter, depth)
    assert other.config.depth == depth
    for path, chain in other.tensors.items():
        assert chain.links.shape == (depth, 4, 4)
        before, after = (
            delta_weight(*values, 2.0, torch.float64) for values in (adapter.tensors[path], chain)
        )
        torch.testing.assert_close(after, before, rtol=0, atol=1e-7)
        if depth >= 3:
            assert torch.equal(after, before)


def damage_truncate(directory):
    path = directory / "chain.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config(directory):
    (directory / "chain.json").write_text("{")


def change(key, value):
    def damage(directory):
        path = directory / "chain.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


def damage_missing(directory):
    (directory / "chain.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "chain.safetensors is damaged"),
        (damage_config, "chain.json is damaged"),
        (damage_missing, "chain.json is missing"),
        (change("format_version", 99), "format version 99"),
        (change("rank", 8), "does not fit rank 8"),
        (change("rank", "4"), "'rank' is missing or of the wrong type"),
        (change("format", "other"), "does not describe a chain adapter"),
    ],
)
def test_damaged_files_are_refused_by_name(saved, damage, message):
    damage(saved)
    with pytest.raises(InputError, match=message):
        load_adapter(saved)
