"""Supervision by offsets, against an independent reference, over tokenizers of every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linchain_cli.data.encoding import (
    ControlTokens,
    TextEncoder,
    encode_prompt,
    encode_responses,
    text_encoder,
)
from linchain_cli.data.rows import Rendered
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

OWN = {"prompt": "Q: {instruction} {input}A: ", "response": "{output}"}  # ends in a space, so tokens straddle
TEMPLATES = ["alpaca", "llm-adapters", "chat", "plain", OWN]

words = st.sampled_from(
    [
        "the correct answer is ", "true", "answer12", "apples", " ", "  ", "\n", "\nA: ", "16", "4.5",
        "é", "東京", "🙂", "“", "#", "\t", "x",
    ]
)  # fmt: skip
texts = st.lists(words, min_size=0, max_size=6).map("".join)
answers = st.lists(words, min_size=1, max_size=5).map("".join).filter(str.strip)
examples = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


# Offsets without leading spaces know less than the reference has to: it asks the same tokenizer without
# trimming.
UNTRIMMED = {}


@pytest.fixture(autouse=True)
def _reference_of_the_trimmed(tokenizers_by_kind):
    UNTRIMMED[tokenizers_by_kind["byte-level-trimmed"]] = tokenizers_by_kind["byte-level"]


def encode(tokenizer, template, row, **options):
    return text_encoder(tokenizer).encode(template.render(row), adds_bos=template.adds_bos, **options)[0]


def reference(tokenizer, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """Ids and supervision character by character, from the tokenizer's own offsets of the full text."""
    tokenizer = UNTRIMMED.get(tokenizer, tokenizer)
    output = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = {position for start, end in rendered.spans for position in range(start, end)}
    flags = [bool(wanted & set(range(start, max(end, start + 1)))) for start, end in output["offset_mapping"]]
    return output["input_ids"], flags


@pytest.mark.parametrize("name", TEMPLATES, ids=str)
@examples
@given(instruction=texts, input=texts, output=answers)
def test_rows_and_prompts(tokenizer, name, instruction, input, output):
    template = get_template(name, tokenizer)
    row = {"instruction": instruction, "input": input, "output": output}
    (rendered,) = template.render(row)
    encoded = encode(tokenizer, template, row)
    ids, flags = reference(tokenizer, rendered)
    leading = len(encoded.input_ids) - len(ids) - int(rendered.ends and ids[-1] != tokenizer.eos_token_id)
    assert encoded.input_ids[leading : leading + len(ids)].tolist() == ids

    # What is supervised is exactly what holds a character of the answer, and EOS.
    assert encoded.supervised[leading : leading + len(ids)].tolist() == (
        flags if leading else [False, *flags[1:]]
    )
    assert encoded.supervised[leading + len(ids) :].all()
    assert not encoded.supervised[:leading].any()
    assert encoded.input_ids[-1] == tokenizer.eos_token_id or not rendered.ends

    # The evaluation prompt is the row's tokens before the first supervised one: what training showed as
    # given.
    prompt = encode_prompt(tokenizer, template, row)
    first = int(encoded.supervised.argmax())
    assert prompt == encoded.input_ids[:first].tolist()
    # Prompt and continuation are the row.
    same, (answer,) = encode_responses(tokenizer, template, row, [template.response(row)])
    assert same == prompt
    assert (same + answer) == encoded.input_ids[: len(same + answer)].tolist()


def test_a_token_that_straddles_is_cut_off_the_prompt_learned_and_counted(byte_level):
    template = get_template(OWN, byte_level)
    row = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true"}
    encoded = encode(byte_level, template, row)
    pieces = [byte_level.decode([token]) for token in encoded.input_ids]
    first = int(encoded.supervised.argmax())
    assert pieces[first] == " the"
    assert encoded.straddling == 1
    assert pieces[first - 1].endswith(":")
    assert byte_level.decode(encode_prompt(byte_level, template, row)).endswith("A:")
    assert encode(byte_level, get_template("alpaca", byte_level), row).straddling == 0


