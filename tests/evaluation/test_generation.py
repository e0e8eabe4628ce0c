"""Beam search, held to transformers' own, one prompt at a time without padding."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import GenerationConfig

from linchain_cli.evaluation.generation import BeamSearch, Generator, stop_tokens

from .conftest import ARCHITECTURES, END, VOCABULARY


class Tokenizer:
    eos_token_id = END

    def get_added_vocab():
        return {"<end>": 7, "<|other|>": 9}


class Template:
    def end_marks():
        return ["<end>"]


def prompts(n=10, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(4, 25))] for _ in range(n)]


def ours(model, asked, beams, new, batch_tokens=10_000):
    generator = Generator(model, [END], asked, beams, new, batch_tokens)
    return {
        index: answer
        for batch in generator.batches
        for index, answer in zip(batch, generator.generate(batch), strict=True)
    }


def theirs(model, prompt, beams, new):
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        num_beams=beams, max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END
    )
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()
    return found[: found.index(END)] if END in found else found


@pytest.fixture
def eager_to_end(tiny_model):
    """A Llama whose end token is likely, so that rows finish at different steps."""
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight[END] *= 2.0
    yield model
    with torch.no_grad():
        head.weight.copy_(before)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("beams", [1, 4])
def test_answers_are_those_of_transformers(tiny_model, name, beams):
    model, asked = tiny_model(name), prompts(5)
    found = ours(model, asked, beams, 8)
    assert [found[index] for index in range(len(asked))] == [
        theirs(model, prompt, beams, 8) for prompt in asked
    ]


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 3, 20])
def test_rows_that_finish_early_are_those_of_transformers(eager_to_end, beams, new):
    asked = prompts(12, seed=beams)
    expected = [theirs(eager_to_end, prompt, beams, new) for prompt in asked]
    found = ours(eager_to_end, asked, beams, new)
    assert [found[index] for index in range(len(asked))] == expected
    if new == 20:
        assert len({len(answer) for answer in expected}) > 3


@pytest.mark.parametrize("batch_tokens", [1, 10, 10_000])
def test_neither_batch_size_nor_order_changes_an_answer(eager_to_end, batch_tokens):
    asked = prompts(12)
    expected = ours(eager_to_end, asked, 4, 12)
    order = random.Random(batch_tokens).sample(range(12), 12)
    found = ours(eager_to_end, [asked[index] for index in order], 4, 12, batch_tokens)
    assert [found[place] for place in range(12)] == [expected[index] for index in order]


def test_finished_rows_leave_the_batch_and_prompts_are_read_once(eager_to_end):
    asked, sizes = prompts(12), []
    handle = eager_to_end.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generator = Generator(eager_to_end, [END], asked, 3, 20, 10_000)
    sizes.clear()
    generator.generate(generator.batches[0])
    handle.remove()
    assert sizes[0] == (12, max(map(len, asked)))  # not once per beam
    running = [rows for rows, _ in sizes[1:]]
    assert running[0] == 36 and running == sorted(running, reverse=True) and running[-1] < 12
    assert all(length == 1 for _, length in sizes[1:])


def test_every_end_token_of_model_tokenizer_and_template_ends_an_answer(tiny_model):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [END, 11]
    try:
        assert stop_tokens(model, Tokenizer, Template) == [END, 7, 11]
    finally:
        model.generation_config.eos_token_id = END


def test_settings_of_the_model_do_not_change_what_was_asked_for(tiny_model):
    """transformers fills in what a checkpoint's generation_config.json has; our own search never asks it."""
    model, asked = tiny_model("mamba"), prompts(2)
    expected = ours(model, asked, 1, 8)
    before = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=9.0, eos_token_id=END)
    try:
        assert ours(model, asked, 1, 8) == expected
        assert model.generation_config.repetition_penalty == 9.0
        assert theirs(model, asked[0], 1, 8) != expected[0]
    finally:
        model.generation_config = before


def test_the_search_itself_on_written_probabilities():
    """Two beams over four tokens, token 3 ends. Worked out by hand."""
    search = BeamSearch(1, 2, 3, [3], torch.device("cpu"))
    parents, tokens = search.advance(torch.tensor([[0.5, 0.3, 0.0, 0.2]]).log())
    assert (parents.tolist(), tokens.tolist()) == ([0, 0], [0, 1])
    # After 0 the end is sure (0.5), after 1 token 2 (0.3): one answer is finished, one beam goes on.
    parents, tokens = search.advance(torch.tensor([[0.01, 0.01, 0.01, 0.97], [0.01, 0.01, 0.97, 0.01]]).log())
    assert (parents.tolist()[0], tokens.tolist()[0]) == (1, 2)
    assert search.answers() == [[0, 3]]
    assert search.advance(torch.tensor([[0.01, 0.01, 0.01, 0.97], [0.25] * 4]).log()) == (None, None)
    # log(0.485) / 2 = -0.36 stands against log(0.282) / 3 = -0.42.
    assert search.answers() == [[0, 3]]
