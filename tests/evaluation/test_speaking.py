"""Answers piece by piece: the same text as all at once, whatever of it was read before."""

from __future__ import annotations

import contextlib

import pytest
import torch

from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation import speaking
from linchain_cli.evaluation.jobs import before_stop
from linchain_cli.evaluation.speaking import Sampling, Speaker
from linchain_cli.model.limits import Limits
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer

from .conftest import END
from .test_generation import ours, prompts


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    eos_token_id = END

    def get_added_vocab(self):
        return {}

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


class Template:
    name = "numbers"
    thinking = None

    def prompt(self, row):
        return ""

    def end_marks(self):
        return []


@pytest.fixture
def speak(tiny_model, monkeypatch):
    """speak(architecture): a speaker whose rows are lists of tokens."""
    monkeypatch.setattr(speaking, "encode_prompt", lambda tokenizer, template, row, straddles: list(row))
    return lambda name: Speaker(tiny_model(name), Numbers(), Template())


def numbers(said):
    return [int(word) for word in said.text.split()]


@contextlib.contextmanager
def read_lengths(model):
    """The number of tokens of every forward pass."""
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mamba"])
def test_a_conversation_is_answered_as_if_it_were_read_anew(speak, tiny_model, name):
    """Gemma 2 has a window of 8 tokens, which no cache can be shortened behind; a Mamba's state cannot be
    gone on from with several tokens."""
    first, second, third = prompts(3)
    speaker, sampling = speak(name), Sampling(max_new_tokens=9)
    asked = list(first)
    for further in (second, third, third[:2]):
        said = numbers(speaker.say(asked, sampling))
        assert said == ours(tiny_model(name), [asked], 1, 9)[0]
        asked += [*said, *further]
    # Another conversation, which begins alike: all behind the beginning is forgotten.
    asked = [*first, 3, 4, 5]
    with read_lengths(speaker.model) as lengths:
        assert numbers(speaker.say(asked, sampling)) == ours(tiny_model(name), [asked], 1, 9)[0]
    lengths = lengths[: lengths.index(1)]
    assert (3 if name in ("llama", "bloom") else len(asked)) in lengths


def test_what_was_read_is_not_read_again(speak):
    first, second, _ = prompts(3)
    speaker = speak("llama")
    said = numbers(speaker.say(first, Sampling(max_new_tokens=6)))
    with read_lengths(speaker.model) as lengths:
        speaker.say([*first, *said, *second], Sampling(max_new_tokens=3))
    # The answer's last token was written and not read.
    assert lengths[-3:] == [len(second) + 1, 1, 1]


def test_an_answer_that_is_cut_off_spoils_no_later_one(speak, tiny_model):
    first, second, _ = prompts(3)
    speaker, shown = speak("llama"), []

    def interrupted(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speaker.say(first, Sampling(max_new_tokens=9), interrupted)
    asked = [*first, *second]
    assert (
        numbers(speaker.say(asked, Sampling(max_new_tokens=9))) == ours(tiny_model("llama"), [asked], 1, 9)[0]
    )


def test_drawn_answers(speak, tiny_model):
    """At a temperature of nearly zero, or from nearly none of the probability, it is the likeliest one."""
    speaker, asked = speak("llama"), prompts(1)[0]
    expected = ours(tiny_model("llama"), [asked], 1, 12)[0]
    for options in ({"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
        assert numbers(speaker.say(asked, Sampling(max_new_tokens=12, **options))) == expected
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=12, temperature=5.0)
    drawn = {tuple(numbers(speaker.say(asked, sampling))) for _ in range(5)}
    assert len(drawn) > 1 and not any(END in one for one in drawn)
    assert (
        numbers(speaker.say(asked, Sampling(max_new_tokens=12, beams=3)))
        == ours(tiny_model("llama"), [asked], 3, 12)[0]
    )


@pytest.mark.parametrize("options", [{"beams": 2, "temperature": 1.0}, {"top_p": 0.5}, {"stop": ("x", "")}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError):
        Sampling(**options)


def test_why_an_answer_ends(speak, monkeypatch):
    speaker, asked = speak("llama"), prompts(1)[0]
    whole = speaker.say(asked, Sampling(max_new_tokens=8))
    assert (whole.stop_reason, whole.tokens, whole.prompt_tokens) == ("length", 8, len(asked))
    third = whole.text.split()[2]
    cut = speaker.say(asked, Sampling(max_new_tokens=8, stop=[f" {third}"]))
    assert cut.stop_reason == "stop_text" and cut.text == whole.text.split(f" {third}")[0]
    assert cut.tokens <= 3
    speaker._ends = [int(third)]
    ended = speaker.say(asked, Sampling(max_new_tokens=8))
    assert (ended.stop_reason, ended.text) == ("end", cut.text)
    speaker._limits = Limits(10**6, len(asked) + 1, table=True)
    assert speaker.say(asked, Sampling(max_new_tokens=8)).tokens == 1
    with pytest.raises(InputError, match=f"{len(asked) + 2} tokens, and the model has {len(asked) + 1} pos"):
        speaker.say([*asked, 3], Sampling())
    speaker._limits = Limits(embeddings=5)
    monkeypatch.setattr(Numbers, "convert_ids_to_tokens", lambda self, token: "x", raising=False)
    with pytest.raises(InputError, match="the model's embeddings end at 4"):
        speaker.say([7], Sampling())


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("  two  words \n", ()),
        ("naïve, 蜡烛 🕯️!", ()),
        ("one STO STOP two", ("STOP",)),
        ("one STO", ("STOP",)),
        ("\nA: x\nB: y", ("\n",)),
        ("a\n\n", ("\n\nQ",)),
        ("", ("x",)),
    ],
)
def test_pieces_are_the_text_and_are_never_taken_back(text, stop):
    shown = []
    whole = speaking._Text(lambda tokens: bytes(tokens).decode(errors="replace"), stop, shown.append)
    for byte in text.encode():
        whole.add(byte)
    whole.close()
    assert "".join(shown) == whole.whole == before_stop(text, stop).strip()
    assert not any("\ufffd" in piece or not piece for piece in shown)
    if " " in whole.whole:
        assert len(shown) > 2


def test_a_prompt_that_the_template_cannot_write_is_wrong_input(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + (tokenizer.chat_template)
    )
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    speaker = Speaker(model, tokenizer, get_template("chat", tokenizer))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(InputError, match="template chat: .*no system"):
        speaker.say({"messages": messages}, Sampling())
    with pytest.raises(InputError, match="no text in UTF-8"):
        speaker.say({"messages": [{"role": "user", "content": "caf\udce9"}]}, Sampling())