def test_trimmed_offsets_do_not_hide_a_straddling_token(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte-level-trimmed"]
    row = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true"}
    (text,) = get_template(OWN, tokenizer).render(row)
    offsets = tokenizer(text.text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert (text.spans[0][0], text.spans[0][0] + 3) in offsets, (
        "the tokenizer under test trims the space of ' the'"
    )
    assert encode(tokenizer, get_template(OWN, tokenizer), row).straddling == 1


def test_the_prompt_does_not_depend_on_which_answer_is_right(byte_level):
    template = get_template(OWN, byte_level)
    row = {"instruction": "x", "input": ""}
    options = ["true", "answer12", "16", "東"]
    shared, continuations = encode_responses(byte_level, template, row, options)
    for option, continuation in zip(options, continuations, strict=True):
        assert byte_level.decode(shared + continuation) == f"<s>Q: x A: {option}"
    assert encode_prompt(byte_level, template, row) == shared  # without an answer, as if a word followed


def test_bos_comes_once(tokenizers_by_kind):
    for kind, leading in [
        ("byte-level", ["<s>"]),
        ("sentencepiece", ["<s>"]),
        ("unigram", []),
        ("wordpiece", ["[CLS]"]),
    ]:
        tokenizer = tokenizers_by_kind[kind]
        ids = tokenizer.convert_tokens_to_ids(leading)
        assert text_encoder(tokenizer).prefix_ids == ids
        row = {"instruction": "x", "output": "true"}
        plain = encode(tokenizer, get_template("plain", tokenizer), row).input_ids.tolist()
        assert plain[: len(ids)] == ids and plain.count(ids[0] if ids else -1) == len(ids)
    written = get_template({"prompt": "<s>{instruction}\n", "response": "{output}"}, None)
    ids = encode(tokenizers_by_kind["byte-level"], written, row).input_ids.tolist()
    assert ids.count(0) == 1 and ids[0] == 0
    chat = get_template("chat", tokenizers_by_kind["byte-level"])
    assert 0 not in encode(tokenizers_by_kind["byte-level"], chat, row).input_ids


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-adds-eos", "unigram"])
@pytest.mark.parametrize(
    "template", ["plain", "chat", {"prompt": "{instruction}\n", "response": "{output}</s>"}], ids=str
)
def test_eos_comes_once_and_is_supervised(tokenizers_by_kind, kind, template):
    tokenizer = tokenizers_by_kind[kind]
    encoded = encode(tokenizer, get_template(template, tokenizer), {"instruction": "x", "output": "true"})
    answer = encoded.input_ids[int(encoded.supervised.argmax()) :]
    assert (answer == tokenizer.eos_token_id).sum() == 1
    assert answer[-1] == tokenizer.eos_token_id
    assert encoded.supervised[-1]


def test_eos_is_supervised_where_pad_is_eos(byte_level):
    assert byte_level.pad_token_id == byte_level.eos_token_id
    encoded = encode(byte_level, get_template("alpaca", byte_level), {"instruction": "x", "output": "true"})
    assert encoded.input_ids[-1] == byte_level.eos_token_id and encoded.supervised[-1]


def test_truncation_cuts_the_right_end_and_eos_with_it(byte_level):
    template = get_template("plain", byte_level)
    row = {"instruction": "a b c d", "output": "true or false"}
    whole = encode(byte_level, template, row)
    for length in range(1, len(whole.input_ids) + 2):
        cut = encode(byte_level, template, row, max_length=length)
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.supervised.tolist() == whole.supervised[:length].tolist()
        assert cut.truncated == (length < len(whole.input_ids))
        assert cut.full_length == len(whole.input_ids)
    before_eos = encode(byte_level, template, row, max_length=len(whole.input_ids) - 1)
    assert before_eos.truncated and before_eos.input_ids[-1] != byte_level.eos_token_id
    assert not encode(byte_level, template, row, max_length=int(whole.supervised.argmax())).supervised.any()


def test_a_straddling_token_that_is_cut_off_is_not_counted(byte_level):
    template = get_template(OWN, byte_level)
    row = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true"}
    first = int(encode(byte_level, template, row).supervised.argmax())
    assert encode(byte_level, template, row, max_length=first).straddling == 0
    assert encode(byte_level, template, row, max_length=first + 1).straddling == 1


def test_train_on_inputs_supervises_all_but_the_first_token(tokenizer):
    encoded = encode(
        tokenizer,
        get_template("alpaca", tokenizer),
        {"instruction": "x", "output": "true"},
        train_on_inputs=True,
    )
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)


def test_several_spans(byte_level):
    text = "the correct answer is true false"
    rendered = Rendered(text, [(4, 11), (22, 26)], ends=False)
    encoded = TextEncoder(byte_level).encode([rendered], adds_bos=False)[0]
    ids, flags = reference(byte_level, rendered)
    assert encoded.input_ids.tolist() == ids and encoded.supervised.tolist() == flags
    assert 0 < np.count_nonzero(encoded.supervised) < len(ids)
    assert encoded.straddling == 2  # " correct" and " true" begin in the space before


def test_the_callers_tokenizer_is_left_alone_and_its_state_does_not_matter(byte_level):
    template, row = get_template("plain", byte_level), {"instruction": "a b c d e f", "output": "true"}
    before = encode(byte_level, template, row).input_ids.tolist()
    byte_level(["a", "b c d"], padding="max_length", truncation=True, max_length=4)
    state = byte_level.backend_tokenizer.to_str()
    assert TextEncoder(byte_level).encode(template.render(row), adds_bos=True)[0].input_ids.tolist() == before
    assert byte_level.backend_tokenizer.to_str() == state


def test_added_tokens_are_noticed(byte_level):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    template, row = get_template("plain", tokenizer), {"instruction": "x", "output": "<new>"}
    before = encode(tokenizer, template, row).input_ids
    tokenizer.add_tokens(["<new>"])
    after = encode(tokenizer, template, row).input_ids
    assert len(after) < len(before)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="fast tokenizer"):
        TextEncoder(object())


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "Is 1 </s> 2?", "output": "no"}, "</s>"),
        ({"messages": [{"role": "user", "content": "a<s>b"}, {"role": "assistant", "content": "c"}]}, "<s>"),
        ({"text": "struck <S>out</S>, and a < b", "history": [("q", "a")], "n": 3}, None),
    ],
)
def test_control_tokens_are_found_in_any_text_of_a_row(byte_level, row, found):
    assert ControlTokens(byte_level).find(row) == found
    if found:
        text = str(row)
        assert byte_level.convert_tokens_to_ids(found) in byte_level(text, add_special_tokens=False).input_ids


def test_a_templates_own_control_tokens_are_not_counted(prepare, write):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": turns}, {"messages": [{"role": "user", "content": "</s>"}, turns[1]]}]
    path = write("chat.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report = prepare(str(path), template="chat").report
    assert report.control_rows == 1 and report.control_examples == [f"{path}:2 (row 2): </s>"]
