"""What a model thinks is no answer."""

from __future__ import annotations

import pytest

from linchain_cli.data.templates import get_template
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.jobs import GenerationJob
from linchain_cli.evaluation.reasoning import Reasoning
from linchain_cli.evaluation.speaking import Speaker
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import ChatConfig

from ..data.chat_templates import REASONING

# As gpt-oss: a channel for what is thought, another one for the answer, told by control tokens.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
# As those that only ever think: the reasoning has begun when the model is asked.
BEGUN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
ROW = {"instruction": "Is ice cold?", "input": ""}


@pytest.fixture
def tokenizer(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return tokenizer


def through(tokenizer, template):
    if template in (REASONING, CHANNELS, BEGUN):
        return get_template("chat", tokenizer, ChatConfig(template=template))
    return get_template(template, tokenizer)


@pytest.mark.parametrize(
    ("template", "written", "parts"),
    [
        (REASONING, "<think>\nYes or no?\n</think>\n\nno", ("\nYes or no?\n", "\n\nno")),
        (REASONING, "<think>\n\n</think>\n\nno", ("\n\n", "\n\nno")),
        (REASONING, "no", ("", "no")),
        (REASONING, "<think>\nYes or no?", ("\nYes or no?", None)),
        (
            CHANNELS,
            "<|channel|>analysis<|message|>Yes or no?<|end|><|start|>assistant<|channel|>final<|message|>no",
            ("Yes or no?", "no"),
        ),
        (CHANNELS, "<|channel|>final<|message|>no", ("", "no")),
        (CHANNELS, "<|channel|>analysis<|message|>Yes or no?", ("analysisYes or no?", None)),
        (BEGUN, "Yes or no?\n</think>\n\nno", ("Yes or no?\n", "\n\nno")),
        (BEGUN, "Yes or no?", ("Yes or no?", None)),
        ("alpaca", "<think>Yes or no?</think>no", ("Yes or no?", "no")),
        ("alpaca", "no", ("", "no")),
    ],
)
def test_the_answer_stands_behind_the_reasoning(tokenizer, template, written, parts):
    template = through(tokenizer, template)
    tokens = tokenizer(written, add_special_tokens=False).input_ids
    assert Reasoning(tokenizer, template).parts(tokens, template.prompt(ROW)) == parts


def test_what_is_shown_tells_thought_from_answer(tokenizer):
    thought = "<|channel|>analysis<|message|>Yes or no?<|end|><|start|>assistant<|channel|>final<|message|>no"
    for template, written in ((CHANNELS, thought), (REASONING, "<think>\nYes or no?\n</think>\n\nno")):
        tokens = tokenizer(written, add_special_tokens=False).input_ids
        assert Reasoning(tokenizer, through(tokenizer, template)).shown(tokens) == written


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("<think>\nYes or no?\n</think>\n\nno###", ("Yes or no?", "no")),
        ("<think>\nYes###", ("Yes", None)),
        ("no###", ("", "no")),
    ],
)
def test_a_stop_text_is_no_part_of_thought_or_answer(tokenizer, written, parts):
    speaker = Speaker.__new__(Speaker)
    speaker.template = through(tokenizer, REASONING)
    speaker._reasoning = Reasoning(tokenizer, speaker.template)
    tokens = tokenizer(written, add_special_tokens=False).input_ids
    assert speaker._parts(ROW, tokens, ("###",)) == parts


def test_a_template_knows_its_marks(tokenizer):
    assert through(tokenizer, REASONING).thinking == ("<think>", "</think>")
    assert through(tokenizer, BEGUN).thinking == ("<think>", "</think>")
    assert through(tokenizer, CHANNELS).thinking == (
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
    )
    assert get_template("chat", tokenizer).thinking is None


@pytest.mark.parametrize("template", [REASONING, CHANNELS, "alpaca"])
def test_options_that_are_thought_of_are_not_read(tokenizer, template):
    """A generated answer counts from behind the reasoning; without an end of that there is none."""
    template = through(tokenizer, template)
    begins, ends = template.thinking or ("<think>", "</think>")
    rows = tuple(TaskRow(number, ROW, "no", ("yes", "no")) for number in range(3))
    task = Task("ice", rows, "ice", AnswerRule("options"), 40, stop=("\n\n\n",))
    job = GenerationJob.__new__(GenerationJob)
    job.task, job._tokenizer = task, tokenizer
    job._reasoning, job._asked = Reasoning(tokenizer, template), [template.prompt(ROW)] * 3
    texts = [f"{begins}yes?\n\n\nyes{ends}no", f"{begins}yes, yes", "no"]
    job._generator = type(
        "Written",
        (),
        {
            "generate": lambda _, batch: [
                tokenizer(texts[at], add_special_tokens=False).input_ids for at in batch
            ]
        },
    )()
    found = job.run([0, 1, 2])
    assert [row["prediction"] for row in found] == ["no", None, "no"]
    assert found[0]["text"].endswith("no") and "yes?\n\n\nyes" in found[0]["text"]
