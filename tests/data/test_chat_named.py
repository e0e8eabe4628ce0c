"""The chat templates that a recipe may name: what they write, what is learned, and whose they are."""

from __future__ import annotations

import copy

import pytest

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.recipe import ChatConfig
from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES, fitting_template

from .chat_templates import CONVERSATION, SYSTEM, TURNS, assistant, learned, user
from .test_chat_published import DIRECTORY

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]
WRITTEN = {
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
    "<|im_start|>assistant\nein end<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
    "<|im_start|>assistant\nzwei<|im_end|>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nein end<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nzwei<|eot_id|>",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\none?<end_of_turn>\n"
    "<start_of_turn>model\nein end<end_of_turn>\n<start_of_turn>user\ntwo?<end_of_turn>\n"
    "<start_of_turn>model\nzwei<end_of_turn>",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@pytest.fixture
def base(byte_level):
    """A base model's tokenizer: with the marks, without a template."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = None
    tokenizer.add_tokens(MARKS, special_tokens=True)
    return tokenizer


def named(tokenizer, name: str) -> ChatTemplate:
    return get_template("chat", tokenizer, chat=ChatConfig(template=name))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_written_and_what_is_learned(base, name):
    template = named(base, name)
    (rendered,) = template.render(CONVERSATION)
    assert rendered.text == WRITTEN[name] and not rendered.remarks
    assert learned(template, CONVERSATION) == [["ein end" + ENDS[name], "zwei" + ENDS[name]]]
    asked = template.prompt({"messages": TURNS[:1]})
    assert rendered.text.replace("Be brief.\n\n", "").endswith(
        asked.removeprefix("<s>") + "ein end" + rendered.text.split("ein end")[1]
    )


def test_the_beginning_of_the_sequence_is_written_once(base):
    base.bos_token = "<|im_start|>"  # as SmolLM2-Instruct has it
    assert named(base, "chatml").prompt({"messages": TURNS[:1]}).startswith("<|im_start|>user")
    base.bos_token = None
    for name in CHAT_TEMPLATES:
        assert named(base, name).prompt({"messages": TURNS[:1]}).startswith("<")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_the_formats_have_no_place_for_is_refused(base, name):
    from linchain_cli.data.rows import RowError

    template = named(base, name)
    with pytest.raises(RowError, match="reasoning"):
        template.render({"messages": [user("x"), assistant("y", reasoning_content="z")]})
    with pytest.raises(RowError, match="tools"):
        template.render({"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]})


@pytest.mark.skipif(not DIRECTORY, reason="needs TRL, or LINCHAIN_CHAT_TEMPLATES")
@pytest.mark.parametrize(
    "name, theirs, messages",
    [
        ("chatml", "qwen2_5", [SYSTEM, *TURNS]),
        ("llama3", "llama3", [SYSTEM, *TURNS]),
        ("llama3", "llama3", [user(" one?\n"), assistant(" ein\nzwei ")]),
        ("gemma", "gemma", TURNS),
        ("gemma", "gemma3", [SYSTEM, *TURNS]),
    ],
)
def test_published_templates_of_these_formats_write_the_same(base, name, theirs, messages):
    base.bos_token = None if name == "chatml" else "<s>"
    published = (DIRECTORY / f"{theirs}.jinja").read_text(encoding="utf-8")
    options = {"tokenize": False, "add_generation_prompt": False}
    ours = base.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[name], **options)
    assert ours == base.apply_chat_template(messages, chat_template=published, **options)
    options["add_generation_prompt"] = True
    ours = base.apply_chat_template(messages[:-1], chat_template=CHAT_TEMPLATES[name], **options)
    assert ours == base.apply_chat_template(messages[:-1], chat_template=published, **options)


def test_where_none_is_given_the_one_that_the_tokenizer_has_marks_for_is_named(base, byte_level):
    bare = copy.deepcopy(byte_level)
    bare.chat_template = None
    with pytest.raises(InputError, match=r"data.chat.template \(chatml, llama3, gemma; a Jinja file"):
        get_template("chat", bare)
    bare.add_tokens(["<|eot_id|>"], special_tokens=True)
    with pytest.raises(InputError, match=r"\(llama3, whose marks this tokenizer knows; a Jinja file"):
        get_template("chat", bare)
    assert {fitting_template([end]) for end in ENDS.values()} == set(CHAT_TEMPLATES)
