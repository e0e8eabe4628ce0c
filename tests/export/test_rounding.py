"""Rounding once, against rounding in exact arithmetic, and the distance in ulp against its definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from linchain_cli.export.rounding import round_once, ulps

SIXTEEN = [torch.bfloat16, torch.float16]


def neighbours(dtype: torch.dtype, count: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random values of `dtype` and the next larger ones, as float64."""
    generator = torch.Generator().manual_seed(0)
    below = (scale * torch.randn(count, generator=generator)).to(dtype)
    above = torch.nextafter(below, torch.full_like(below, torch.inf))
    return below.double(), above.double()


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-3])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_values_at_and_beside_the_middle_go_to_the_right_neighbour(dtype, scale, side):
    below, above = neighbours(dtype, 4000, scale)
    middle = (below + above) / 2
    values = middle if side == 0 else torch.nextafter(middle, torch.full_like(middle, side * torch.inf))
    rounded = round_once(values, dtype).double()
    if side:
        assert torch.equal(rounded, above if side > 0 else below)
        assert not torch.equal(values.to(dtype).double(), rounded), "torch alone rounds these twice"
    else:
        even = (rounded.to(dtype).view(torch.int16) & 1) == 0
        assert bool(even.all())


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32, torch.float64])
def test_random_sums_are_rounded_to_the_nearest(dtype):
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = round_once(values, dtype)
    assert rounded.dtype == dtype
    error = (rounded.double() - values).abs()
    for direction in (-torch.inf, torch.inf):
        other = torch.nextafter(rounded, torch.full_like(rounded, direction)).double()
        assert bool((error <= (other - values).abs()).all())


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32, torch.float64])
def test_values_of_the_type_stay_bit_for_bit(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    values[:4] = torch.tensor(
        [0.0, -0.0, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max], dtype=dtype
    )
    result = round_once(values.double(), dtype)
    assert torch.equal(result.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_ulps_against_exact_fractions(dtype):
    info = torch.finfo(dtype)
    exact = torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact[:6] = torch.tensor([1.0, 1.999999, 2.0, info.smallest_normal, info.smallest_normal / 3, 0.0])
    stored = exact.to(dtype)
    stored[10] = torch.nextafter(stored[10], torch.tensor(torch.inf, dtype=dtype))
    for have, want, found in zip(
        stored.double().tolist(), exact.tolist(), ulps(stored, exact).tolist(), strict=True
    ):
        unit = Fraction(info.smallest_normal)
        while 2 * unit <= abs(Fraction(want)):
            unit *= 2
        unit *= Fraction(info.eps)
        assert found == pytest.approx(float(abs(Fraction(have) - Fraction(want)) / unit), abs=1e-12)


def test_ulps_of_what_is_no_number_is_no_small_number():
    exact = torch.tensor([1.0, 1.0], dtype=torch.float64)
    distances = ulps(torch.tensor([torch.nan, torch.inf]), exact)
    assert not bool((distances <= 1).any())
