"""Configuration files with the names of transformers 4 beside those of transformers 5."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig

from linchain_cli.model.portable import make_portable, portable_config, portable_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def as_written(config) -> dict:
    return json.loads(config.to_json_string(use_diff=False))


def as_read(content: dict, tmp_path) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(content))
    return AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize(
    ("config", "old"),
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
            {"rope_theta": 100000.0, "rope_scaling": None},
        ),
        (
            LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
            {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        ),
        (
            GPTNeoXConfig(rope_parameters={"rope_theta": 20000.0, "partial_rotary_factor": 0.5}),
            {"rotary_emb_base": 20000.0, "rotary_pct": 0.5},
        ),
        (
            Gemma3TextConfig(),
            {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None},
        ),
    ],
    ids=["llama", "llama3", "gpt_neox", "gemma3"],
)
def test_older_readers_find_their_names_and_newer_ones_read_the_same(tmp_path, config, old):
    config.dtype = "bfloat16"
    new = as_written(config)
    both = portable_config(new)
    assert {key: both[key] for key in old} == old
    assert both["torch_dtype"] == both["dtype"] == "bfloat16"
    assert {key: both[key] for key in new} == new
    before, after = as_read(new, tmp_path), as_read(both, tmp_path)
    assert after["rope_parameters"] == before["rope_parameters"]
    assert portable_config(both) == both


def test_the_text_part_of_a_multimodal_configuration_is_done_too(base_of):
    config = portable_config(json.loads((base_of("gemma3") / "config.json").read_bytes()))
    assert config["text_config"]["rope_theta"] == 1000000.0
    assert config["torch_dtype"] == config["vision_config"]["torch_dtype"] == "float32"


def test_what_transformers_4_wrote_stays_as_it_is():
    old = {"model_type": "llama", "torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": None}
    assert portable_config(old) == old
    assert portable_config({"model_type": "unheard_of", "dtype": "float32"})["torch_dtype"] == "float32"


def test_names_that_change_what_transformers_5_reads_are_left_out(monkeypatch):
    monkeypatch.setattr("linchain_cli.model.portable._old_rope_names", lambda *_: {"rope_scaling": {"a": 1}})
    config = portable_config(as_written(LlamaConfig()))
    assert "rope_scaling" not in config and "rope_theta" not in config


def test_the_tokenizer_is_the_same_under_the_older_name(tmp_path, tiny_llama_dir):
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    before = json.loads(path.read_bytes())
    assert before["tokenizer_class"] == "TokenizersBackend"
    make_portable(tmp_path / "model")
    after = json.loads(path.read_bytes())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["model_input_names"] == AutoTokenizer.from_pretrained(tiny_llama_dir).model_input_names
    ours = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "the ladder was painted <|im_end|> in the harbour 42"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_extra_special_tokens_get_the_name_they_had():
    found = portable_tokenizer({"extra_special_tokens": ["<a>"], "backend": "x", "is_local": True})
    assert found == {"additional_special_tokens": ["<a>"]}
    named = {"extra_special_tokens": {"image_token": "<image>"}}
    assert portable_tokenizer(named) == named
