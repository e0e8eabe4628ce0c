"""Checkpoints in fewer bits: written here by their formats' formulas, read as the weights they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linchain_cli.chain import ChainConfig, adapter_of, delta_weight, inject
from linchain_cli.errors import InputError
from linchain_cli.export.card import Origin
from linchain_cli.export.merge import MergeOptions, merge_checkpoint
from linchain_cli.model.config import empty_model, load_config
from linchain_cli.model.hashing import base_hash
from linchain_cli.model.loading import load_model
from linchain_cli.model.packed import open_weights

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs lies where in an int32, from its low end on
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, 32 / bits) small numbers -> (n,) int32, the first at the low end."""
    shifts = torch.arange(0, 32, bits)
    return (values.long() << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def fp8(weight: torch.Tensor, block: int = 128) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    stored, exact = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = stored[part].float() * scales[i, j]
    return {"weight": stored, "weight_scale_inv": scales}, exact


def fp8_rows(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scales).to(torch.float8_e4m3fn)
    parts = {"weight": stored, "weight_scale": scales, "input_scale": torch.ones(1)}
    return parts, stored.float() * scales


def by_groups(weight: torch.Tensor, bits: int, of_input: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Whole numbers (out, in), scales (out, groups) in float16, zeros (out, groups), and the exact weight."""
    count = int(of_input.max()) + 1
    low, high = (
        torch.stack([getattr(weight[:, of_input == group], each)(1).values for group in range(count)], 1)
        for each in ("min", "max")
    )
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    numbers = (weight / scales[:, of_input] + zeros[:, of_input]).round().clamp(0, 2**bits - 1)
    exact = (numbers - zeros[:, of_input]) * scales[:, of_input].float()
    return numbers, scales, zeros, exact


def gptq(weight: torch.Tensor, bits: int, version: str, seed: int) -> tuple[dict, torch.Tensor]:
    inputs, per = weight.shape[1], 32 // bits
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))  # act-order
    of_input = torch.empty(inputs, dtype=torch.long)
    of_input[order] = torch.arange(inputs) // GROUP
    numbers, scales, zeros, exact = by_groups(weight, bits, of_input)
    stored_zeros = (zeros - int(version == "gptq")).T.reshape(len(zeros.T), -1, per)
    parts = {
        "qweight": packed_int32(numbers.T.reshape(-1, per, len(weight)).transpose(1, 2), bits),
        "qzeros": packed_int32(stored_zeros, bits),
        "scales": scales.T.contiguous(),
        "g_idx": of_input.int(),
    }
    return parts, exact


def awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    numbers, scales, zeros, exact = by_groups(weight, 4, torch.arange(weight.shape[1]) // GROUP)
    parts = {
        "qweight": packed_int32(numbers.T.reshape(weight.shape[1], -1, 8)[..., AWQ_ORDER], 4),
        "qzeros": packed_int32(zeros.T.reshape(zeros.shape[1], -1, 8)[..., AWQ_ORDER], 4),
        "scales": scales.T.contiguous(),
    }
    return parts, exact


def mxfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of experts (experts, in, out), whose stored form is transposed."""
    grouped = weight.transpose(1, 2).reshape(len(weight), weight.shape[2], -1, 32)
    exponents = (grouped.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    nearest = (grouped / exponents.exp2()[..., None])[..., None] - E2M1
    halves = nearest.abs().argmin(-1)
    exact = (E2M1[halves] * exponents.exp2()[..., None]).flatten(2).transpose(1, 2)
    blocks = (halves[..., 0::2] | halves[..., 1::2] << 4).to(torch.uint8)
    return {"blocks": blocks, "scales": (exponents + 127).to(torch.uint8)}, exact


FORMATS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8),
    "fp8 by row": ({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "gptq 4": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, lambda w: gptq(w, 4, "gptq", 1)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP}, lambda w: gptq(w, 8, "gptq", 2)),
    "gptq 2": (
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, 2, "gptq_v2", 3),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}


def write_config(directory: Path, quantization: dict | None, **fields) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(directory)
    for path in tiny_tokenizer_dir.iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def pair_of(llama, tmp_path_factory):
    """pair_of(name): a checkpoint in that form, and one of the bfloat16 weights that it stands for."""
    made = {}

    def build(name: str) -> tuple[Path, Path]:
        if name not in made:
            settings, pack = FORMATS[name]
            packed, plain = (
                Path(shutil.copytree(llama, tmp_path_factory.mktemp("pair") / kind))
                for kind in ("packed", "plain")
            )
            stored, exact = {}, {}
            for key, weight in load_file(llama / "model.safetensors").items():
                if weight.dim() < 2 or "layers" not in key:
                    stored[key] = exact[key] = weight
                    continue
                parts, value = pack(weight.float())
                stored |= {key.replace("weight", part): each.contiguous() for part, each in parts.items()}
                exact[key] = value.bfloat16().contiguous()
            save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
            save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
            write_config(packed, settings)
            made[name] = packed, plain
        return made[name]

    return build


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_restored_bit_for_bit(pair_of, name):
    packed, plain = pair_of(name)
    expected, found = load_file(plain / "model.safetensors"), open_weights(packed).tensors
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].type == "BF16" and torch.equal(found[key].tensor(), value), key
        if value.dim() > 1:
            assert torch.equal(found[key].rows(5, 40), value[5:45]) and torch.equal(
                found[key].part(9, 3), value[9:12]
            )
        whole = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert (
            found[key].read(7, 1001 if value.dim() > 1 else 9) == whole[7 : 1008 if value.dim() > 1 else 16]
        )


