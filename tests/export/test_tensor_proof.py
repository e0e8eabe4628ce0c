"""The proof of a merge: it passes what was written and catches whatever is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linchain_cli.chain import delta_weight
from linchain_cli.errors import LinchainError
from linchain_cli.export.logits import compare_logits
from linchain_cli.export.shards import write_checkpoint
from linchain_cli.export.sums import new_tensors, plan_merge
from linchain_cli.export.tensor_proof import prove_tensors
from linchain_cli.model.checkpoint import open_checkpoint
from linchain_cli.model.config import empty_model

KEY = "model.layers.0.self_attn.q_proj.weight"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture
def written(tmp_path, base_of, adapter_of_base):
    """A merged checkpoint of the tiny Llama in bfloat16, the plan it came from, and a function that damages
    it."""
    base = base_of("llama", torch.bfloat16)
    adapter = adapter_of_base(base, targets=["q_proj"])
    plan = plan_merge(open_checkpoint(base), adapter, empty_model(base))
    out = tmp_path / "written"
    out.mkdir()
    write_checkpoint(out, new_tensors(plan), 10**9)

    def damage(change):
        tensors = tensors_of(out)
        change(tensors)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    return plan, out, damage


def move(tensor: torch.Tensor, units: int) -> None:
    """Moves one element by so many units in the last place."""
    flat = tensor.view(torch.int16).view(-1)
    flat[7] += units


def test_the_proof_passes_what_was_written(written):
    plan, out, _ = written
    proof = prove_tensors(plan, out, None)
    assert proof.changed.keys() == plan.plain.keys() and 0 < proof.largest_ulp <= 0.5
    assert proof.hashes.keys() == {"model.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: move(tensors[KEY], 2), f"{KEY} is off"),
        (lambda tensors: tensors[KEY].view(-1).__setitem__(3, torch.nan), f"{KEY} is off"),
        (
            lambda tensors: move(tensors["model.norm.weight"], 1),
            "model.norm.weight, which no adapter touches",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "does not hold the base's tensors"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "does not hold the base's tensors"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].float()}), "is F32"),
        (lambda tensors: tensors.update({KEY: tensors[KEY][:8].clone()}), r"is BF16 \(8, 64\)"),
    ],
)
def test_the_proof_catches_a_wrong_tensor(written, change, message):
    plan, out, damage = written
    damage(change)
    with pytest.raises(LinchainError, match=message):
        prove_tensors(plan, out, None)


def test_the_proof_allows_one_unit_and_says_so(written):
    plan, out, damage = written
    before = prove_tensors(plan, out, None).changed[KEY]
    chain = plan.plain[KEY].chain
    exact = plan.base.tensors[KEY].tensor().double() + delta_weight(*chain, plan.scaling, torch.float64)

    def to_the_neighbour_beyond_the_sum(tensors):
        stored = tensors[KEY]
        above = (exact > stored.double()) & (stored > 0.01)
        place = above.reshape(-1).nonzero()[0]
        stored.view(torch.int16).view(-1)[place] += 1

    damage(to_the_neighbour_beyond_the_sum)
    assert before <= 0.5 < prove_tensors(plan, out, None).changed[KEY] <= 1


def test_the_proof_catches_a_converted_tensor(tmp_path, base_of, adapter_of_base):
    base = base_of("hrm_text", torch.bfloat16)
    adapter = adapter_of_base(base, targets=["q_proj"])
    plan = plan_merge(open_checkpoint(base), adapter, empty_model(base))
    write_checkpoint(tmp_path, new_tensors(plan), 10**9)
    assert prove_tensors(plan, tmp_path, None).largest_ulp <= 0.5
    key = plan.converted[0].conversion.keys[0]
    tensors = tensors_of(tmp_path)
    move(tensors[key], 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LinchainError, match="is off"):
        prove_tensors(plan, tmp_path, None)


def test_recast_tensors_are_compared_with_the_recast_base(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])
    save_file(tensors_of(base) | {"scalar": torch.tensor(2.5)}, base / "model.safetensors", {"format": "pt"})
    plan = plan_merge(open_checkpoint(base), adapter, empty_model(base))
    write_checkpoint(tmp_path, new_tensors(plan, torch.bfloat16), 10**9)
    prove_tensors(plan, tmp_path, torch.bfloat16)
    written = tensors_of(tmp_path)
    damaged = written["lm_head.weight"].clone()
    move(damaged, 1)
    for key, value in {"lm_head.weight": damaged, "scalar": torch.tensor(2.0, dtype=torch.bfloat16)}.items():
        save_file(written | {key: value}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(LinchainError, match=f"{key}, which no adapter touches"):
            prove_tensors(plan, tmp_path, torch.bfloat16)


def test_logits_are_compared_over_all_prompts():
    adapted = [torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 3.0]])]
    merged = [torch.tensor([[0.5, 1.0], [2.0, 0.0]]), torch.tensor([[4.0, 3.0]])]
    base = [torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    proof = compare_logits(adapted, merged, base, "float32")
    assert (proof.prompts, proof.positions) == (2, 3)
    assert (proof.largest_difference, proof.adapter_effect) == (3.0, 3.0)
    assert proof.mean_difference == pytest.approx(3.5 / 6) and proof.adapter_effect_mean == pytest.approx(
        7 / 6
    )
    assert proof.top1_agreement == pytest.approx(2 / 3)
    assert not proof.adapter_lost
    assert str(proof) == "largest difference 3, top-1 agreement 66.7 % over 3 positions"
    assert compare_logits(adapted, base, base, "float32").adapter_lost
    numbers = [[tensor[:, :1] for tensor in model] for model in (adapted, merged, base)]
    of_one_number = compare_logits(*numbers, "float32")
    assert of_one_number.top1_agreement is None
    assert str(of_one_number) == "largest difference 3 over 3 positions"


def test_logits_that_are_not_finite_fail():
    one, bad = [torch.zeros(1, 2)], [torch.tensor([[torch.nan, 0.0]])]
    with pytest.raises(LinchainError, match="not finite"):
        compare_logits(one, bad, one, "float32")
