"""Base models: what is refused and how, and what a loaded one looks like."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from linchain_cli.errors import InputError, LinchainError
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.config import empty_model, load_config, text_decoder, text_decoder_prefix
from linchain_cli.model.loading import load_model, resolve_attention, resolve_dtype
from linchain_cli.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def edit_config(directory: Path, **fields) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def write_config(directory: Path, **fields) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


# What is refused before weights are read


def test_encoder_decoder_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="'t5' is an encoder-decoder model"):
        load_config(write_config(tmp_path, model_type="t5"))


def test_encoders_are_refused_and_their_decoder_form_is_not(tmp_path):
    with pytest.raises(InputError, match="'bert' is an encoder"):
        load_config(write_config(tmp_path, model_type="bert"))
    assert load_config(write_config(tmp_path, model_type="bert", is_decoder=True)).is_decoder


def test_a_classifier_that_cannot_leave_out_padding_is_refused(tmp_path):
    with pytest.raises(InputError, match="'fnet' takes no attention mask"):
        load_config(write_config(tmp_path, model_type="fnet"), outputs=Outputs(("no", "yes")))
    assert load_config(write_config(tmp_path, model_type="bert"), outputs=Outputs(("no", "yes")))


def test_a_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="'vit' is not such a language model"):
        load_config(write_config(tmp_path, model_type="vit"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    directory = write_config(
        tmp_path,
        model_type="homemade",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (directory / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(InputError, match="runs no code that comes with a model"):
        load_config(directory)


def test_a_known_type_is_built_by_transformers_even_if_code_lies_beside_it(checkpoint):
    edit_config(checkpoint, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (checkpoint / "evil.py").write_text("raise SystemExit('this ran')")
    assert type(load_model(checkpoint)).__name__ == "LlamaForCausalLM"


def test_an_unknown_type_suggests_the_nearest(tmp_path):
    with pytest.raises(InputError, match="no model type 'lama'.*Did you mean 'llama'"):
        load_config(write_config(tmp_path, model_type="lama"))


def test_a_config_whose_values_do_not_fit(checkpoint):
    with pytest.raises(InputError, match="config.json"):
        empty_model(edit_config(checkpoint, hidden_size="wide"))


# Loading


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny_llama_dir):
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "grouped"
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_conv1d_and_tied_models_load(tiny_gpt2_dir, tiny_tied_dir):
    assert type(load_model(tiny_gpt2_dir).transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    tied = load_model(tiny_tied_dir)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(tiny_llama_dir, name):
    model = load_model(tiny_llama_dir, dtype=name, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}


def test_auto_dtype_looks_at_the_processor(monkeypatch):
    for features, expected in [
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": False, "neon": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert resolve_dtype("auto", CPU) is expected
    assert resolve_dtype("float32", CPU) is torch.float32


@pytest.mark.parametrize(("multiplies", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_dtype_is_16_bit_on_every_gpu(monkeypatch, multiplies, expected):
    """T4 and V100 emulate bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: multiplies)
    assert resolve_dtype("auto", torch.device("cuda")) is expected


def test_attention_follows_the_device():
    assert resolve_attention("auto", CPU) == "grouped"
    assert resolve_attention("auto", torch.device("cuda")) is None
    assert resolve_attention("sdpa", CPU) == "sdpa"


def test_flash_attention_without_its_package_is_an_input_error(tiny_llama_dir):
    with pytest.raises(InputError, match="model.attention: 'flash_attention_2' cannot be used here"):
        load_model(tiny_llama_dir, attention="flash_attention_2", device="cpu")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_models_keep_their_head_and_pass_gradients(tiny_tied_dir, quantization):
    model = load_model(tiny_tied_dir, quantization=quantization, dtype="float32", device="cpu")
    plain = load_model(tiny_tied_dir, dtype="float32", device="cpu")
    projection = model.model.layers[0].mlp.up_proj
    assert type(projection).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[quantization]
    assert model.lm_head.weight.dtype is torch.float32
    if quantization == "nf4":
        assert projection.weight.quant_state.quant_type == "nf4" and projection.weight.quant_state.nested
    tokens = torch.arange(3, 19).reshape(2, 8)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.square().sum().backward()
    assert torch.isfinite(embedded.grad).all() and embedded.grad.abs().sum() > 0
    # Rounded to 4 or 8 bits it is another model, but near the one it came from.
    expected = plain(tokens).logits
    assert 0 < (logits - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_model_that_reads_weights_apart_from_their_layers_is_refused(tmp_path, small_model, quantization):
    small_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"MambaForCausalLM cannot compute with weights in {quantization}"):
        load_model(tmp_path, quantization=quantization, dtype="float32", device="cpu")


