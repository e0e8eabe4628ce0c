"""A few training rows as the model saw them: which tokens, and which of them it learned to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.labelled import label_name
from linchain_cli.data.relocation import recipe_from_here
from linchain_cli.errors import InputError
from linchain_cli.model.files import find_base
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNDECODED = "\ufffd"


@dataclass(frozen=True)
class Sample:
    """One row: `pieces` are its tokens' texts in order, each with whether it is supervised; `label` is what a
    classification or regression learns to tell of it."""

    row: int
    tokens: int
    supervised: int
    pieces: tuple[tuple[str, bool], ...]
    label: str | None = None


def row_samples(run: RunDirectory, recipe: Recipe, count: int = 3, base: str | None = None) -> list[Sample]:
    """The first rows of a run's first optimizer step; `base` is where its base is now, None where it was.

    Raises:
        InputError: tokenizer or rows cannot be read any more, or the rows are not those of the run.
    """
    steps = read_jsonl(run.rows_path)
    if not steps:
        return []
    status = run.read_status()
    known = status.base_of(recipe.model.path, recipe.model.revision)
    tokenizer = load_tokenizer(find_base(known, named=base, near=run.path, weights=False).directory)
    classes = status.classes
    section = recipe_from_here(recipe, run).data
    data = prepare_data(section, tokenizer, task=recipe.task, classes=classes)
    if data.report.fingerprint != status.hashes.get("data"):
        raise InputError("the data are not the ones of the run any more")
    samples = []
    for row in steps[0]["rows"][:count]:
        ids, supervised = data.train[row]
        pieces = tuple(token_pieces(tokenizer, ids.tolist(), supervised.tolist()))
        label = None if classes is None else label_name(float(data.train.targets[row]), classes)
        samples.append(Sample(row, len(ids), int(supervised.sum()), pieces, label))
    return samples


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], supervised: Sequence[bool]
) -> list[tuple[str, bool]]:
    """(text, supervised) per token, in order; together the texts are what all tokens decode to.

    Tokens that hold only a part of a character's bytes are joined with the following ones of their kind.
    """
    pieces: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        last = end == len(ids) or supervised[end] != supervised[start]
        if UNDECODED not in text or last:
            pieces.append((text, bool(supervised[start])))
            start = end
    return pieces
