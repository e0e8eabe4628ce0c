"""Weighted sums of adapters, held to the sum of their ΔW."""

from __future__ import annotations

import pytest
import torch

from linchain_cli.chain import Adapter, ChainConfig, ChainTensors, delta_weight, sum_error, weighted_sum


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(rank, depth, alpha, paths, seed):
    tensors = {
        path: ChainTensors(
            draw(rank, 12, seed=seed + i),
            draw(depth, rank, rank, seed=seed + i),
            draw(10, rank, seed=seed - i - 1),
        )
        for i, path in enumerate(paths)
    }
    return Adapter(ChainConfig(rank, depth, alpha, target_modules=list(paths)), tensors, {"hash": "h"})


def delta(one, path):
    if path not in one.tensors:
        return torch.zeros(10, 12, dtype=torch.float64)
    return delta_weight(*one.tensors[path], one.config.scaling, torch.float64)


@pytest.mark.parametrize("weights", [(0.5, 0.5, 1.0), (1.0, -1.0, 0.25), (0.0, 0.3, 0.7)])
def test_ranks_depths_alphas_and_modules_may_differ(weights):
    parts = [
        adapter(4, 3, 8.0, ["a", "b"], seed=10),
        adapter(2, 0, 6.0, ["b", "c"], seed=20),
        adapter(3, 1, 3.0, ["b"], seed=30),
    ]
    found = weighted_sum(parts, weights)
    assert (found.config.rank, found.config.depth, found.config.scaling) == (9, 3, 1.0)
    assert list(found.tensors) == ["a", "b", "c"] and found.base == {"hash": "h"}
    for path in found.tensors:
        expected = sum(weight * delta(part, path) for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(delta(found, path), expected, rtol=1e-6, atol=1e-6)
    assert sum_error(found, parts, weights) < 1e-7
    broken = found.tensors["b"].B.clone()
    broken[0, 0] += 0.01 * broken.norm()
    found.tensors["b"] = found.tensors["b"]._replace(B=broken)
    assert sum_error(found, parts, weights) > 1e-4


def test_each_expert_has_a_sum_of_its_own():
    parts = [adapter(4, 2, 8.0, ["a"], seed=1), adapter(2, 1, 6.0, ["a"], seed=2)]
    for part in parts:
        chain = part.tensors["a"]
        part.tensors["a"] = ChainTensors(*(torch.stack([t, -t, 0.5 * t]) for t in chain))
    found = weighted_sum(parts, (0.3, 0.7))
    expected = 0.3 * delta(parts[0], "a") + 0.7 * delta(parts[1], "a")
    assert delta(found, "a").shape == (3, 10, 12)
    torch.testing.assert_close(delta(found, "a"), expected, rtol=1e-6, atol=1e-6)
    assert sum_error(found, parts, (0.3, 0.7)) < 1e-7


def test_powers_of_two_change_no_bit():
    one = adapter(4, 2, 8.0, ["a"], seed=1)
    found = weighted_sum([one], [0.5])
    assert torch.equal(delta(found, "a"), 0.5 * delta(one, "a"))
