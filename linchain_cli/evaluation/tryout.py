"""What a model can do with caches, masks and padding, tried out on a few tokens: no list stays true.

Each function runs the model two or three times, and remembers for the next task what came out. A model that
refuses does so in a way of its own, so any failure means no, but for a lack of memory; every caller has a
slower way that needs nothing of the kind.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from linchain_cli.errors import LinchainError
from linchain_cli.evaluation.options import OptionTree, additive, tree_mask
from linchain_cli.machine import is_out_of_memory
from linchain_cli.model.fast import alike, record
from linchain_cli.model.logits import last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = (3, 5, 7, 11, 13, 17, 19, 23)
OTHER = (31, 29, 2, 37, 43, 41, 23, 19)
SPLIT = 4


def refuse_broken(model: PreTrainedModel) -> None:
    """Raises LinchainError for a model that computes NaN or infinities: no result of it means anything."""
    with torch.inference_mode():
        logits, _ = last_logits(
            model, torch.tensor([TEXT], device=model.get_input_embeddings().weight.device)
        )
    if not logits.isfinite().all():
        raise LinchainError(
            "the model's logits are not finite numbers: its weights are damaged or its precision is too low"
        )


def _remembered(trial: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """`trial`, made once per model and attention."""

    @functools.wraps(trial)
    def once(model: PreTrainedModel) -> bool:
        found = record(model).setdefault("tryouts", {})
        key = (trial.__name__, model.config._attn_implementation)
        if key not in found:
            found[key] = trial(model)
        return found[key]

    return once


@_remembered
def continues_from_cache(model: PreTrainedModel) -> bool:
    """Whether texts read in two parts, their caches copied and reordered, have the logits of the whole."""

    def attempt(device: torch.device) -> bool:
        texts = torch.tensor([TEXT, OTHER], device=device)
        whole, _ = last_logits(model, texts)
        _, one = last_logits(model, texts[1:, :SPLIT])
        one = copy.deepcopy(one)
        one.batch_repeat_interleave(2)
        repeated, _ = last_logits(model, texts[[1, 1], SPLIT:], one)
        _, both = last_logits(model, texts[:, :SPLIT])
        order = torch.tensor([1, 0, 1], device=device)
        both.batch_select_indices(order)
        reordered, _ = last_logits(model, texts[order, SPLIT:], both)
        return _alike(whole[[1, 1]], repeated, model.dtype) and _alike(whole[order], reordered, model.dtype)

    return _try_out(model, attempt)


@_remembered
def reads_tree_masks(model: PreTrainedModel) -> bool:
    """Whether a branch of a tree of tokens is read as if its siblings were not there.

    Whatever tokens stand in the first branch, the second one's logits are those of its plain text.
    """
    if not takes_positions(model):
        return False
    trunk, second = len(TEXT), (29, 31)

    def behind_second(device: torch.device, first: Sequence[int]) -> torch.Tensor:
        parents = (*range(-1, trunk - 1), trunk - 1, trunk, trunk - 1, trunk + 2)
        tree = OptionTree((*TEXT, *first, *second), parents, ())
        mask, positions = tree_mask([tree], 0, len(tree.tokens))
        inputs = {
            "attention_mask": additive(mask, model.dtype).to(device),
            "position_ids": positions.to(device),
        }
        return last_logits(model, torch.tensor([tree.tokens], device=device), **inputs)[0][0]

    def attempt(device: torch.device) -> bool:
        plain, _ = last_logits(model, torch.tensor([(*TEXT, *second)], device=device))
        beside = [behind_second(device, first) for first in ((37, 41), (43, 2))]
        return all(_alike(plain[0], logits, model.dtype) for logits in beside)

    return _try_out(model, attempt)


@_remembered
def ignores_padding(model: PreTrainedModel) -> bool:
    """Whether masked tokens in front of a text change nothing."""

    def behind(device: torch.device, padding: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([(*padding, *TEXT)], device=device)
        mask = torch.ones_like(tokens)
        mask[:, : len(padding)] = 0
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions(model) else {}
        return last_logits(model, tokens, attention_mask=mask, **positions)[0][0]

    def attempt(device: torch.device) -> bool:
        plain, _ = last_logits(model, torch.tensor([TEXT], device=device))
        padded = [behind(device, padding) for padding in ((0, 0, 0), (29, 31, 37))]
        return all(_alike(plain[0], logits, model.dtype) for logits in padded)

    return _try_out(model, attempt)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model can be told where a token stands."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _try_out(model: PreTrainedModel, attempt: Callable[[torch.device], bool]) -> bool:
    try:
        with torch.inference_mode():
            return attempt(model.get_input_embeddings().weight.device)
    except Exception as error:
        if is_out_of_memory(error):  # which says nothing of the model
            raise
        return False


def _alike(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Logits of few tokens are compared as they are, and in half precision differ more than hidden states."""
    return alike(other, one, dtype, whole=True, slack=5.0)
