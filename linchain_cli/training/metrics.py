"""metrics.jsonl: one row per logged step, and what is counted between two of them."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: on CUDA by the allocator, elsewhere by the whole process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Interval:
    """What happened since the last logged row. Tokens are unpadded; `slots` are tokens with their padding."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    slots: int = 0

    def add(self, seconds: float, tokens: int, slots: int) -> None:
        """Counts one step."""
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens
        self.slots += slots

    def row(self) -> dict[str, float]:
        """The interval's share of a metrics row."""
        return {
            "tokens_per_second": round(self.tokens / self.seconds, 2),
            "step_seconds": round(self.seconds / self.steps, 4),
            "padding_share": round(1 - self.tokens / self.slots, 4),
        }
