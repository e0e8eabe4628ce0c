"""A base that is spread over processes while it is loaded (gloo, on the CPU) against the whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, LlamaConfig

from linchain_cli.model.tokenizer import load_tokenizer

# Conv1D; experts and matrices that loading makes of several tensors; towers beside the decoder; a model whose
# forward without padding fails halfway; one that computes its initial weights from each other.
FAMILIES = (("llama", "none"), ("gpt2", "nf4"), ("mixtral", "none"), ("hrm_text", "nf4"), ("gemma3", "none"))
PECULIAR = ("mamba", "rwkv")


def loaded(ranks) -> None:
    assert [rank.wait(120) for rank in ranks] == [0] * len(ranks), "".join(rank.log for rank in ranks)


@pytest.mark.parametrize(("world", "per_machine"), [(2, False), (4, True)])
def test_a_spread_base_is_the_whole_one_bit_for_bit(
    starter, base_of, tiny_tied_dir, small_model, tmp_path, world, per_machine
):
    bases = [(str(tiny_tied_dir), "nf4")]
    if not per_machine:
        bases += [(str(base_of(name)), quantization) for name, quantization in FAMILIES]
        for name in PECULIAR if hasattr(FSDPModule, "reset_iter_state") else ():  # as torch has from 2.13 on
            small_model(name).save_pretrained(tmp_path / name)
            bases.append((str(tmp_path / name), "none"))
    values = {"bases": bases, "path": str(tmp_path / "found.json")}
    environment = {"LOCAL_WORLD_SIZE": str(world // 2)} if per_machine else {}
    loaded(
        starter.ranks(
            world, environment=environment, hook="compare_spread_bases", per_machine=per_machine, **values
        )
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(bases) and not any(found.values()), found


def test_no_process_holds_more_than_its_share_and_a_block(starter, tiny_llama_dir, tmp_path):
    config = LlamaConfig(
        vocab_size=600, hidden_size=1024, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=8
    )
    with torch.device("meta"):
        shapes = {
            key: each.shape for key, each in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    directory = tmp_path / "base"
    config.save_pretrained(directory)
    save_file(
        {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()},
        directory / "model.safetensors",
    )
    sizes = {key: 2 * shape.numel() for key, shape in shapes.items()}
    whole = sum(sizes.values())
    block = sum(size for key, size in sizes.items() if key.startswith("model.layers.0."))
    rest = whole - config.num_hidden_layers * block
    values = {"small": str(tiny_llama_dir), "directory": str(directory), "path": str(tmp_path / "grown")}
    loaded(starter.ranks(2, hook="measure_spread_base", **values))
    grown = [int((tmp_path / f"grown-{rank}").read_text()) for rank in range(2)]
    # The whole base would be 234 MB; 30 MB are for the processes' messages and what the allocator keeps.
    assert max(grown) < whole / 2 + 2 * block + rest + 30e6, [each / 1e6 for each in (whole, block, *grown)]
    assert min(grown) > 0.4 * whole


def test_what_one_process_cannot_read_ends_all(starter, recipe_file):
    changes = recipe_file({"training.parallel": "shard"})
    ranks = starter.ranks(2, "train", changes, hook="fail_on_rank", rank=1, where="read", kind="bug")
    assert [rank.wait(90) for rank in ranks] == [2, 2]
    assert (
        ranks[0].log == ""
        and ranks[1].log.startswith("error: ")
        and "cannot be loaded: a bug" in ranks[1].log
    )


def test_an_incomplete_or_unfit_checkpoint_is_told_once(starter, recipe_file, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    shape = tuple(weights[name].shape)
    for changed, message in [
        ({name: weights[name][1:].clone()}, f"'{name}' is {(shape[0] - 1, shape[1])} in the checkpoint and"),
        ({}, f"lacks 1 of the model's weights, first '{name}'"),
    ]:
        kept = {key: value for key, value in weights.items() if key != name}
        save_file(kept | changed, checkpoint / "model.safetensors", metadata={"format": "pt"})
        recipe = recipe_file({"training.parallel": "shard", "model.path": str(checkpoint)})
        ranks = starter.ranks(2, "train", recipe)
        assert [rank.wait(90) for rank in ranks] == [2, 2]
        said = "".join(rank.log for rank in ranks)
        assert said.startswith("error: ") and said.count("error: ") == 1 and message in " ".join(said.split())


def test_an_end_that_a_spread_base_never_learned_to_write_is_told_once(starter, recipe_file, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    tokenizer = load_tokenizer(checkpoint)
    weights["lm_head.weight"][tokenizer.eos_token_id] = 0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    changes = {"training.parallel": "shard", "training.max_steps": 1, "model.path": str(checkpoint)}
    ranks = starter.ranks(2, "train", recipe_file(changes))
    assert [rank.wait(90) for rank in ranks] == [0, 0], ranks[0].log
    said = " ".join("".join(rank.log for rank in ranks).split())
    assert said.count(f"never taught to write {tokenizer.eos_token}: ") == 1


def test_blocks_that_share_weights_are_not_spread(
    starter, recipe_file, small_model, tiny_tokenizer_dir, tmp_path
):
    directory = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "zamba"))
    small_model("zamba").save_pretrained(directory)
    recipe = recipe_file({"training.parallel": "shard", "model.path": str(directory)})
    ranks = starter.ranks(2, "train", recipe)
    assert [rank.wait(90) for rank in ranks] == [2, 2]
    assert "shares weights between its blocks" in ranks[0].log and ranks[1].log == ""


def test_machines_have_to_run_as_many_processes(starter, recipe_file):
    recipe = recipe_file({"training.parallel": "hybrid"})
    ranks = starter.ranks(3, "train", recipe, environment={"LOCAL_WORLD_SIZE": "2"})
    assert [rank.wait(90) for rank in ranks] == [2] * 3
    assert "hybrid needs as many processes on every machine" in ranks[0].log
