"""What the jobs hand to the model and read off it: lengths, end tokens, losses, examples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from linchain_cli.data.encoding import text_encoder
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.fewshot import with_examples
from linchain_cli.evaluation.jobs import Halving
from linchain_cli.evaluation.speaking import Sampling, Speaker
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer

from .conftest import naive_scores

QUESTIONS = ["What is 2 + 3?", "What is 4 + 4?", "What is 9 + 7?", "What is 1 + 6?"]
OPTIONS = ("in the kitchen", "in the kitchen by the window", "at the harbour")


@pytest.fixture
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


@pytest.fixture
def model(tiny_llama_dir):
    return load_model(tiny_llama_dir, dtype="float32", device="cpu")


def free_text_task(count=6, **fields):
    rows = tuple(
        TaskRow(
            number,
            {"instruction": f"Where is the horse {number}?", "input": ""},
            OPTIONS[number % 3],
            OPTIONS,
        )
        for number in range(count)
    )
    fields = {"rule": AnswerRule("options"), "max_new_tokens": 4, "prefix": "", "free_text": True, **fields}
    return Task("places", rows, "places", **fields)


def run(model, tokenizer, tasks, template="alpaca", **options):
    return evaluate(model, tokenizer, get_template(template, tokenizer), tasks, name="tiny", **options)


def test_scores_over_a_length_count_all_tokens_of_an_option(model, tokenizer):
    """Also those that the options have in common, which make no difference to a sum alone."""
    task, template = free_text_task(), get_template("alpaca", tokenizer)
    found = {way: run(model, tokenizer, [task], normalise=way) for way in ("none", "bytes", "tokens")}
    for row in task.rows:
        prompt = tokenizer(template.prompt(row.fields), add_special_tokens=False).input_ids
        texts = [
            tokenizer(template.prompt(row.fields) + option, add_special_tokens=False).input_ids
            for option in OPTIONS
        ]
        scores = naive_scores(model, [text + [2] for text in texts], len(prompt))
        lengths = {
            "none": [1, 1, 1],
            "bytes": [len(option.encode()) for option in OPTIONS],
            "tokens": [len(text) - len(prompt) for text in texts],
        }
        for way, results in found.items():
            shares = [score / length for score, length in zip(scores, lengths[way], strict=True)]
            prediction = results.predictions[row.index]
            assert list(prediction["scores"].values()) == pytest.approx(scores, abs=1e-4)
            assert prediction["prediction"] == OPTIONS[shares.index(max(shares))]
    assert list(found["none"].summary.tasks["places"].metrics) == ["bytes"]
    assert list(found["bytes"].summary.tasks["places"].metrics) == ["none"]
    assert (
        found["bytes"].summary.tasks["places"].accuracy
        == found["none"].summary.tasks["places"].metrics["bytes"].value
    )


def test_labels_have_one_column(model, tokenizer):
    results = run(model, tokenizer, [free_text_task(free_text=False)])
    assert results.summary.tasks["places"].metrics == {} and "readings" not in results.predictions[0]


@pytest.fixture(scope="module")
def chatty(tiny_llama_dir):
    """A tiny model that learned to close its turn with <|im_end|>, and a tokenizer whose end of sequence is
    another token: a base model that was trained on conversations."""
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.eos_token = "<|pad|>"
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    model.generation_config.eos_token_id = 0
    model.config.eos_token_id = 0
    template, encoder = get_template("chat", tokenizer), text_encoder(tokenizer)
    rows = [
        template.render({"instruction": question, "output": f"The answer is {eval(question[8:-1])}"})[0]
        for question in QUESTIONS
    ]
    encoded = encoder.encode(rows, adds_bos=False)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for one in encoded:
            ids = torch.tensor(one.input_ids[None].astype("int64"))
            labels = torch.where(torch.tensor(one.supervised), ids, -100)
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False), tokenizer


def test_an_answer_ends_where_training_ended_it(chatty):
    """It once went on behind <|im_end|>, to a number that nobody had asked for."""
    model, tokenizer = chatty
    rows = tuple(
        TaskRow(number, {"instruction": question, "input": ""}, str(eval(question[8:-1])))
        for number, question in enumerate(QUESTIONS)
    )
    task = Task("sums", rows, "sums", AnswerRule("number"), 24)
    results = run(model, tokenizer, [task], "chat", protocol="generate", beams=2)
    assert [row["text"] for row in results.predictions] == [f"The answer is {row.answer}" for row in rows]
    assert results.summary.tasks["sums"].accuracy == 1.0
    assert results.summary.tasks["sums"].metrics["flexible"].value == 1.0
    template = get_template("chat", tokenizer)
    speaker = Speaker(model, tokenizer, template)
    for temperature in (0.0, 0.01):
        said = speaker.say(rows[0].fields, Sampling(max_new_tokens=24, temperature=temperature))
        assert (said.text, said.stop_reason) == ("The answer is 5", "end")


def test_an_option_that_begins_another_is_closed_as_training_closed_it(chatty):
    model, tokenizer = chatty
    options = ("The answer is 5", "The answer is 5 and", "The answer is")
    row = TaskRow(0, {"instruction": QUESTIONS[0], "input": ""}, options[0], options)
    task = Task("closing", (row,), "closing", AnswerRule("options"), 8, prefix="")
    assert run(model, tokenizer, [task], "chat").predictions[0]["prediction"] == options[0]


def test_losses_are_those_that_transformers_computes(model, tokenizer):
    rows = tuple(
        TaskRow(
            number,
            {"instruction": f"Question {number}", "input": "", "output": "an answer " * (number + 1)},
            "",
        )
        for number in range(5)
    )
    task = Task("held-out", rows, "held-out", AnswerRule("loss"), 1)
    for protocol in ("likelihood", "generate"):
        results = run(model, tokenizer, [task], protocol=protocol, batch_tokens=200)
        total = tokens = 0.0
        for row, found in zip(rows, results.predictions, strict=True):
            one = text_encoder(tokenizer).encode(
                get_template("alpaca", tokenizer).render(row.fields), adds_bos=True
            )[0]
            ids = torch.tensor(one.input_ids[None].astype("int64"))
            labels = torch.where(torch.tensor(one.supervised), ids, -100)
            expected, count = model(input_ids=ids, labels=labels).loss.item(), int(one.supervised.sum())
            assert found["loss"] == pytest.approx(expected, abs=1e-5) and found["tokens"] == count
            total, tokens = total + expected * count, tokens + count
        metrics = results.summary.tasks["held-out"].metrics
        assert metrics["loss"].value == pytest.approx(total / tokens, abs=1e-5)
        assert metrics["perplexity"].value == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert results.summary.tasks["held-out"].accuracy is None and results.summary.average is None


def test_losses_are_of_rows_in_every_form_that_training_takes(chatty):
    model, tokenizer = chatty
    asked, said = {"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "It is 5"}
    forms = (
        {"messages": [asked, said]},
        {"messages": [{**asked, "content": [{"type": "text", "text": QUESTIONS[0]}]}, said]},
        {"conversations": [{"from": "human", "value": QUESTIONS[0]}, {"from": "gpt", "value": "It is 5"}]},
        {"prompt": [asked], "completion": [said]},
        {"instruction": QUESTIONS[0], "input": None, "output": "It is 5"},
    )
    rows = tuple(TaskRow(number, fields, "") for number, fields in enumerate(forms))
    task = Task("held-out", rows, "held-out", AnswerRule("loss"), 1)
    first, *others = run(model, tokenizer, [task], "chat").predictions
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], abs=1e-5) and other["tokens"] == first["tokens"]
    odd = replace(task, rows=(TaskRow(0, {"text": "a document"}, ""),))
    with pytest.raises(InputError, match="held-out, row 1: there is no column"):
        run(model, tokenizer, [odd], "chat")


def test_examples_stand_answered_in_front(tokenizer):
    shown = (TaskRow(0, {"instruction": "A?", "input": ""}, "yes", ("yes", "no")),)
    task = free_text_task(prefix="I say ", examples=shown)
    row = {"instruction": "B?", "input": ""}
    plain = with_examples(get_template("plain", tokenizer), task)
    assert plain.prompt(row) == "A?\nI say yes\n\nB?\n"
    completed = plain.complete(row, "I say no")
    assert completed.text == plain.prompt(row) + "I say no"
    assert [completed.text[start:end] for start, end in completed.spans] == ["I say no"]
    chat = with_examples(get_template("chat", tokenizer), task)
    assert chat.prompt(row) == (
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nI say yes<|im_end|>\n"
        "<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.complete(row, "no").text == chat.prompt(row) + "no"
    talk = {"messages": [{"role": "user", "content": "B?"}], "tools": [{"function": {"name": "f"}}]}
    with_tools = chat._conversation(talk)
    assert [turn["content"] for turn in with_tools["messages"]] == ["A?", "I say yes", "B?"]
    assert with_tools["tools"] == talk["tools"]
    assert plain.fingerprint != get_template("plain", tokenizer).fingerprint
    assert task.fingerprint != free_text_task(prefix="I say ").fingerprint


def test_answers_are_scored_as_the_template_was_trained_to_write_them(model, tokenizer):
    """The response pattern's own text stands in front of each option, and around each example's answer."""
    pattern = {"prompt": "Q: {instruction}\nA:", "response": " <{output}>", "prompt_no_input": None}
    template = get_template(pattern, tokenizer)
    shown = (TaskRow(0, {"instruction": "Where is the cat?"}, "in the hall", OPTIONS),)
    for examples, before in (((), ""), (shown, "Q: Where is the cat?\nA: <in the hall>\n\n")):
        task = free_text_task(count=2, examples=examples)
        found = run(model, tokenizer, [task], template=pattern, normalise="none").predictions
        for row, prediction in zip(task.rows, found, strict=True):
            texts = [before + template.render({**row.fields, "output": o})[0].text[:-1] for o in OPTIONS]
            tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            ended = [ids + [tokenizer.eos_token_id] for ids in tokens]  # one option begins another
            ours, wanted = list(prediction["scores"].values()), naive_scores(model, ended, 1)
            differences = [[one - scores[0] for one in scores] for scores in (ours, wanted)]
            assert differences[0] == pytest.approx(differences[1], abs=1e-4)


def test_an_answer_ends_before_a_stop_string(model, tokenizer):
    row = TaskRow(0, {"instruction": "Where is the horse?", "input": ""}, "x")
    texts = []
    for stop in ((), None):
        stop = (texts[0][3:5],) if stop is None else stop
        task = Task("free", (row,), "free", AnswerRule("pattern", "x"), 12, stop=stop)
        texts.append(run(model, tokenizer, [task], protocol="generate", beams=1).predictions[0]["text"])
    assert texts[1] == texts[0][:3]


def test_batches_behind_one_that_did_not_fit_are_run_in_parts_at_once():
    """They are as large, and a GPU would compute each of them up to where it fails."""
    tried = []

    def run(part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(part)

    halving = Halving()
    for batch in (range(10), range(12), range(3), range(1)):
        assert halving.run(run, batch) == list(batch)
    assert tried == [10, 5, 3, 3, 3, 1, 3, 3, 3, 3, 1, 1, 1, 1]
