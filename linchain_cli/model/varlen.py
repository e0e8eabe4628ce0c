"""Attention over sequences of several lengths, one behind the other in one tensor.

`flash` is torch's kernel for it (FlashAttention-2, arXiv 2307.08691: GPUs, half precision), `reference` the
formula, which stands in for it on CPUs and is what `agrees` holds a kernel to.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from linchain_cli.model.attention import Reach
from linchain_cli.model.fast import GRADIENT_SLACK, REFUSALS, alike


@dataclass(frozen=True)
class Cut:
    """Where sequences begin and end among their queries and among their keys.

    `queries` and `keys` (sequences + 1,) int32 hold the ends of the sequences, beginning with 0; none is
    empty. `most_queries` and `most_keys` are those of the longest one. A sequence's queries are its last
    tokens, its keys all of them.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    def to(self, device: torch.device) -> Cut:
        return replace(self, queries=self.queries.to(device), keys=self.keys.to(device))


class Kernel(Protocol):
    """Attention of queries (queries, heads, d) to keys and values (keys, key heads, d), causal, within each
    sequence and `window`; as many heads each share a key head. Returns (queries, heads, d)."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cut: Cut, scaling: float, window: int | None
    ) -> Tensor: ...


def reference(
    query: Tensor, key: Tensor, value: Tensor, cut: Cut, scaling: float, window: int | None
) -> Tensor:
    """softmax(scaling · q·kᵀ)·v of each sequence, with the scores in the inputs' type."""
    shared = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(shared, 1) for states in (key, value))
    queries, keys = (ends.diff().tolist() for ends in (cut.queries, cut.keys))
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        q, k, v = (states.transpose(0, 1) for states in (q, k, v))
        places = torch.arange(k.shape[1], device=k.device)
        seen = Reach(window).sees(places[-q.shape[1] :, None], places)
        scores = (scaling * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def flash(query: Tensor, key: Tensor, value: Tensor, cut: Cut, scaling: float, window: int | None) -> Tensor:
    """torch's kernel: GPUs that FlashAttention was written for, float16 and bfloat16, d of at most 256."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 lets query heads share key heads unasked.
    shares = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query,
        key,
        value,
        cut.queries,
        cut.keys,
        cut.most_queries,
        cut.most_keys,
        scale=scaling,
        # How many keys before the query's own place it sees, all of them being -1, and how many behind it.
        window_size=(-1 if window is None else window - 1, 0),
        **shares,
    )


def agrees(kernel: Kernel, heads: tuple[int, int, int], like: Tensor) -> bool:
    """Whether a kernel gives the reference's output and gradients, with and without a window, and where the
    queries are a sequence's last tokens alone.

    Args:
        heads: how many there are, how many of keys, and their d.
        like: a tensor of the device and type in question.
    """
    count, key_heads, width = heads
    generator = torch.Generator().manual_seed(0)
    cut = Cut(*(torch.tensor(ends, dtype=torch.int32) for ends in ((0, 5, 12, 13), (0, 19, 26, 59))), 7, 33)
    query, key, value, grad = (
        torch.randn(shape, generator=generator).to(like)
        for shape in ((13, count, width), *[(59, key_heads, width)] * 2, (13, count, width))
    )
    scaling = width**-0.5

    def results(kernel: Kernel, dtype: torch.dtype, window: int | None) -> list[Tensor]:
        inputs = [states.to(dtype).requires_grad_() for states in (query, key, value)]
        output = kernel(*inputs, cut.to(like.device), scaling, window)
        return [output, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    try:
        with torch.enable_grad():
            return all(
                alike(ours, exact, like.dtype, whole=True, slack=GRADIENT_SLACK)
                for window in (None, 1, 4)
                for ours, exact in zip(
                    results(kernel, like.dtype, window),
                    results(reference, torch.float32, window),
                    strict=True,
                )
            )
    except REFUSALS:
        return False
