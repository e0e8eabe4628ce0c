"""Parameter names against checkpoint keys: what `map_names` finds must be what `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    GPT2Config,
    GPT2Model,
    HrmTextConfig,
    LlamaConfig,
    MixtralConfig,
)

from linchain_cli.model.names import ConversionError, map_names, tied_names

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def saved(config, directory: Path, auto=AutoModelForCausalLM):
    """A random checkpoint of `config`, its tensors, and the same model on the meta device."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(directory)
    return load_file(directory / "model.safetensors"), empty(config, auto)


def empty(config, auto=AutoModelForCausalLM):
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    return model


def shapes(tensors):
    return {key: tensor.shape for key, tensor in tensors.items()}


def check_against_loading(names, tensors, loaded: torch.nn.Module):
    """Every mapped parameter, made from the file's tensors as the map says, equals what transformers
    loaded."""
    state = loaded.state_dict()
    for name, key in names.renamed.items():
        assert torch.equal(state[name], tensors[key]), (name, key)
    for name, conversion in names.converted.items():
        assert torch.equal(state[name], conversion.to_model(tensors)[name]), name
        flat = torch.cat([tensors[key].reshape(-1) for key in conversion.keys])
        assert torch.equal(state[name], flat[conversion.element_sources(shapes(tensors))[name]]), name
    assert not names.missing and not names.unused


@pytest.mark.parametrize(
    ("config", "auto", "different", "converted"),
    [
        (LlamaConfig(**SMALL), AutoModelForCausalLM, 0, 0),
        (MixtralConfig(**SMALL, num_local_experts=3), AutoModelForCausalLM, 2, 4),
        (HrmTextConfig(**SMALL), AutoModelForCausalLM, 4, 24),
        (
            Gemma3Config(text_config={**SMALL, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4),
            AutoModelForImageTextToText,
            None,
            0,
        ),
    ],
    ids=["llama", "mixtral", "hrm_text", "gemma3"],
)
def test_names_are_those_that_loading_uses(tmp_path, config, auto, different, converted):
    tensors, model = saved(config, tmp_path, auto)
    names = map_names(model, shapes(tensors))
    check_against_loading(names, tensors, auto.from_pretrained(tmp_path))
    other = sum(name != key for name, key in names.renamed.items())
    assert other == (len(tensors) if different is None else different)
    assert len(names.converted) == converted


def test_pieces_of_experts_are_where_the_elements_say(tmp_path):
    """Also where a matrix is square, and with more experts than one digit counts."""
    config = MixtralConfig(**{**SMALL, "intermediate_size": 32}, num_local_experts=11)
    tensors, model = saved(config, tmp_path)
    names = map_names(model, shapes(tensors))
    found = {}
    for conversion in {id(conversion): conversion for conversion in names.converted.values()}.values():
        pieces = conversion.pieces(shapes(tensors))
        assert pieces.keys() == set(conversion.keys)
        places = conversion.element_sources(shapes(tensors))
        flat = torch.cat([tensors[key].reshape(-1) for key in conversion.keys])
        for key, piece in pieces.items():
            rows = flat[places[piece.parameter]][piece.expert, piece.first : piece.first + piece.count]
            assert torch.equal(rows, tensors[key]) and not piece.transposed
        found |= pieces
    assert sum(piece.parameter.endswith("gate_up_proj") for piece in found.values()) == 2 * 2 * 11


def test_a_conversion_of_something_else_has_no_pieces(tmp_path):
    tensors, model = saved(HrmTextConfig(**SMALL), tmp_path)
    names = map_names(model, shapes(tensors))
    assert all(conversion.pieces(shapes(tensors)) is None for conversion in names.converted.values())


def test_a_base_checkpoint_without_prefix_maps_to_the_model_with_a_head(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    GPT2Model(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = map_names(empty(config), shapes(tensors))
    assert names.renamed["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    check_against_loading(names, tensors, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_what_no_parameter_takes_and_what_is_missing_are_named(tmp_path):
    tensors, model = saved(LlamaConfig(**SMALL), tmp_path)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    names = map_names(model, {**shapes(tensors), "model.layers.0.attn.bias": torch.Size([1])})
    assert names.missing == ("model.layers.1.mlp.up_proj.weight",)
    assert names.unused == ("model.layers.0.attn.bias",)
    assert gone is not None


def test_of_two_keys_for_one_parameter_the_one_that_is_loaded_counts(tmp_path):
    tensors, model = saved(LlamaConfig(**SMALL), tmp_path)
    key = "model.norm.weight"
    tensors["norm.weight"] = tensors[key] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    names = map_names(model, shapes(tensors))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[key]
    assert torch.equal(loaded, tensors[names.renamed[key]])
    assert len(names.unused) == 1


def test_tied_weights_know_their_other_names():
    tied = tied_names(empty(LlamaConfig(**SMALL, tie_word_embeddings=True)))
    assert tied["lm_head.weight"] == ("model.embed_tokens.weight",)
    assert tied["model.embed_tokens.weight"] == ("lm_head.weight",)
    assert tied_names(empty(LlamaConfig(**SMALL, tie_word_embeddings=False))) == {}


def conversion_with(operation, tmp_path):
    """A conversion of a Llama's gate_proj by `operation`, registered nowhere."""
    from transformers.core_model_loading import WeightConverter

    from linchain_cli.model.names import Conversion

    pattern = "gate_proj.weight"
    converter = WeightConverter(pattern, pattern, [operation])
    key = "model.layers.0.mlp.gate_proj.weight"
    return Conversion(((key, pattern),), (key,), key, converter, empty(LlamaConfig(**SMALL)))


class Scale:
    """Computes instead of moving."""

    supports_many_to_many = False

    def __init__(self, function):
        self.function = function

    def convert(self, input_dict, **_):
        return {name: self.function(values[0]) for name, values in input_dict.items()}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda tensor: tensor + 1, "computes the values"),
        (lambda tensor: 2 * tensor, "computes the values"),
        (lambda tensor: tensor / 2, "computes the values"),
        (lambda tensor: tensor[:1].expand_as(tensor), "twice"),
        (lambda tensor: tensor @ tensor, "cannot be followed"),
    ],
)
def test_a_converter_that_computes_is_refused(tmp_path, function, message):
    conversion = conversion_with(Scale(function), tmp_path)
    with pytest.raises(ConversionError, match=message):
        conversion.element_sources({conversion.keys[0]: torch.Size([3, 4])})


def test_a_converter_that_moves_is_followed(tmp_path):
    conversion = conversion_with(Scale(lambda tensor: tensor.T.contiguous()), tmp_path)
    places = conversion.element_sources({conversion.keys[0]: torch.Size([2, 3])})
    assert places[conversion.parameters[0]].tolist() == [[0, 3], [1, 4], [2, 5]]
