"""Frequencies that follow the longest row: rows are read as if they were alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linchain_cli.chain import ChainConfig, chain_layers, folded, inject
from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.errors import InputError
from linchain_cli.model.attention import GROUPED, use_attention
from linchain_cli.model.flat_rows import allow_flat_rows
from linchain_cli.model.rope import length_classes
from linchain_cli.training import loss
from linchain_cli.training.job import _refuse_classes

LENGTHS = [40, 33, 17, 16, 9, 40]
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


@pytest.fixture(params=ROPES)
def model(request, small_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = small_model("llama").config.to_dict()
    config |= {"rope_parameters": ROPES[request.param], "initializer_range": 0.5}
    config["max_position_embeddings"] = 64 if request.param == "longrope" else 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    inject(model.eval(), ChainConfig(rank=4, depth=2, target_modules=["q_proj", "v_proj"]))
    for layer in chain_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    return model


def batch_of(lengths: list[int]) -> Batch:
    ids = torch.arange(len(LENGTHS) * 40).view(-1, 40) % 117 + 3
    ids = ids[[LENGTHS.index(length) for length in lengths], : max(lengths)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids, mask, torch.where(mask.bool(), ids, IGNORED))


def test_classes(model, small_model, request):
    kind = request.node.callspec.params["model"]
    expected = [1, 1, 1, 0, 0, 1] if kind == "longrope" else [40, 33, 17, 0, 0, 40]
    assert length_classes(model, torch.tensor(LENGTHS)).tolist() == expected
    assert not length_classes(small_model("llama"), torch.tensor(LENGTHS)).any()


@pytest.mark.parametrize("flat", [False, True])
def test_the_gradient_does_not_depend_on_the_micro_batch(model, flat):
    assert not flat or (use_attention(model, GROUPED) and allow_flat_rows(model))
    results = []
    for parts in ([[length] for length in LENGTHS], [LENGTHS], [LENGTHS[:2], LENGTHS[2:]]):
        with folded(model):
            value = sum(
                loss.add_gradients(model, batch_of(part), 1e-3, torch.device("cpu")) for part in parts
            )
        results.append([value, *(layer.B.grad for layer in chain_layers(model).values())])
        for layer in chain_layers(model).values():
            layer.A.grad = layer.links.grad = layer.B.grad = None
        assert loss.summed_loss(model, batch_of(LENGTHS), torch.device("cpu")).item() == pytest.approx(
            1e3 * value.item(), rel=1e-5
        )
    for other in results[1:]:
        for ours, alone in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5 * alone.abs().max())


def test_a_sharded_base_cannot_read_rows_apart(model):
    rows = [SimpleNamespace(lengths=np.array(lengths, np.int32)) for lengths in ([9, 40], [9, 16])]
    with pytest.raises(InputError, match="training.parallel.*data.max_length"):
        _refuse_classes(model, SimpleNamespace(train=rows[1], validation=rows[0]))
    _refuse_classes(model, SimpleNamespace(train=rows[1], validation=None))


def test_a_row_has_the_loss_of_the_row_alone_in_transformers(model):
    """Also behind a longer row, whose frequencies dynamic scaling would keep."""
    loss.summed_loss(model, batch_of([40]), torch.device("cpu"))
    batch = batch_of([33])
    ours = loss.summed_loss(model, batch, torch.device("cpu")).item() / 32
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = 16
    theirs = model(batch.input_ids, labels=batch.input_ids).loss.item()
    assert ours == pytest.approx(theirs, rel=1e-5)
