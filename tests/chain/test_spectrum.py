"""Spectra against the full singular value decomposition of ΔW."""

from __future__ import annotations

import math

import pytest
import torch

from linchain_cli.chain import delta_weight
from linchain_cli.chain.spectrum import condition_numbers, entropy_rank, spectrum, stable_rank, top_energy


def chain(d_in: int, d_out: int, rank: int, depth: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(rank, d_in), draw(depth, rank, rank), draw(d_out, rank)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(48, 32, 8), (8, 40, 8), (6, 40, 8), (40, 5, 8), (32, 48, 1)]
)
def test_the_core_has_the_singular_values_of_the_whole_matrix(d_in, d_out, rank, depth):
    A, links, B = chain(d_in, d_out, rank, depth)
    whole = torch.linalg.svdvals(delta_weight(A, links, B, 0.75, torch.float64))
    values = spectrum(A, links, B, 0.75)
    assert values.shape == (min(rank, d_in, d_out),)
    torch.testing.assert_close(values, whole[: len(values)], rtol=1e-10, atol=1e-10 * float(whole[0]))
    assert bool((whole[len(values) :] < 1e-12 * whole[0]).all())


def test_numbers_of_known_spectra():
    equal, one = torch.ones(4, dtype=torch.float64), torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert entropy_rank(equal) == pytest.approx(4) and stable_rank(equal) == pytest.approx(4)
    assert top_energy(equal) == pytest.approx(0.25)
    assert (entropy_rank(one), stable_rank(one), top_energy(one)) == (1.0, 1.0, 1.0)
    halves = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert entropy_rank(halves) == pytest.approx(
        math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    )
    assert stable_rank(halves) == pytest.approx(1.25) and top_energy(halves) == pytest.approx(0.8)


def test_an_untrained_adapter_has_rank_zero():
    A, links, B = chain(16, 16, 4, 2)
    values = spectrum(A, links, torch.zeros_like(B), 2.0)
    assert (entropy_rank(values), stable_rank(values), top_energy(values)) == (0.0, 0.0, 0.0)


def test_tiny_and_huge_values_neither_vanish_nor_overflow():
    for scale in (1e-200, 1e150):
        values = torch.tensor([2.0, 1.0], dtype=torch.float64) * scale
        assert stable_rank(values) == pytest.approx(1.25)


def test_condition_numbers_of_links():
    links = torch.stack(
        [torch.eye(3), torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0, 0.0]))]
    )
    assert condition_numbers(links).tolist() == [1.0, 4.0, math.inf]
    assert condition_numbers(links[:0]).shape == (0,)
