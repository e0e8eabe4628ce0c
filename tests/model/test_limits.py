"""What a model can read, held to what its forward pass does at the limit and behind it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linchain_cli.errors import InputError
from linchain_cli.model.limits import Limits, limits

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
# Each way of telling positions: a table, one with spare rows, sines in a buffer, biases that end; and others.
TABLES = {
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {},
    "gpt_neo": {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "ctrl": {},
    "roberta": {"is_decoder": True},
    "mpt": {"max_seq_len": 40},
}
ENDLESS = {"llama": {}, "gpt_neox": {}, "bloom": {}, "xglm": {"ffn_dim": 48}}


def build(kind: str, **options):
    with torch.random.fork_rng(devices=[]):
        config = CONFIG_MAPPING[kind](**SMALL, max_position_embeddings=40, **options)
        return AutoModelForCausalLM.from_config(config).eval()


def read(model, length: int):
    with torch.inference_mode():
        return model(input_ids=torch.full((1, length), 7), use_cache=False).logits


@pytest.mark.parametrize("kind", TABLES)
def test_where_a_table_of_positions_ends(kind):
    model = build(kind, **TABLES[kind])
    found = limits(model)
    assert found.table and found.embeddings == 97
    assert found.positions == (38 if kind == "roberta" else 40)  # its table begins behind the padding's
    assert read(model, found.positions).shape[1] == found.positions
    with pytest.raises((IndexError, RuntimeError)):
        read(model, found.positions + 1)
    with torch.device("meta"):
        assert limits(AutoModelForCausalLM.from_config(model.config)) == found


@pytest.mark.parametrize("kind", ENDLESS)
def test_models_that_read_on(kind):
    model = build(kind, **ENDLESS[kind])
    assert not limits(model).table
    assert read(model, 60).isfinite().all()


def test_too_long_is_an_error_or_a_warning():
    asked = ("the longest row has", "set data.max_length to at most {positions}")
    for fits in (Limits(97, 40), Limits(97, 40, table=True)):
        assert fits.check_length(40, *asked) is None
    assert Limits(97).check_length(10**6, *asked) is None
    warning = Limits(97, 4096).check_length(5000, *asked)
    assert warning.startswith("the longest row has 5,000 tokens, and the model was made for 4,096")
    with pytest.raises(InputError, match="has 41 tokens, .* 40 positions: set data.max_length to at most 40"):
        Limits(97, 40, table=True).check_length(41, *asked)
