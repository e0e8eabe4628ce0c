"""Which attention a model computes with: one written for CPUs, and torch's own (SDPA) for GPUs.

On a CPU transformers' eager attention repeats keys and values for the query heads that share them, and goes
through the scores in float32; torch's SDPA takes still longer in its backward pass. `grouped_attention` takes
the query heads of one key head as more rows of one product (grouped-query attention, arXiv 2305.13245), and
leaves the softmax in the scores' type, whose kernel computes in float32 anyway. Forward and backward take
about half of eager's time, and a third of its memory is kept in between.

On a GPU SDPA has the fastest kernels, as long as it is given no mask. `FLAT_SDPA` is transformers' way of
calling it under a name of its own, by which a model is known to read rows without padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from linchain_cli.model.fast import REFUSALS, alike, probe_ids

GROUPED = "grouped"
FLAT_SDPA = "flat_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q·kᵀ + mask)·v, in the form that transformers' AttentionInterface asks for.

    Args:
        query: (batch, heads, queries, d). key, value: (batch, key heads, keys, d and d_v).
        attention_mask: what is added to the scores, broadcast to (batch, heads, queries, keys), or None.
        softcap: c of c·tanh(scores / c), before the mask (Gemma 2).

    Returns:
        (batch, queries, heads, d_v), contiguous, and None for the weights.
    """
    if any(others.get(name) is not None for name in ("s_aux", "sinks", "position_bias")):
        raise NotImplementedError("attention sinks and position biases")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    shared = heads // groups
    scaling = width**-0.5 if scaling is None else scaling
    scores = torch.matmul(
        (query * scaling).reshape(batch, groups, shared * queries, width), key.transpose(2, 3)
    )
    scores = scores.view(batch, heads, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, shared * queries, keys), value)
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


# model/flat_rows.py has them read flat rows, too.
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
AttentionInterface.register(FLAT_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(FLAT_SDPA, sdpa_mask)


def attention_window(model: nn.Module) -> float:
    """Tokens up to which the model's attention is plain: behind it a sliding window or a chunk ends."""
    config = model.config.get_text_config()
    limits = (
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size", "attention_window_size")
    )
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=float("inf"))


def may_group(model: PreTrainedModel) -> bool:
    """Whether nothing is known that speaks against another attention; `use_attention` finds out."""
    return model._can_set_attn_implementation() and not any(
        hasattr(module, "sinks") for module in model.modules()
    )


@torch.no_grad()
def use_attention(model: PreTrainedModel, name: str) -> bool:
    """Gives a model GROUPED or FLAT_SDPA attention, if it then gives the same answers as with its own.

    Returns:
        Whether it did. Architectures that bring an attention of their own, or something that is not in the
        formula, keep what they have.
    """
    if not may_group(model):
        return False
    ids, before = probe_ids(model, 1, 24), model.config._attn_implementation

    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    expected = logits()
    try:
        model.set_attn_implementation(name)
        same = alike(logits(), expected, model.dtype)
    except REFUSALS:
        same = False
    if not same:
        model.set_attn_implementation(before)
    return same
