"""Attention over flat rows: rows one behind the other without padding, some of whose tokens several share.

There are two ways to put flat rows before an attention, and model/flat_rows.py decides between them.

- `Beside` puts the rows beside each other, (rows, longest), for an attention that need not know of them: on
  CPUs `grouped_attention`, with masks; on GPUs SDPA, whose kernels are fastest without one.
- `Varlen` leaves the queries as they are and repeats the keys and values that several rows share, for a
  kernel (model/varlen.py) that knows where each row ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linchain_cli.model.attention import Reach, reach_of
from linchain_cli.model.varlen import Cut, Kernel


@dataclass(frozen=True)
class Places:
    """Where tokens stand, of which some stand in several places.

    `tokens` (places,) are the tokens, `first` (tokens,) each one's first place. Those of `shared` (n,) stand
    in the places `holders` (n, most), filled up with a place of which nothing is read.
    """

    tokens: Tensor
    first: Tensor
    shared: Tensor
    holders: Tensor

    @classmethod
    def of(cls, tokens: Tensor, nobody: int) -> Places:
        """Of tokens 0 to the largest, each in one place at least."""
        order = tokens.argsort(stable=True)
        counts = tokens.bincount()
        starts = counts.cumsum(0) - counts
        shared = (counts > 1).nonzero()[:, 0]
        turns = torch.arange(int(counts.max()))
        held = turns < counts[shared, None]
        holders = order[(starts[shared, None] + turns).where(held, 0)].where(held, nobody)
        return cls(tokens, order[starts], shared, holders)

    def spread(self, states: Tensor) -> Tensor:
        """(tokens, ...) → (places, ...), each token's states into all its places."""
        return _Spread.apply(states, self.tokens, self.first, self.shared, self.holders)


class _Spread(torch.autograd.Function):
    """The gradient of a place of which nothing is read is zero, and so is not asked for; a token that stands
    in several places gets the sum of theirs."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, tokens: Tensor, first: Tensor, shared: Tensor, holders: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first, shared, holders)
        return states.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, shared, holders = ctx.saved_tensors
        held = grad.index_select(0, holders.flatten()).view(*holders.shape, *grad.shape[1:])
        summed = grad.index_select(0, first).index_copy_(0, shared, held.sum(1))
        return summed, None, None, None, None


class _Gather(torch.autograd.Function):
    """(places, ...) → (tokens, ...), out of each token's first place."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(first)
        ctx.shape = states.shape
        return states.index_select(0, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass(frozen=True)
class Beside:
    """Rows put beside each other: `places` are the slots of (rows, `slots`), one row after the other.

    `masks` are what each reach's layers are given, (1, 1, slots, slots), or None where they are causal
    anyway.
    """

    places: Places
    slots: int
    masks: Mapping[Reach, Tensor | None] = field(default_factory=dict)

    def masked(self, reaches: Collection[Reach], dtype: torch.dtype | None) -> Beside:
        """With masks of that type, to be added to the scores; without one, of booleans, and none for layers
        that see all before them."""
        places = torch.arange(self.slots, device=self.places.tokens.device)

        def mask(reach: Reach) -> Tensor | None:
            if reach == Reach() and dtype is None:
                return None
            seen = reach.sees(places[:, None], places)
            if dtype is not None:
                seen = torch.full_like(seen, torch.finfo(dtype).min, dtype=dtype).masked_fill_(seen, 0)
            return seen[None, None]

        # Most reach further than the rows are long.
        short = {reach: reach if reach.size < self.slots else Reach() for reach in {Reach(), *reaches}}
        masks = {reach: mask(reach) for reach in set(short.values())}
        return replace(self, masks={reach: masks[own] for reach, own in short.items()})

    def attend(
        self,
        attention: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        query, key, value = (self._beside(states) for states in (query, key, value))
        output, _ = attention(module, query, key, value, self.masks[reach_of(module)], **options)
        return _Gather.apply(output.flatten(0, 1), self.places.first)[None]

    def _beside(self, states: Tensor) -> Tensor:
        """(1, heads, tokens, d) → (rows, heads, slots, d)."""
        return self.places.spread(states[0].transpose(0, 1)).unflatten(0, (-1, self.slots)).transpose(1, 2)


@dataclass(frozen=True)
class Pieces:
    """Rows, or the chunks they are cut into, as a `Kernel` takes them. `places` says where its keys and
    values come from; without it these are the tokens themselves."""

    cut: Cut
    places: Places | None


@dataclass(frozen=True)
class Varlen:
    """Rows as they are. `pieces` holds them by the chunks in which tokens see each other (None: the row)."""

    kernel: Kernel
    pieces: Mapping[int | None, Pieces]

    def attend(
        self,
        attention: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **_: Any,
    ) -> Tensor:
        if dropout or softcap:
            raise NotImplementedError("the kernel for rows of several lengths knows plain attention alone")
        reach = reach_of(module)
        pieces = self.pieces[reach.chunk]
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        if pieces.places is not None:
            key, value = pieces.places.spread(key), pieces.places.spread(value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.kernel(query, key, value, pieces.cut, scaling, reach.window)[None]
