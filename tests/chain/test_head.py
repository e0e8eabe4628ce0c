"""A classifier's head in the adapter's file: written, read, put into a model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, adapter_of, attach, inject, load_adapter, save_adapter, with_depth
from linchain_cli.chain.head import Head, head_of, initialise_head, make_trainable
from linchain_cli.errors import InputError

CONFIG = ChainConfig(rank=2, depth=1, alpha=4, target_modules=["first"])
NAMES = ["score.weight", "score.bias"]


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.norm, self.score = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.to(dtype)

    def forward(self, x):
        return self.score(self.first(x))


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    model = Model()
    inject(model, CONFIG, seed=1)
    return adapter_of(model, CONFIG, {"path": "base"}, head_of(model, NAMES, ("a", "b", "c")))


def test_a_head_comes_back_as_it_was_written(adapter, tmp_path):
    save_adapter(adapter, tmp_path)
    found = load_adapter(tmp_path)
    assert found.head.classes == ("a", "b", "c") and list(found.tensors) == ["first"]
    assert all(torch.equal(found.head.tensors[name], adapter.head.tensors[name]) for name in NAMES)
    assert json.loads((tmp_path / "chain.json").read_text())["format_version"] == 2
    assert with_depth(found, 0).head is found.head


def test_an_adapter_without_a_head_is_written_as_before(adapter, tmp_path):
    from dataclasses import replace

    save_adapter(replace(adapter, head=None), tmp_path)
    description = json.loads((tmp_path / "chain.json").read_text())
    assert description["format_version"] == 1 and "head" not in description
    assert load_adapter(tmp_path).head is None


def test_a_head_that_is_described_and_not_there_is_refused(adapter, tmp_path):
    save_adapter(adapter, tmp_path)
    path = tmp_path / "chain.json"
    path.write_text(path.read_text().replace("score.bias", "score.offset"))
    with pytest.raises(InputError, match="the head that chain.json describes is not there.*score.offset"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_an_adapter_puts_its_head_in(adapter, dtype):
    model = Model(dtype)
    attach(model, adapter)
    assert torch.equal(model.score.weight, adapter.head.tensors["score.weight"])
    assert model.score.weight.dtype == torch.float32 and not model.score.weight.requires_grad
    assert model(torch.randn(2, 6, dtype=dtype)).dtype == torch.float32


def test_a_head_that_does_not_fit_changes_nothing(adapter):
    from dataclasses import replace

    wrong = Head({**adapter.head.tensors, "score.weight": torch.zeros(4, 5)}, ("a", "b", "c", "d"))
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"head does not fit.*'score.weight' is \(4, 5\).*\(3, 5\)"):
        attach(model, replace(adapter, head=wrong))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_tensor_is_drawn_from_a_stream_of_its_own():
    drawn = []
    for names in (["score.weight", "score.bias", "norm.weight"], ["norm.weight", "score.weight"]):
        model = Model()
        initialise_head(model, names, seed=3, deviation=0.5)
        drawn.append(model.score.weight.detach().clone())
        assert model.norm.weight.eq(1).all()
    assert torch.equal(*drawn) and drawn[0].std().item() == pytest.approx(0.5, rel=0.4)


def test_making_a_head_trainable_twice_hooks_once():
    model = Model(torch.bfloat16)
    first = make_trainable(model, NAMES)
    assert make_trainable(model, NAMES) == first
    assert len(model.score._forward_pre_hooks) == 1 and model.first.weight.dtype == torch.bfloat16
