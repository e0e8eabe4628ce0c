"""Chains in PEFT's format: loaded by PEFT, by the rules of vLLM's loader, and imported again."""

from __future__ import annotations

import json
import re
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linchain_cli.chain import attach, detach
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export.gguf_lora import write_gguf
from linchain_cli.export.peft import prove_peft, relative_error, write_peft
from linchain_cli.importing.convert import import_adapter
from linchain_cli.importing.foreign import read_foreign
from linchain_cli.model.config import empty_model
from linchain_cli.model.loading import load_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30]])


def export(base: Path, adapter, out: Path):
    return write_peft(adapter, empty_model(base), out)


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "mistral",
        "mixtral",
        "gpt2",
        "gpt_neox",
        "phi",
        "phi3",
        "olmo2",
    ],
)
def test_peft_loads_it_without_a_warning_and_gives_the_same_logits(
    tmp_path, base_of, adapter_of_base, architecture
):
    from peft import PeftModel

    base = base_of(architecture)
    adapter = adapter_of_base(base)
    export(base, adapter, tmp_path)
    model = load_model(base, dtype="float32", device="cpu")
    bare = logits_of(model)
    attach(model, adapter)
    adapted = logits_of(model)
    detach(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(model, tmp_path)
    # PEFT asks transformers a question that transformers has renamed; it does so for every adapter.
    told = [str(one.message) for one in said if "is_gradient_checkpointing" not in str(one.message)]
    assert not told
    torch.testing.assert_close(logits_of(peft), adapted, rtol=0, atol=1e-5)
    assert float((adapted - bare).abs().max()) > 1e-2


def test_gpt2_says_that_its_weights_are_transposed(tmp_path, base_of, adapter_of_base):
    for architecture, transposed in (("gpt2", True), ("llama", False)):
        base = base_of(architecture)
        export(base, adapter_of_base(base), tmp_path / architecture)
        config = json.loads((tmp_path / architecture / "adapter_config.json").read_bytes())
        assert config["fan_in_fan_out"] is transposed


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_peft_and_back(tmp_path, base_of, adapter_of_base, depth):
    base = base_of("llama")
    adapter = adapter_of_base(base, depth=depth)
    proof = export(base, adapter, tmp_path)
    back = import_adapter(read_foreign(tmp_path), drop_bias=False, base=adapter.base, names={}).adapter
    assert back.config.depth == 0 and back.config.alpha == adapter.config.alpha
    assert back.tensors.keys() == adapter.tensors.keys()
    scaling = adapter.config.alpha / adapter.config.rank
    for path, chain in adapter.tensors.items():
        if depth == 0:
            assert torch.equal(back.tensors[path].A, chain.A) and torch.equal(back.tensors[path].B, chain.B)
        assert relative_error(chain, back.tensors[path], scaling) < 1e-6
    assert proof.largest_error == 0 if depth == 0 else 0 < proof.largest_error < 1e-7


def test_the_same_adapter_gives_the_same_bytes(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    for name in ("one", "two"):
        export(base, adapter_of_base(base), tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_alpha_that_is_not_whole_stays_what_it_is(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    for alpha, written in ((8.0, 8), (2.5, 2.5)):
        export(base, adapter_of_base(base, alpha=alpha), tmp_path / str(alpha))
        config = json.loads((tmp_path / str(alpha) / "adapter_config.json").read_bytes())
        assert config["lora_alpha"] == written and type(config["lora_alpha"]) is type(written)


# What vLLM's loader accepts (vllm/lora/peft_helper.py and lora_model.py): it parses every tensor's name,
# wants the last part of each module's name among the model's linear layers, and reads these fields of the
# configuration.
VLLM_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}


def vllm_module(name: str) -> tuple[str, str]:
    """(module, "A" or "B") of a tensor's name, as vLLM takes it apart."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
    assert match, f"vLLM calls {name} an unsupported LoRA weight"
    return match[1], match[2]


def test_vllm_accepts_keys_types_and_configuration(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, rank=8)
    export(base, adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    assert config["peft_type"] == "LORA"
    assert type(config["r"]) is int and config["r"] in VLLM_RANKS
    assert type(config["lora_alpha"]) is int
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert config["use_rslora"] is False and config["use_dora"] is False
    assert isinstance(config["target_modules"], list)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    found: dict[str, dict[str, tuple]] = {}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            module, part = vllm_module(name)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float32 and tensor.is_contiguous()
            assert module.rpartition(".")[2] in linear
            found.setdefault(module, {})[part] = tuple(tensor.shape)
    modules = dict(empty_model(base).named_modules())
    assert set(found) == set(config["target_modules"]) == set(adapter.tensors)
    for path, shapes in found.items():
        assert shapes == {"A": (8, modules[path].in_features), "B": (modules[path].out_features, 8)}


def test_an_adapter_of_another_model_is_refused(tmp_path, base_of, adapter_of_base):
    adapter = adapter_of_base(base_of("llama"))
    with pytest.raises(InputError, match=r"it adapts 'model\.layers\.0.* and GPT2\w* has no such module"):
        export(base_of("gpt2"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, key: tensors[key].mul_(1.001),
        lambda tensors, key: tensors[key].view(-1).__setitem__(0, torch.nan),
        lambda tensors, key: tensors.pop(key),
    ],
)
def test_the_proof_catches_a_wrong_file(tmp_path, base_of, adapter_of_base, damage):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])
    export(base, adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tensors, "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LinchainError, match="is off by|holds 3 tensors where 4 were written"):
        prove_peft(adapter, tmp_path)


MOE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "glm4_moe": {**DEEPSEEK, "head_dim": 8},
    "qwen3_next": {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8},
}


def chains_on(kind: str, targets):
    """A model of that type on the meta device, and a random LoRA on those of its modules."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from linchain_cli.chain import ChainConfig, adapter_of, chain_layers, inject

    config = AutoConfig.for_model(kind, **{**MOE, **FAMILIES[kind]})
    model = AutoModelForCausalLM.from_config(config)
    settings = ChainConfig(rank=4, depth=0, alpha=8.0, target_modules=targets)
    inject(model, settings, 1)
    for layer in chain_layers(model).values():
        torch.nn.init.normal_(layer.B.data)
    adapter = adapter_of(model, settings, {"path": "base"})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), adapter


@pytest.mark.parametrize(
    ("kind", "targets", "lost"),
    [
        ("deepseek_v3", "all-linear", "model.layers.0.mlp.gate_proj"),
        ("glm4_moe", "all-linear", "model.layers.0.mlp.gate_proj"),
        ("qwen3_next", "all-linear", "model.layers.0.mlp.shared_expert.gate_proj"),
        ("deepseek_v3", ["o_proj"], None),
        ("glm4_moe", ["q_proj", "v_proj"], None),
        ("qwen3_next", ["out_proj"], None),
        ("qwen2_moe", "all-linear", None),
        ("qwen3_moe", "all-linear", None),
    ],
)
def test_what_peft_would_lose_is_refused_by_name(tmp_path, kind, targets, lost):
    from peft import PeftModel

    model, adapter = chains_on(kind, targets)
    if lost and version("peft") >= "0.19":  # earlier ones lose nothing
        with pytest.raises(InputError, match=f"would lose 6 of .* first '{lost}'.*Merge instead"):
            write_peft(adapter, model, tmp_path)
        return
    assert not write_peft(adapter, model, tmp_path).not_proven
    fresh, _ = chains_on(kind, targets)
    peft = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True, torch_device="cpu")
    found = {name for name, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert found == set(adapter.tensors)


def test_without_peft_the_export_says_what_it_did_not_show(tmp_path, base_of, adapter_of_base, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    base = base_of("llama")
    proof = export(base, adapter_of_base(base, targets=["q_proj"]), tmp_path)
    assert proof.not_proven == ("loading it with PEFT: it is not installed here",)


def test_an_adapter_that_peft_refuses_is_refused(tmp_path, base_of, adapter_of_base, monkeypatch):
    import peft

    def fail(*_, **__):
        raise RuntimeError("sizes differ\nand more")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    base = base_of("llama")
    with pytest.raises(InputError, match=r"cannot load this adapter \(sizes differ\).*Merge instead"):
        export(base, adapter_of_base(base, targets=["q_proj"]), tmp_path)


@pytest.mark.parametrize("write", [write_peft, write_gguf])
def test_chains_on_experts_are_refused_before_anything_is_written(tmp_path, base_of, adapter_of_base, write):
    base = base_of("mixtral")
    with pytest.raises(InputError) as error:
        write(adapter_of_base(base, ["q_proj", "experts"]), empty_model(base), tmp_path / "out")
    assert "4 of the adapter's 6 modules are routed experts" in str(error.value)
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in str(error.value)
    assert "Merge instead: linchain merge" in str(error.value) and not (tmp_path / "out").exists()
