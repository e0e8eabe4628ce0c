"""What a model can do with caches, masks and padding: tried out on a few tokens, for no list of architectures stays true.

Each function runs the model two or three times. A model that refuses does so in a way of its own, so any failure
means no; every caller has a slower way that needs nothing of the kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import torch

from linchain_cli.evaluation.options import OptionTree, additive, tree_mask
from linchain_cli.logits import last_logits

TEXT = (3, 5, 7, 11, 13, 17, 19, 23)
SPLIT = 4


def continues_from_cache(model) -> bool:
    """Whether a text read in two parts, with a cache spread over a batch in between, has the logits of the whole."""

    def attempt(device: torch.device) -> bool:
        text = torch.tensor([TEXT], device=device)
        at_once, _ = last_logits(model, text)
        _, cache = last_logits(model, text[:, :SPLIT])
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 2], device=device))
        in_parts, _ = last_logits(model, text[:, SPLIT:].repeat(2, 1), past_key_values=cache)
        return _alike(at_once[0], in_parts[1], model.dtype)

    return _try_out(model, attempt)


def reads_tree_masks(model) -> bool:
    """Whether a branch of a tree of tokens is read as if its siblings were not there.

    Two things are tried: other tokens in the first branch leave the second one's logits as they are to the last
    bit, and these are the logits of the second branch's plain text.
    """
    if not takes_positions(model):
        return False
    trunk, second = len(TEXT), (29, 31)

    def behind_second(device: torch.device, first: Sequence[int]) -> torch.Tensor:
        parents = (*range(-1, trunk - 1), trunk - 1, trunk, trunk - 1, trunk + 2)
        tree = OptionTree((*TEXT, *first, *second), parents, ())
        mask, positions = tree_mask([tree], 0, len(tree.tokens))
        inputs = {"attention_mask": additive(mask, model.dtype).to(device), "position_ids": positions.to(device)}
        return last_logits(model, torch.tensor([tree.tokens], device=device), **inputs)[0][0]

    def attempt(device: torch.device) -> bool:
        logits = behind_second(device, (37, 41))
        plain, _ = last_logits(model, torch.tensor([(*TEXT, *second)], device=device))
        return torch.equal(logits, behind_second(device, (43, 2))) and _alike(plain[0], logits, model.dtype)

    return _try_out(model, attempt)


def ignores_padding(model) -> bool:
    """Whether masked tokens, before the text or within it, change nothing."""

    def behind(device: torch.device, padding: Sequence[int], at: int) -> torch.Tensor:
        tokens = (*TEXT[:at], *padding, *TEXT[at:])
        mask = torch.ones(1, len(tokens), dtype=torch.long, device=device)
        mask[:, at : at + len(padding)] = 0
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions(model) else {}
        return last_logits(model, torch.tensor([tokens], device=device), attention_mask=mask, **positions)[0][0]

    def attempt(device: torch.device) -> bool:
        plain, _ = last_logits(model, torch.tensor([TEXT], device=device))
        for at in (0, SPLIT):
            padded = behind(device, (0, 0, 0), at)
            if not torch.equal(padded, behind(device, (29, 31, 37), at)) or not _alike(plain[0], padded, model.dtype):
                return False
        return True

    return _try_out(model, attempt)


def takes_positions(model) -> bool:
    """Whether the model can be told where a token stands."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _try_out(model, attempt: Callable[[torch.device], bool]) -> bool:
    try:
        with torch.inference_mode():
            return attempt(model.get_input_embeddings().weight.device)
    except Exception:
        return False


def _alike(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal up to what other kernels and other orders of summation change in this dtype."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    return bool((one.float() - other.float()).norm() <= tolerance * one.float().norm())
