"""A row's options as one tree of tokens, so that one forward pass scores all of them.

Every option is tokenised as a whole text (prompt, answer prefix, option), exactly as training would tokenise
it: nothing is assumed about where a token ends. What the token sequences begin with in common is read once;
behind it they branch. The last token of an option is only predicted, never read, so options that differ in
their last token alone need no token beyond the common ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from linchain_cli.data.encoding import common_prefix


@dataclass(frozen=True)
class OptionTree:
    """Token `i` follows token `parents[i]` (-1: nothing).

    An option's score is the sum, over its steps (position, token), of the log-probability of `token` behind
    the token at `position`.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    options: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def is_path(self) -> bool:
        """Whether the tokens are one plain sequence, which needs no mask but the causal one."""
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    @property
    def reads(self) -> list[int]:
        """The positions whose next token is predicted, ascending."""
        return sorted({at for steps in self.options for at, _ in steps})

    @property
    def first_read(self) -> int:
        """The position behind which the options begin to differ."""
        return min(steps[0][0] for steps in self.options)

    @property
    def depths(self) -> list[int]:
        """The position of each token in the texts it belongs to."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def paths(self) -> list[tuple[OptionTree, list[int]]]:
        """The tree as plain sequences, for models without tree masks, each with the options it scores."""
        by_end: dict[int, list[int]] = {}
        for number, steps in enumerate(self.options):
            by_end.setdefault(steps[-1][0], []).append(number)
        return [(self._path(end, numbers), numbers) for end, numbers in by_end.items()]

    def _path(self, end: int, numbers: Sequence[int]) -> OptionTree:
        indices = []
        while end >= 0:
            indices.append(end)
            end = self.parents[end]
        indices.reverse()
        place = {index: position for position, index in enumerate(indices)}
        options = tuple(tuple((place[at], token) for at, token in self.options[number]) for number in numbers)
        return OptionTree(
            tuple(self.tokens[index] for index in indices), tuple(range(-1, len(indices) - 1)), options
        )


class _GrowingTree:
    """Tokens behind tokens; those of `stem` follow each other."""

    def __init__(self, stem: Sequence[int] = ()):
        self._tokens, self._parents = list(stem), list(range(-1, len(stem) - 1))
        self._children: dict[tuple[int, int], int] = {}

    def follow(self, at: int, token: int) -> int:
        """Where `token` behind `at` is; it is put there if it was not."""
        if (at, token) not in self._children:
            self._children[at, token] = len(self._tokens)
            self._tokens.append(token)
            self._parents.append(at)
        return self._children[at, token]

    def grown(self, options: Sequence[tuple[tuple[int, int], ...]]) -> OptionTree:
        return OptionTree(tuple(self._tokens), tuple(self._parents), tuple(options))


def build_tree(
    sequences: Sequence[Sequence[int]], end_token: int | None = None, start: int | None = None
) -> OptionTree:
    """The tree of a row's options, given the tokens of each option's whole text.

    An option's steps begin where the sequences begin to differ, or at `start`, if that comes before: what all
    of them have in common makes no difference to a sum of log-probabilities, but to one over a length.

    Where one option's tokens are the beginning of another's, the shorter would win always; in such a row
    every option is scored with `end_token` behind it.

    Raises:
        ValueError: two options have the same tokens, one begins another and there is no end token, or the
            texts begin with no common token (nothing to condition on).
    """
    sequences = [tuple(sequence) for sequence in sequences]
    if len(set(sequences)) < len(sequences):
        raise ValueError("two of its options have the same tokens")
    if any(_begins(one, other) for one in sequences for other in sequences if one is not other):
        if end_token is None:
            raise ValueError("one of its options begins another, and the tokenizer has no end-of-text token")
        sequences = [(*sequence, end_token) for sequence in sequences]
    shared = common_prefix(sequences)
    if start is not None:
        shared = min(shared, start)
    if shared == 0:
        raise ValueError("its prompt is empty: there is no token to condition on")
    tree = _GrowingTree(sequences[0][:shared])
    options = []
    for sequence in sequences:
        at, steps = shared - 1, []
        for token in sequence[shared:-1]:
            steps.append((at, token))
            at = tree.follow(at, token)
        options.append((*steps, (at, sequence[-1])))
    return tree.grown(options)


def loss_tree(rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> OptionTree:
    """The tree of texts (tokens, and which of them are supervised); an option is what one of them supervises.

    Raises:
        ValueError: a text has no supervised token.
    """
    tree, options = _GrowingTree(), []
    for sequence, supervised in rows:
        at, steps = -1, []
        for position, (token, counts) in enumerate(zip(sequence, supervised, strict=True)):
            if counts and at >= 0:
                steps.append((at, token))
            if position == len(sequence) - 1:
                break  # only predicted
            at = tree.follow(at, token)
        if not steps:
            raise ValueError("no token of its answer is supervised")
        options.append(tuple(steps))
    return tree.grown(options)


def _begins(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) < len(other) and other[: len(one)] == one


def tree_mask(trees: Sequence[OptionTree], start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Who sees whom: boolean (batch, 1, length - start, length), and positions (batch, length - start).

    A token sees itself and what it follows, over any number of branches. Padding sees itself alone.
    """
    # A large batch has thousands of tokens, most of them in stems, whose part of the mask is a triangle.
    masks, positions = np.zeros((len(trees), length, length), dtype=bool), []
    for tree, mask in zip(trees, masks, strict=True):
        parents, depths = tree.parents, tree.depths
        stem = next((at for at, parent in enumerate(parents) if parent != at - 1), len(parents))
        mask[:stem, :stem] = np.tri(stem, dtype=bool)
        np.fill_diagonal(mask, True)
        for index in range(stem, len(parents)):
            if parents[index] >= 0:
                mask[index] |= mask[parents[index]]
        positions.append(torch.tensor(depths[start:] + [0] * (length - len(depths))))
    return torch.from_numpy(masks[:, None, start:]), torch.stack(positions)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as the numbers that attention adds, whatever its implementation."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
