"""The prompts whose logits are compared: the first rows that a run trained on, or a few sentences where there
are none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from linchain_cli.data.dataset import longest_row, prepare_data
from linchain_cli.data.encoding import encode_prompt
from linchain_cli.data.formats import load_rows
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.recipe.data import DataConfig

NUMBER = 8

SENTENCES = (
    "The kettle began to whistle, so she",
    "Two plus two equals",
    "Question: Is the sea salty? Answer:",
    "def mean(values):\n    return",
    "In the north the winters are long, and",
    "Please list three colours:",
    "A ladder is used to",
    "Yesterday it rained; today",
)


def run_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the first rows' prompts, at most `data.max_length` of them each.

    Raises:
        InputError: the data of the recipe is no longer where it was, or cannot be read.
    """
    prompts: list[list[int]] = []
    for source in data.sources:
        template = get_template(source.template, tokenizer, data.chat, data.turns)
        rows = load_rows(source, template)
        prompts += [encode_prompt(tokenizer, template, row) for row in islice(rows, NUMBER - len(prompts))]
        if len(prompts) == NUMBER:
            break
    return [prompt[-longest_row(data, tokenizer) :] for prompt in prompts if prompt]


def label_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str]
) -> list[list[int]]:
    """Token ids of the first labelled rows, or of a few sentences where the rows are gone."""
    first = data.train[0].model_copy(update={"max_rows": NUMBER})
    section = data.model_copy(update={"train": [first], "validation": 0})
    task = "classification" if classes else "regression"
    try:
        rows = prepare_data(section, tokenizer, task=task, classes=classes).train
    except InputError:
        return plain_prompts(tokenizer)
    return [rows[number][0].tolist() for number in range(len(rows))]


def plain_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few English sentences, where no rows of a run are at hand."""
    return [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
