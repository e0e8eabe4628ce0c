"""Prompts, byte by byte, and what is refused in patterns and rows."""

from __future__ import annotations

import pytest

from linchain_cli.data.rows import RowError
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

ROW = {
    "instruction": "Is it {so}?",
    "input": "a\nb",
    "output": "the correct answer is true",
    "answer": "true",
}

INDENT = " " * 16
LLM_ADAPTERS_WITH_INPUT = "\n".join(
    [
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. ",
        "",
        f"{INDENT}### Instruction:",
        f"{INDENT}Is it {{so}}?",
        INDENT,
        f"{INDENT}### Input:",
        f"{INDENT}a",
        "b",
        INDENT,
        f"{INDENT}### Response:",
        INDENT,
    ]
)
LLM_ADAPTERS_WITHOUT = "\n".join(
    [
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.  ",
        "",
        f"{INDENT}### Instruction:",
        f"{INDENT}Is it {{so}}?",
        INDENT,
        f"{INDENT}### Response:",
        INDENT,
    ]
)


@pytest.mark.parametrize(
    "name, with_input, without",
    [
        (
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a "
            "response that appropriately completes the request.\n\n### Instruction:\nIs it {so}?\n\n### "
            "Input:\na\nb\n\n"
            "### Response:\n",
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n"
            "### Instruction:\nIs it {so}?\n\n### Response:\n",
        ),
        ("llm-adapters", LLM_ADAPTERS_WITH_INPUT, LLM_ADAPTERS_WITHOUT),
        ("plain", "Is it {so}?\na\nb\n", "Is it {so}?\n"),
    ],
)
def test_prompts_byte_by_byte(name, with_input, without):
    template = get_template(name, None)
    assert template.prompt(ROW) == with_input
    assert template.prompt({**ROW, "input": ""}) == without
    assert template.prompt({"instruction": ROW["instruction"]}) == without
    (rendered,) = template.render(ROW)
    assert rendered.text == with_input + ROW["output"]
    assert rendered.spans == [(len(with_input), len(rendered.text))]
    assert rendered.ends


def test_the_paper_s_prompt_has_nothing_behind_its_first_line_but_blanks():
    template = get_template("llm-adapters", None)
    with_input, without = (template.prompt(row).split("\n")[0] for row in (ROW, {**ROW, "input": ""}))
    assert with_input.endswith("request. ") and not with_input.endswith("request.  ")
    assert without.endswith("request.  ") and not without.endswith("request.   ")


def test_a_template_of_ones_own():
    template = get_template(
        {"prompt": "Q: {question} {{x}}\nA:", "response": " {a}/{b}", "prompt_no_input": None}, None
    )
    row = {"question": "why?", "a": "1", "b": "2"}
    assert template.layouts[0].required == ("question", "a", "b")
    assert template.render(row)[0].text == "Q: why? {x}\nA: 1/2"
    assert template.complete(row, " 3").text == "Q: why? {x}\nA: 3"
    assert template.response({"question": "why?"}) is None
    assert template.frame == (" ", "")
    framed = get_template({"prompt": "{q}", "response": "<{{{a}}}>.", "prompt_no_input": None}, None)
    assert framed.frame == ("<{", "}>.") and framed.response({"a": "x"}) == "<{x}>."


def test_prompt_no_input_is_for_rows_without_the_columns_only_prompt_mentions():
    template = get_template({"prompt": "{q} [{hint}]", "prompt_no_input": "{q}", "response": "{a}"}, None)
    assert template.layouts[0].required == ("q", "a")
    assert template.layouts[0].optional == ("hint",)
    assert template.prompt({"q": "x", "a": "y"}) == "x"
    assert template.prompt({"q": "x", "hint": "", "a": "y"}) == "x"
    assert template.prompt({"q": "x", "hint": "h", "a": "y"}) == "x [h]"


def test_prompt_without_alternative_keeps_its_place_for_an_absent_optional_column():
    template = get_template({"prompt": "{a}{b}", "prompt_no_input": "{a}-", "response": "{c}"}, None)
    two = get_template({"prompt": "{a}{b}{d}", "prompt_no_input": "{a}-", "response": "{c}"}, None)
    assert template.prompt({"a": "1"}) == "1-"
    assert two.prompt({"a": "1", "b": "2"}) == "12"


@pytest.mark.parametrize(
    "pattern, key, said",
    [
        ({"prompt": "{instruction", "response": "{output}"}, "prompt", "expected '}'"),
        (
            {"prompt": "{instruction!r}", "response": "{output}"},
            "prompt",
            "'{instruction!r}' is no placeholder",
        ),
        ({"prompt": "{a.b}", "response": "{output}"}, "prompt", "'{a.b}' is no placeholder"),
        ({"prompt": "{0}", "response": "{output}"}, "prompt", "'{0}' is no placeholder"),
        ({"prompt": "{a:>10}", "response": "{output}"}, "prompt", "'{a:>10}' is no placeholder"),
        ({"prompt": "{a}", "response": "yes"}, "response", "same answer"),
        ({"prompt": "{a}", "response": "{b}", "prompt_no_input": "}"}, "prompt_no_input", "Single '}'"),
    ],
)
def test_a_pattern_with_anything_but_columns_is_refused(pattern, key, said):
    with pytest.raises(InputError, match=f"data.template.{key}.*{said}"):
        get_template(pattern, None)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'alpaca'"):
        get_template("alpacca", None)


@pytest.mark.parametrize("output", ["", " \n"])
def test_an_empty_answer_teaches_nothing(output):
    with pytest.raises(RowError, match="'output' is empty"):
        get_template("alpaca", None).render({**ROW, "output": output})


def test_fingerprints_differ_where_texts_differ():
    templates = [get_template(name, None) for name in ("alpaca", "llm-adapters", "plain")]
    templates += [
        get_template({"prompt": prompt, "response": response}, None)
        for prompt, response in [("{a}", "{b}"), ("{a} ", "{b}"), ("{a}", "{b} ")]
    ]
    assert len({template.fingerprint for template in templates}) == len(templates)
    assert templates[0].fingerprint == get_template("alpaca", None).fingerprint
