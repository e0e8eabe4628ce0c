"""A weighted sum of adapters as one adapter: ΔW = Σ wᵢ·ΔWᵢ, block by block along the rank.

A stands below A, B beside B (times what its weight and its α/r make of it), and the links are block-diagonal,
so that nothing is multiplied out: the rank is the sum of the ranks, the depth the largest, and ΔW is the sum
up to the float32 rounding of B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linchain_cli.chain.files import Adapter, ChainTensors, with_depth
from linchain_cli.chain.inject import ChainConfig
from linchain_cli.chain.layer import delta_weight
from linchain_cli.errors import InputError


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The sum of `adapters`, which are for one base, each times its weight.

    A module that only some of them have gets zeros for the others. α/r is 1; the base is the first one's.

    Raises:
        InputError: one has a classifier's head, which belongs to its own chains alone.
    """
    if any(adapter.head for adapter in adapters):
        raise InputError("classifiers do not add up: each one's head was trained with its own chains alone")
    depth = max(adapter.config.depth for adapter in adapters)
    deep = [with_depth(adapter, depth) for adapter in adapters]
    rank = sum(adapter.config.rank for adapter in adapters)
    paths = dict.fromkeys(path for adapter in deep for path in adapter.tensors)
    tensors = {path: _stacked(path, deep, weights, rank, depth) for path in paths}
    config = ChainConfig(rank, depth, float(rank), init=adapters[0].config.init, target_modules=sorted(paths))
    return Adapter(config, tensors, adapters[0].base)


def _stacked(
    path: str, adapters: Sequence[Adapter], weights: Sequence[float], rank: int, depth: int
) -> ChainTensors:
    one = next(adapter.tensors[path] for adapter in adapters if path in adapter.tensors)
    *experts, _, d_in = one.A.shape  # no dimension more of a linear module
    A, B = torch.zeros(*experts, rank, d_in), torch.zeros(*experts, one.B.shape[-2], rank)
    links = torch.eye(rank).repeat(*experts, depth, 1, 1)
    first = 0
    for adapter, weight in zip(adapters, weights, strict=True):
        rows = slice(first, first + adapter.config.rank)
        first = rows.stop
        if chain := adapter.tensors.get(path):
            A[..., rows, :], links[..., rows, rows] = chain.A, chain.links
            B[..., rows] = (chain.B.double() * (weight * adapter.config.scaling)).float()
    return ChainTensors(A, links, B)


def sum_error(combined: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """The largest ‖ΔW' − Σ wᵢ·ΔWᵢ‖ / Σ ‖wᵢ·ΔWᵢ‖ (Frobenius) of any module, in float64."""
    return max(
        _error(delta_weight(*chain, combined.config.scaling, torch.float64), path, adapters, weights)
        for path, chain in combined.tensors.items()
    )


def _error(found: Tensor, path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    parts = [
        weight * delta_weight(*adapter.tensors[path], adapter.config.scaling, torch.float64)
        for adapter, weight in zip(adapters, weights, strict=True)
        if path in adapter.tensors
    ]
    size = sum(float(part.norm()) for part in parts)
    difference = float((found - sum(parts)).norm())
    return difference / size if size > 0 else difference
