"""Memory that a thread uses for one block after another.

Fresh memory has to be paged in for every block anew, which takes as long as the arithmetic on it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Buffers(threading.local):
    """Each thread has its own; a buffer's content lasts until its name is asked for again in the same
    thread."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of that shape and type."""
        count = torch.Size(shape).numel()
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < count:
            flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
        return flat[:count].view(shape)


buffers = Buffers()