def test_an_empty_model_has_the_shapes_and_no_values(tiny_tied_dir, tiny_llama_dir):
    model, loaded = empty_model(tiny_llama_dir), load_model(tiny_llama_dir)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in loaded.named_parameters()
    }
    tied = empty_model(tiny_tied_dir)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


# Damaged checkpoints


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_damaged_safetensors_are_named(checkpoint, keep):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        load_model(checkpoint)


def test_missing_weights_are_not_invented(checkpoint):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="lacks 1 of the model's weights, first 'model.layers.1.mlp.up_proj.weight'"
    ):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_base_that_does_not_fit_is_no_wrong_input(checkpoint, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(LinchainError, match="does not fit into memory. Try model.dtype=auto") as caught:
        load_model(checkpoint)
    assert not isinstance(caught.value, InputError)


def test_weights_of_another_shape(checkpoint):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(edit_config(checkpoint, intermediate_size=96))


def test_pickled_weights_load_only_if_they_hold_tensors_alone(checkpoint):
    reference = load_model(checkpoint, dtype="float32")
    state = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    loaded = load_model(checkpoint, dtype="float32")
    assert torch.equal(loaded.lm_head.weight, reference.lm_head.weight)

    trace = checkpoint / "this-ran"
    torch.save({"lm_head.weight": _Hook(str(trace))}, checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match="refused"):
        load_model(checkpoint)
    assert not trace.exists()


class _Hook:
    """Unpickles to a file on the disk."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_hook_would_run_if_it_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(_Hook(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()


# Tokenizers


def test_a_fast_tokenizer_with_offsets(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    text = "where was the kettle sold?"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[start:end] for start, end in offsets) == text


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_damaged_tokenizer(checkpoint, content):
    path = checkpoint / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(checkpoint)


def test_a_slow_tokenizer_is_refused(tmp_path):
    words = [*"abc", "a@@", "b@@"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    write_config(tmp_path, model_type="ctrl")
    with pytest.raises(InputError, match="slow tokenizer.*tokenizer.json"):
        load_tokenizer(tmp_path)


# Multimodal models


def multimodal_config(kind: str):
    from transformers import Gemma3Config, LlavaConfig, Qwen2VLConfig

    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    small = {"image_size": 28, "patch_size": 14}
    if kind == "gemma3":
        return Gemma3Config(
            text_config=text | {"num_key_value_heads": 2, "head_dim": 8},
            vision_config=vision | small,
            mm_tokens_per_image=4,
        )
    if kind == "llava":
        return LlavaConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=vision | small | {"model_type": "clip_vision_model"},
        )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return Qwen2VLConfig(
        text_config=text | {"num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 4, "patch_size": 14},
    )


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_only_the_text_decoder_of_a_multimodal_model_may_carry_adapters(tmp_path, kind):
    multimodal_config(kind).save_pretrained(tmp_path)
    model = empty_model(tmp_path)
    assert text_decoder_prefix(model) == "model.language_model"
    inside = {
        name for name, module in text_decoder(model).named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert "layers.0.mlp.up_proj" in inside
    assert not any("vision" in name or "visual" in name or "projector" in name for name in inside)
    everything = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any("vis" in name for name in everything)


def test_the_whole_of_a_text_model_may_carry_adapters(tiny_gpt2_dir):
    model = empty_model(tiny_gpt2_dir)
    assert text_decoder_prefix(model) == "" and text_decoder(model) is model


def test_settings_for_generation_that_are_invalid_do_not_keep_a_model_from_loading(checkpoint, caplog):
    settings = {"num_return_sequences": 3, "do_sample": False}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    with caplog.at_level("WARNING"):
        model = load_model(checkpoint, dtype="float32")
    assert "generation_config.json is invalid and left aside: Greedy methods" in caplog.text
    assert model.generation_config.eos_token_id == model.config.eos_token_id