@pytest.mark.parametrize(("name", "quantization"), [("fp8", "none"), ("gptq 4", "nf4"), ("awq", "none")])
def test_a_model_of_restored_weights_is_that_of_full_ones(pair_of, name, quantization):
    packed, plain = (
        load_model(directory, dtype="bfloat16", device="cpu", quantization=quantization)
        for directory in pair_of(name)
    )
    assert getattr(packed.config, "quantization_config", None) is None or quantization == "nf4"
    ids = torch.arange(1, 20)[None]
    assert torch.equal(packed(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_large_weights_are_restored_in_pieces(pair_of, monkeypatch):
    packed, plain = pair_of("gptq 4")
    monkeypatch.setattr("linchain_cli.model.packed._AT_ONCE", 1000)
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(
        open_weights(packed).tensors[key].tensor(), load_file(plain / "model.safetensors")[key]
    )


def test_fp8_is_what_transformers_restores(tmp_path, tiny_llama_dir):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    directory = Path(shutil.copytree(tiny_llama_dir, tmp_path / "fp8"))
    stored = {}
    for key, weight in load_file(tiny_llama_dir / "model.safetensors").items():
        if weight.dim() < 2 or "layers" not in key:
            stored[key] = weight.bfloat16()
        else:
            stored |= {key.replace("weight", part): each for part, each in fp8(weight, block=32)[0].items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(
        directory, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    )
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = load_model(directory, dtype="bfloat16", device="cpu").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in reference.state_dict().items())


def test_experts_in_fp8_become_the_models_own(tmp_path):
    """DeepSeek-V3 stores each expert's matrices with their scales; the model holds all in one tensor."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 80, "moe_intermediate_size": 40}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
    sizes |= {
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    }
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes | {"num_key_value_heads": 4}, first_k_dense_replace=1)
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(plain)
    shutil.copytree(plain, packed)
    stored, exact = {}, {}
    for key, weight in load_file(plain / "model.safetensors").items():
        stored[key] = exact[key] = weight
        if weight.dim() == 2 and "_proj" in key:
            parts, value = fp8(weight.float(), block=32)
            stored |= {key.replace("weight", part): each for part, each in parts.items()}
            exact[key] = value.bfloat16()
    assert any(".experts.3.down_proj.weight_scale_inv" in key for key in stored)
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    write_config(packed, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    ids = torch.arange(1, 20)[None]
    ours, expected = (
        load_model(each, dtype="bfloat16", device="cpu")(input_ids=ids).logits for each in (packed, plain)
    )
    assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    from transformers import GptOssConfig, GptOssForCausalLM

    directory = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2)).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    stored, exact = {}, {}
    for key, weight in load_file(directory / "model.safetensors").items():
        stored[key] = exact[key] = weight
        if weight.dim() == 3:
            parts, value = mxfp4(stored.pop(key).float())
            stored |= {f"{key}_{part}": each.contiguous() for part, each in parts.items()}
            exact[key] = value.bfloat16()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return directory, exact


def test_chains_on_experts_of_mxfp4_are_merged_into_what_they_stand_for(gpt_oss, tmp_path):
    directory, exact = gpt_oss
    model = load_model(directory, dtype="float32", device="cpu")
    config = ChainConfig(rank=2, depth=1, alpha=4.0, target_modules=["experts"])
    for layer in inject(model, config).values():
        layer.B.data.normal_(std=0.1)
    adapter = adapter_of(model, config, {"hash": base_hash(directory)})
    result = merge_checkpoint(directory, adapter, tmp_path / "out", MergeOptions(), Origin("test"))
    assert result.receipt.largest_ulp <= 0.5 and set(result.receipt.changed) == set(adapter.tensors)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == exact.keys()
    for path, chain in adapter.tensors.items():
        wanted = exact[path].double() + delta_weight(*chain, config.scaling, torch.float64).mT
        torch.testing.assert_close(merged[path].double(), wanted, rtol=2**-8, atol=1e-6)


def test_mxfp4_is_what_transformers_restores(gpt_oss):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    directory, exact = gpt_oss
    found = open_weights(directory).tensors
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[key].tensor(), value) for key, value in exact.items())
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = load_model(directory, dtype="bfloat16", device="cpu").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bitsandbytes_is_what_bitsandbytes_restores(tiny_llama_dir, tmp_path, quantization):
    import bitsandbytes as bnb

    model = load_model(tiny_llama_dir, dtype="bfloat16", device="cpu", quantization=quantization)
    model.save_pretrained(tmp_path)
    found = open_weights(tmp_path).tensors
    restored = load_model(tmp_path, dtype="bfloat16", device="cpu")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            exact = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.state.SCB if weight.SCB is None else weight.SCB
            exact = (weight.data.float() * (scale.float() / 127)[:, None]).bfloat16()
        elif weight is not None:
            exact = weight
        else:
            continue
        assert torch.equal(found[f"{name}.weight"].tensor(), exact), name
        assert torch.equal(restored.get_submodule(name).weight, exact), name


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, r"cannot restore \(hqq\)\. It reads full precision, fp8, mxfp4, GPTQ"),
        ({"quant_method": "gptq", "bits": 3}, r"\(gptq with 3 bits\)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"\(gptq as marlin\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"\(awq as gemv\)"),
        ("a word", r"\(a word\)"),
    ],
)
def test_what_cannot_be_restored_is_refused(checkpoint, settings, message):
    write_config(checkpoint, settings)
    with pytest.raises(InputError, match=message):
        load_config(checkpoint)


def test_parts_that_are_missing_or_do_not_fit_are_named(pair_of, tmp_path):
    packed = Path(shutil.copytree(pair_of("fp8")[0], tmp_path / "packed"))
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    for changed, message in [
        ({}, f"{name} of a quantised weight is missing"),
        ({name: torch.ones(3, 5)}, r"has \(128, 128\) values and \(3, 5\) scales, which do not go together"),
    ]:
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file(kept | changed, packed / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            open_weights(packed)
    mixed = pair_of("gptq 4")[0]
    packed = Path(shutil.copytree(mixed, tmp_path / "mixed"))
    write_config(packed, {"quant_method": "gptq", "bits": 8, "group_size": GROUP})
    with pytest.raises(InputError, match=r"qzeros is .*; with .*qweight .* it has to be"):
        open_weights(packed)
    assert empty_model(packed).config.model_type == "llama"  # which reads no weights
