"""Rounding a float64 sum once to the type it is stored in, and measuring a stored value's distance from such
a sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linchain_cli.model.buffers import buffers

# Bits of a float32 mantissa beyond those of the narrower type.
_SURPLUS_BITS = {torch.bfloat16: 16, torch.float16: 13}


def round_once(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`values` (float64) rounded to nearest-even in `dtype`, into `out` if that is given.

    torch goes from float64 to a 16-bit type by way of float32, which rounds twice: a value just beside the
    middle of two 16-bit neighbours falls onto the middle first, and from there to the wrong side. Such values
    (one in some ten thousand) are moved off the middle again before the second rounding.
    """
    out = torch.empty(values.shape, dtype=dtype) if out is None else out
    if dtype not in _SURPLUS_BITS:
        return out.copy_(values)
    single = buffers.take("rounding", values.shape, torch.float32).copy_(values)
    # numpy finds few places among many four times faster than torch does.
    low_bits = buffers.take("rounding", values.shape, torch.int32).numpy()
    mask = buffers.take("rounding", values.shape, torch.bool).numpy()
    np.bitwise_and(single.view(torch.int32).numpy(), (1 << (_SURPLUS_BITS[dtype] - 1)) - 1, out=low_bits)
    np.equal(low_bits, 0, out=mask)
    places = torch.from_numpy(np.flatnonzero(mask))
    flat, exact = single.view(-1), values.reshape(-1)[places]
    rounded = flat[places]
    towards = torch.where(exact > rounded, torch.inf, torch.where(exact < rounded, -torch.inf, rounded))
    flat[places] = torch.nextafter(rounded, towards)
    return out.copy_(single)


def ulps(stored: Tensor, exact: Tensor) -> Tensor:
    """|stored − exact| in units of the last place that `stored`'s type has at `exact` (float64): at most 0.5
    where `exact` was rounded once. Below the type's smallest normal number the unit stays that of the
    subnormals."""
    info = torch.finfo(stored.dtype)
    # A float64 with its sign and mantissa masked away is the power of two at or below it.
    power = (exact.contiguous().view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    unit = power.clamp_(min=info.smallest_normal).mul_(info.eps)
    return (stored.double() - exact).abs_().div_(unit)
