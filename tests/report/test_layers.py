"""Numbers of layers against the full matrices."""

from __future__ import annotations

import pytest
import torch

from linchain_cli.chain import ChainConfig, adapter_of, inject
from linchain_cli.model.loading import load_model
from linchain_cli.report.layers import base_norms, layer_numbers


@pytest.fixture(params=["tiny_llama_dir", "tiny_tied_dir", "tiny_gpt2_dir"])
def adapted(request):
    directory = request.getfixturevalue(request.param)
    model = load_model(directory, dtype="float32", device="cpu")
    layers = inject(model, ChainConfig(rank=4, depth=2, alpha=8.0, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_(generator=generator)
    return directory, model, layers


def test_numbers_are_those_of_the_matrices(adapted):
    directory, model, layers = adapted
    found = layer_numbers(adapter_of(model, ChainConfig(rank=4, depth=2, alpha=8.0)), directory)
    assert {one.path for one in found} == set(layers)
    for one in found:
        delta = layers[one.path].delta_weight(torch.float64)
        sigma = torch.linalg.svdvals(delta)[:4]
        assert one.singular_values == pytest.approx(sigma.tolist(), rel=1e-9)
        assert one.norm == pytest.approx(float(delta.norm()), rel=1e-9)
        base = layers[one.path].base.weight
        assert one.relative_norm == pytest.approx(float(delta.norm() / base.norm()), rel=1e-6)
        assert len(one.link_conditions) == 2


def test_without_the_base_there_is_no_relative_norm(adapted):
    _, model, _ = adapted
    assert all(
        one.relative_norm is None for one in layer_numbers(adapter_of(model, ChainConfig(rank=4, depth=2)))
    )


def test_modules_that_the_base_lacks_are_left_out(tiny_llama_dir):
    found = base_norms(
        tiny_llama_dir, ["model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj", "model.norm"]
    )
    assert list(found) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_each_expert_has_numbers_of_its_own(base_of, architecture):
    """Also ‖W0‖, whether the file holds the experts one by one or together."""
    directory = base_of(architecture)
    model = load_model(directory, dtype="float32", device="cpu")
    config = ChainConfig(rank=4, depth=2, alpha=8.0, target_modules=["q_proj", "experts"])
    layers = inject(model, config)
    for layer in layers.values():
        layer.B.data.normal_()
    found = layer_numbers(adapter_of(model, config), directory)
    assert len(found) == 2 * (1 + 2 * 4)
    for one in found:
        if one.expert is None:
            continue
        path = one.matrices.replace(".*.", ".")
        assert one.path == one.matrices.replace("*", str(one.expert)) and one.place[1] == one.matrices[15:]
        holder = model.get_submodule(path.rpartition(".")[0])
        weight = getattr(holder.base, path.rpartition(".")[2])[one.expert]
        delta = layers[path].delta_weight(torch.float64)[one.expert]
        assert one.singular_values == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-9)
        assert one.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)
