"""What of a config.json decides the outputs of a model, and what is said where it was changed."""

from __future__ import annotations

import json
import math

import pytest

from linchain_cli.model.computed import changed_values, computed_values
from linchain_cli.storage import json_bytes

LLAMA = {"model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 99}


def changes(before: dict, **now) -> list[str]:
    return changed_values(computed_values(before), computed_values({**before, **now}))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rope_theta", 5e5, "rope_parameters.rope_theta: 10000.0, now 500000.0"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps: 1e-05, now 1e-06"),
        ("hidden_act", "gelu", 'hidden_act: "silu", now "gelu"'),
        ("tie_word_embeddings", True, "tie_word_embeddings: false, now true"),
        ("some_scale", 2, "some_scale: null, now 2"),
    ],
)
def test_what_makes_another_model_of_the_same_weights_is_named(key, value, told):
    assert changes(LLAMA, **{key: value}) == [told]


def test_values_of_parts_are_named_by_their_path():
    before = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 512}}
    now = {"text_config": {"model_type": "gemma3_text", "sliding_window": 1024}}
    assert changes(before, **now) == ["text_config.sliding_window: 512, now 1024"]


def test_what_makes_no_other_model_is_not_told():
    told = {
        "_name_or_path": "elsewhere",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "torch_dtype": "bfloat16",
        "dtype": "float16",
        "eos_token_id": 7,
        "id2label": {"0": "no", "1": "yes"},
        "initializer_range": 0.1,
        "transformers_version": "4.40.0",
        "use_cache": False,
    }
    assert changes(LLAMA, **told) == []


def test_the_same_model_written_by_another_version_is_the_same():
    from transformers import LlamaConfig

    written = json.loads(
        LlamaConfig(**{key: LLAMA[key] for key in LLAMA if key != "model_type"}).to_json_string()
    )
    assert (
        "rope_theta" not in written and changed_values(computed_values(LLAMA), computed_values(written)) == []
    )


def test_numbers_that_json_does_not_have_can_be_kept():
    values = computed_values({"model_type": "mamba2", "time_step_limit": [0.0, math.inf], "x": math.nan})
    assert json.loads(json_bytes(values)) == values
    assert changed_values(values, values) == []


def test_models_that_transformers_does_not_know_and_runs_that_kept_nothing():
    assert changes({"model_type": "nobody's", "scale": 1}, scale=2) == ["scale: 1, now 2"]
    assert changes(LLAMA, model_type="mistral")[:1] != []
    assert changed_values(None, LLAMA) == []
