"""Scores of answer options: the log-probability of each option's tokens behind the prompt.

A score is the sum over the option's tokens, without normalisation by length: the probability that the model
would go on with exactly this option. Rows are sorted by length and batched by token count, padded on the
right (behind everything a causal model reads, so padding cannot change a score), and begin with a cache of
the keys and values that all rows of a task have in common.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from linchain_cli.data.encoding import common_prefix
from linchain_cli.evaluation.options import OptionTree, additive, tree_mask
from linchain_cli.evaluation.tryout import continues_from_cache, reads_tree_masks
from linchain_cli.model.attention import attention_window
from linchain_cli.model.flat_rows import in_one_copy
from linchain_cli.model.logits import last_logits, logits_at, with_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_PREFIX = 4
BATCH_COST = 1 / 16  # the launch of a batch in tokens, as a share of what one may hold
PAD = 0
_NORMED_AT_ONCE = 256  # rows of logits


def plan_batches(
    lengths: Sequence[int], max_tokens: int, copies: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices cut into batches of like length, longest first, of at most `max_tokens` tokens with padding (or
    one index that is longer).

    `copies` says how many sequences of that length an index stands for (default 1). Of all ways to cut the
    sorted indices this one computes the fewest tokens, padding included, where a batch by itself costs
    `BATCH_COST` of `max_tokens`. It depends on these numbers alone, so every process, and an evaluation that
    is continued, makes the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    longest = np.array([max(lengths[index], 1) for index in order])
    before = np.cumsum([0] + [copies[index] if copies else 1 for index in order])
    # Of the first `end` indices: what the best way costs, and where its last batch starts.
    costs, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    first = 0
    for end in range(1, len(order) + 1):
        while first < end - 1 and (before[end] - before[first]) * longest[first] > max_tokens:
            first += 1
        tokens = (before[end] - before[first:end]) * longest[first:end]
        totals = costs[first:end] + tokens + BATCH_COST * max_tokens
        starts[end] = first + int(np.argmin(totals))
        costs[end] = totals.min()
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


class OptionScorer:
    """Scores the rows of one task, with the masks and caches that the model turns out to support."""

    def __init__(self, model: PreTrainedModel, trees: Sequence[OptionTree], max_tokens: int):
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.prefix = self._prefix_length(trees)
        packed = any(not tree.is_path for tree in trees) and self._reads_tree_masks(trees)
        whole = [packed or tree.is_path for tree in trees]
        # One sequence per row, or one per path where the model cannot read a branching one.
        self.sequences = [
            [(tree, list(range(len(tree.options))))] if is_whole else tree.paths()
            for tree, is_whole in zip(trees, whole, strict=True)
        ]
        lengths = [max(len(tree.tokens) for tree, _ in row) - self.prefix for row in self.sequences]
        self.batches = plan_batches(lengths, max_tokens, [len(row) for row in self.sequences])
        self._prefix_cache: Any = None
        self._first = trees[0]

    def _prefix_length(self, trees: Sequence[OptionTree]) -> int:
        """How many tokens all rows share, leaving each the token behind which its options begin."""
        if len(trees) < 2:
            return 0
        shared = common_prefix([tree.tokens for tree in trees])
        shared = min(shared, *(tree.first_read for tree in trees))
        return shared if shared >= MIN_PREFIX and continues_from_cache(self.model) else 0

    def _reads_tree_masks(self, trees: Sequence[OptionTree]) -> bool:
        longest = max(len(tree.tokens) for tree in trees)
        return longest <= attention_window(self.model) and reads_tree_masks(self.model)

    @torch.inference_mode()
    def scores(self, batch: Sequence[int]) -> list[list[float]]:
        """For each row of one of `self.batches`, the log-probability of each option, in the row's order."""
        trees = [tree for row in batch for tree, _ in self.sequences[row]]
        inputs = self._inputs(trees)
        positions = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        place: dict[tuple[int, int], int] = {}
        for number, tree in enumerate(trees):
            for at in tree.reads:
                positions[number, at - self.prefix] = True
                place[number, at] = len(place)
        steps = torch.tensor(
            [
                (place[number, at], token)
                for number, tree in enumerate(trees)
                for option in tree.options
                for at, token in option
            ]
        )
        sent = in_one_copy({"inputs": inputs, "steps": steps}, self.device)
        prefix = self._prefix_inputs(len(trees))
        with logits_at(self.model, positions, float32=True):
            logits = self.model(**sent["inputs"], **prefix).logits
        log_probs = _log_probabilities(logits[0])
        where, tokens = sent["steps"].T
        # The batch's only meeting of host and device.
        values = iter(log_probs[where, tokens].double().tolist())
        result = []
        for row in batch:
            scores = {
                number: sum(next(values) for _ in option)
                for tree, numbers in self.sequences[row]
                for number, option in zip(numbers, tree.options, strict=True)
            }
            result.append([scores[number] for number in sorted(scores)])
        return result

    def _inputs(self, trees: Sequence[OptionTree]) -> dict[str, torch.Tensor]:
        """Tokens behind the cached prefix, padded on the right; mask and positions where a tree branches. All
        on the CPU."""
        prefix, rows = self.prefix, len(trees)
        longest = max(len(tree.tokens) for tree in trees) - prefix
        input_ids = torch.full((rows, longest), PAD)
        for row, tree in enumerate(trees):
            input_ids[row, : len(tree.tokens) - prefix] = torch.tensor(tree.tokens[prefix:])
        inputs = {"input_ids": input_ids}
        if any(not tree.is_path for tree in trees):
            mask, positions = tree_mask(trees, prefix, prefix + longest)
            inputs["attention_mask"] = additive(mask, self.model.dtype)
            inputs["position_ids"] = positions
        return inputs

    def _prefix_inputs(self, rows: int) -> dict[str, Any]:
        """What tells the model of the cached prefix, of which each of so many rows gets a copy."""
        if not self.prefix:
            return {"use_cache": False}
        cache = copy.deepcopy(self._cache())
        cache.batch_repeat_interleave(rows)
        return {"use_cache": True, **with_cache(cache)}

    def _cache(self) -> Any:
        """Keys and values of the tokens that all rows begin with, (1, heads, prefix, d) per layer."""
        if self._prefix_cache is None:
            tokens = torch.tensor([self._first.tokens[: self.prefix]], device=self.device)
            _, self._prefix_cache = last_logits(self.model, tokens)
        return self._prefix_cache


def _log_probabilities(logits_nV: torch.Tensor) -> torch.Tensor:
    """In float32, in the memory of logits that are in it: those of a batch of long texts are gigabytes."""
    logits_nV = logits_nV.float()
    for part in logits_nV.split(_NORMED_AT_ONCE):
        part.copy_(torch.log_softmax(part, dim=-1))
    return logits_nV
