"""What a model is given of a conversation."""

from __future__ import annotations

import pytest

from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.dialogue import Dialogue
from linchain_cli.evaluation.speaking import Said, Sampling
from linchain_cli.model.tokenizer import load_tokenizer


class Speaker:
    """Answers with a number, and notes what it was asked."""

    def __init__(self, template):
        self.template, self.rows, self.interrupted, self.parts = template, [], False, None

    def say(self, row, sampling, show):
        self.rows.append(row)
        answer = f"answer {len(self.rows)}"
        show(answer[:6])
        if self.interrupted:
            raise KeyboardInterrupt
        show(answer[6:])
        return Said(answer, "end", 1, 2, self.parts)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


def test_a_chat_template_is_given_all_that_was_said(tokenizer):
    speaker = Speaker(get_template("chat", tokenizer))
    dialogue = Dialogue(speaker, system="Be brief.")
    assert dialogue.ask("one?", Sampling()).text == "answer 1"
    dialogue.ask("two?", Sampling())
    assert speaker.template.prompt(speaker.rows[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\nanswer 1<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    dialogue.begin()
    dialogue.ask("three?", Sampling())
    assert [one["role"] for one in speaker.rows[2]["messages"]] == ["system", "user"]
    dialogue.begin("Be long.")
    dialogue.ask("four?", Sampling())
    assert speaker.rows[3]["messages"][0]["content"] == "Be long."


def test_of_an_answer_that_is_stopped_what_was_shown_counts(tokenizer):
    speaker = Speaker(get_template("chat", tokenizer))
    dialogue = Dialogue(speaker)
    speaker.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        dialogue.ask("one?", Sampling())
    assert [one["content"] for one in dialogue.messages] == ["one?", "answer"]


def test_reasoning_is_handed_on_as_what_it_is(tokenizer):
    speaker = Speaker(get_template("chat", tokenizer))
    dialogue = Dialogue(speaker)
    speaker.parts = ("I count.", "2")
    assert dialogue.ask("1 + 1?", Sampling()).text == "answer 1"
    assert dialogue.messages[1] == {"role": "assistant", "content": "2", "reasoning_content": "I count."}
    speaker.parts = ("", "3")
    dialogue.ask("1 + 2?", Sampling())
    assert dialogue.messages[3] == {"role": "assistant", "content": "3"}
    speaker.parts = ("I count and", None)  # cut off
    cut = dialogue.ask("1 + 3?", Sampling()).text
    assert dialogue.messages[5] == {"role": "assistant", "content": cut}


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("alpaca", {"instruction": "why?", "input": ""}),
        ("plain", {"instruction": "why?", "input": ""}),
        ("text", {"text": "why?"}),
        ("prompt-completion", {"prompt": "why?"}),
        ({"prompt": "Q: {q}\nA:", "response": " {a}"}, {"q": "why?"}),
        (
            {"prompt": "{instruction}\n{context}\n", "prompt_no_input": "{instruction}\n", "response": "{a}"},
            {"instruction": "why?", "input": ""},
        ),
    ],
    ids=["alpaca", "plain", "text", "prompt-completion", "own", "own-optional"],
)
def test_other_templates_ask_each_question_by_itself(tokenizer, template, row):
    speaker = Speaker(get_template(template, tokenizer))
    dialogue = Dialogue(speaker)
    dialogue.ask("before?", Sampling())
    dialogue.ask("why?", Sampling())
    assert speaker.rows[1] == row and "why?" in speaker.template.prompt(row)
    with pytest.raises(InputError, match="no place for a system prompt"):
        dialogue.begin("Be brief.")
    with pytest.raises(InputError, match="no place for a system prompt"):
        Dialogue(speaker, "Be brief.")


def test_a_template_of_several_columns_cannot_be_talked_with(tokenizer):
    speaker = Speaker(get_template({"prompt": "{topic} {who}\n", "response": "{a}"}, tokenizer))
    with pytest.raises(InputError, match="--column topic=VALUE --column who=VALUE"):
        Dialogue(speaker).ask("why?", Sampling())
