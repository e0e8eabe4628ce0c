"""Foreign adapters in their base: found under its names, or refused with what does not fit."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from linchain_cli.chain import attach, load_adapter
from linchain_cli.errors import InputError
from linchain_cli.importing.convert import import_adapter
from linchain_cli.importing.fit import fit_to_model, short_targets
from linchain_cli.importing.foreign import read_foreign
from linchain_cli.model.config import empty_model
from linchain_cli.model.loading import load_model

from ..command_line import linchain

IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30]])
PATH = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{PATH}"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(prefix: str = PREFIX, d_in: int = 64, d_out: int = 64) -> dict[str, torch.Tensor]:
    return {f"{prefix}.lora_A.weight": draw(4, d_in), f"{prefix}.lora_B.weight": draw(d_out, 4)}


def write(directory: Path, tensors: dict, base: Path | None = None) -> Path:
    """A checkpoint directory of rank 4 and alpha 8."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base and str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def imported(directory: Path):
    base = {"path": "base", "hash": None}
    return import_adapter(read_foreign(directory), drop_bias=False, base=base, names={})


def test_modules_are_found_in_the_base(tmp_path, base_of):
    foreign = read_foreign(write(tmp_path / "a", lora()))
    model = empty_model(base_of("llama"))
    assert fit_to_model(foreign, model) == {PATH: PATH}
    with pytest.raises(
        InputError, match=r"does not fit the base: it adapts 'model\.layers\.0.*GPT2LMHeadModel has no"
    ):
        fit_to_model(foreign, empty_model(base_of("gpt2")))
    wide = {f"{PREFIX}.lora_A.weight": draw(4, 65), f"{PREFIX}.lora_B.weight": draw(64, 4)}
    with pytest.raises(InputError, match=r"\(65 → 64\), and LlamaForCausalLM has 64 → 64"):
        fit_to_model(read_foreign(write(tmp_path / "b", wide)), model)


def test_module_paths_of_older_layouts_are_translated(tmp_path, base_of):
    old = "language_model.model.layers.0.self_attn.q_proj"
    foreign = read_foreign(write(tmp_path, lora(f"base_model.model.{old}")))
    names = fit_to_model(foreign, empty_model(base_of("gemma3")))
    assert names == {old: "model.language_model.layers.0.self_attn.q_proj"}


def test_targets_are_written_short_where_that_says_the_same(tmp_path, base_of):
    model = empty_model(base_of("llama"))
    one = imported(write(tmp_path / "one", lora())).adapter
    assert short_targets(one, model, "").config.target_modules == [PATH]
    second = PREFIX.replace("layers.0", "layers.1")
    both = imported(write(tmp_path / "both", lora() | lora(second))).adapter
    assert short_targets(both, model, "").config.target_modules == ["q_proj"]


@pytest.fixture(scope="module")
def vision_base(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A random Qwen2-VL, whose vision blocks have names that its text decoder has not (`qkv`)."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLConfig

    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    text = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    directory = tmp_path_factory.mktemp("qwen2-vl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2VLConfig(text_config=text, vision_config=vision)
        AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_tokenizer_dir).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("old", [True, False])
def test_modules_outside_the_text_decoder_keep_their_whole_paths(tmp_path, vision_base, capsys, old):
    path = "model.visual.blocks.0.attn.qkv"
    written = path.removeprefix("model.") if old else path
    tensors = lora(f"base_model.model.{written}", 32, 96)
    assert linchain("import", write(tmp_path / "peft", tensors, vision_base), "--out", tmp_path / "run") == 0
    adapter = load_adapter(tmp_path / "run" / "adapter")
    assert adapter.config.target_modules == [path] and list(adapter.tensors) == [path]
    attach(load_model(vision_base, dtype="float32", device="cpu"), adapter)
    assert linchain("merge", tmp_path / "run") == 0
    assert "1 of " in capsys.readouterr().out


def test_an_adapter_of_single_experts_is_told_so(tmp_path, base_of):
    path = "model.layers.0.block_sparse_moe.experts.1.w1"
    for name in (path, path.replace("block_sparse_moe", "mlp")):
        foreign = read_foreign(write(tmp_path / name, lora(f"base_model.model.{name}", 64, 128)))
        with pytest.raises(InputError) as error:
            fit_to_model(foreign, empty_model(base_of("mixtral")))
        assert f"adapts single experts ('{name}')" in str(error.value)
        assert "'model.layers.0.mlp.experts'" in str(error.value) and "--base" not in str(error.value)


def with_peft(base: Path, directory: Path, **options) -> torch.Tensor:
    """Makes PEFT write an adapter with random B; returns the logits it gives."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, **options)
        model = get_peft_model(load_model(base, dtype="float32", device="cpu"), config)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.data.copy_(0.2 * draw(*parameter.shape, seed=index))
        model.save_pretrained(directory, save_embedding_layers=True)
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["q_proj"]])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bases_own_weights_beside_an_adapter_are_compared_and_left(
    tmp_path, tiny_llama_dir, tiny_tied_dir, capsys, tied, targets
):
    base = tmp_path / "base"
    shutil.copytree(tiny_tied_dir if tied else tiny_llama_dir, base)
    wanted = with_peft(base, tmp_path / "peft", target_modules=targets)
    assert read_foreign(tmp_path / "peft").base_weights
    assert linchain("import", tmp_path / "peft", "--out", tmp_path / "run", "--base", base) == 0
    model = load_model(base, dtype="float32", device="cpu")
    attach(model, load_adapter(tmp_path / "run" / "adapter"))
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda own: own + 1e-3, "has other values than the base's: it was trained"),
        (lambda own: torch.cat([own, own[:8]]), r"is \(\d+, 64\) where the base has \(\d+, 64\): it was"),
    ],
)
def test_other_weights_beside_an_adapter_are_refused_by_name(
    tmp_path, tiny_llama_dir, capsys, weight, message
):
    from safetensors.torch import load_file

    own = load_file(tiny_llama_dir / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    peft = write(tmp_path / "peft", lora() | {key: weight(own).contiguous()}, tiny_llama_dir)
    assert linchain("import", peft, "--out", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "'model.embed_tokens'" in told and re.search(message, told)
    assert not (tmp_path / "run").exists()


def test_without_the_base_nobody_can_tell_whose_weights_they_are(tmp_path, capsys):
    key = "base_model.model.lm_head.weight"
    peft = write(tmp_path / "peft", lora() | {key: draw(8, 64)}, Path("/no/where"))
    assert linchain("import", peft, "--out", tmp_path / "run") == 2
    assert "cannot be told without the base" in capsys.readouterr().err
