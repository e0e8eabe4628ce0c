"""What says how a model is asked, and where it stops, travels with it."""

from __future__ import annotations

import json

import pytest

from linchain_cli.data.asking import (
    ASKING_FILE,
    GENERATION_FILE,
    Asking,
    asking_of,
    read_asking,
    straddle_mostly,
    template_of_asking,
    to_be_sent_along,
    travelling_files,
)
from linchain_cli.data.encoding import encode_prompt
from linchain_cli.data.templates import closing_token, end_tokens, get_template, template_of
from linchain_cli.errors import InputError
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe.data import DataConfig

ROW = {"instruction": "What is 2 + 2?", "input": ""}


@pytest.fixture
def tokenizer(tiny_tokenizer_dir):
    """Its chat template closes turns with <|im_end|>, but its end of sequence is another token, as in a base
    model of Qwen."""
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    tokenizer.eos_token = "<|pad|>"
    return tokenizer


def data_config(**fields):
    return DataConfig(train="everyday", **fields)


def written(tmp_path, data, tokenizer, rows=None, base="{}"):
    (tmp_path / "config.json").write_text(base)
    files = travelling_files(asking_of(data, rows or {}), tokenizer, template_of(data, tokenizer), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


def test_end_tokens_are_those_of_the_template(tokenizer):
    chat, alpaca = get_template("chat", tokenizer), get_template("alpaca", tokenizer)
    assert end_tokens(chat, tokenizer) == [0, 2] and closing_token(chat, tokenizer) == 2
    assert end_tokens(alpaca, tokenizer) == [0] and closing_token(alpaca, tokenizer) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "alpaca"},
        {"template": {"prompt": "Q: {instruction}\n", "response": "{output}"}},
        {"template": "chat", "chat": {"system": "Be short.", "options": {"enable_thinking": False}}},
    ],
)
def test_a_checkpoint_is_asked_as_it_was_trained(tmp_path, tokenizer, fields):
    data = data_config(**fields)
    out = written(tmp_path, data, tokenizer, {"kept": 3, "straddling_rows": 1})
    asking = read_asking(out)
    assert asking == asking_of(data, {"kept": 3, "straddling_rows": 1}) and asking.straddles is False
    again = template_of_asking(asking, tokenizer)
    assert again.prompt(ROW) == template_of(data, tokenizer).prompt(ROW)
    assert again.fingerprint == template_of(data, tokenizer).fingerprint


def test_end_tokens_are_where_other_tools_look(tmp_path, tokenizer):
    out = written(tmp_path, data_config(template="chat"), tokenizer, base='{"eos_token_id": 0}')
    assert json.loads((out / GENERATION_FILE).read_text())["eos_token_id"] == [0, 2]


def test_a_generation_config_keeps_what_it_says(tmp_path, tokenizer):
    (tmp_path / GENERATION_FILE).write_text('{"eos_token_id": 5, "temperature": 0.6}')
    out = written(tmp_path, data_config(template="chat"), tokenizer)
    assert json.loads((out / GENERATION_FILE).read_text()) == {"eos_token_id": [5, 0, 2], "temperature": 0.6}


def test_a_generation_config_that_is_right_is_left_alone(tmp_path, tokenizer):
    (tmp_path / GENERATION_FILE).write_text('{"eos_token_id": [0, 2]}')
    out = written(tmp_path, data_config(template="chat"), tokenizer)
    assert sorted(path.name for path in out.iterdir()) == [ASKING_FILE]


def test_a_chat_template_of_ones_own_comes_along(tmp_path, tokenizer):
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    data = data_config(template="chat", chat={"template": str(own)})
    out = written(tmp_path, data, tokenizer)
    own.unlink()
    again = template_of_asking(read_asking(out), tokenizer)
    assert again.prompt(ROW) == "[user] What is 2 + 2?<|im_end|>[assistant] "
    assert again.fingerprint == template_of(data, tokenizer).fingerprint


def test_what_other_programs_do_not_read_is_known():
    asking = Asking(
        template="chat", chat_template="{{ x }}", options={"enable_thinking": False}, system="Be kind."
    )
    of_template, *others = to_be_sent_along(asking, template_travels=False)
    assert of_template.startswith("a chat template of its own")
    assert others == to_be_sent_along(asking, template_travels=True)
    assert others == [
        'chat_template_kwargs {"enable_thinking": false} (data.chat.options)',
        "a system prompt (data.chat.system)",
    ]
    assert to_be_sent_along(Asking(template="chat"), template_travels=False) == []
    assert to_be_sent_along(Asking(template="alpaca", system="Be kind."), template_travels=False) == []


def test_a_damaged_record_is_named(tmp_path):
    assert read_asking(tmp_path) is None
    (tmp_path / ASKING_FILE).write_text("{")
    with pytest.raises(InputError, match=f"{ASKING_FILE} is damaged"):
        read_asking(tmp_path)


def splitting_digits():
    """A tokenizer that keeps digits apart, as those of Llama 2, Qwen and SmolLM do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What is the answer to the question? the the the"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_prompts_that_end_in_a_blank_are_cut_as_in_training(tokenizer):
    """Words join the blank, digits and other scripts do not; neither cut may be taken for the other's."""
    tokenizer = splitting_digits()
    template = get_template({"prompt": "{instruction} A: ", "response": "{output}"}, tokenizer)
    joined = encode_prompt(tokenizer, template, {**ROW, "output": "the house"})
    apart = encode_prompt(tokenizer, template, {**ROW, "output": "16"})
    assert len(apart) == len(joined) + 1 and tokenizer.decode(apart).endswith("A: ")
    assert encode_prompt(tokenizer, template, ROW, straddles=True) == joined
    assert encode_prompt(tokenizer, template, ROW, straddles=None) == joined
    assert encode_prompt(tokenizer, template, ROW, straddles=False) == apart
    assert encode_prompt(tokenizer, template, {**ROW, "output": "二"}) == apart
    assert straddle_mostly({"kept": 10, "straddling_rows": 9}) is True
    assert straddle_mostly({"kept": 10, "straddling_rows": 0}) is False
    assert straddle_mostly({}) is None


def test_templates_that_end_in_white_space_are_warned_of(tokenizer):
    row = {**ROW, "output": "4"}
    blank = get_template({"prompt": "{instruction} A: ", "response": "{output}"}, tokenizer)
    assert "ends in white space" in blank.render(row)[0].remarks[0]
    for end in ("A:", "A:\n"):
        clean = get_template({"prompt": "{instruction} " + end, "response": "{output}"}, tokenizer)
        assert clean.render(row)[0].remarks == ()
