"""metrics.jsonl: one row per logged step, and what is counted between two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from linchain_cli.machine import peak_resident_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: on CUDA by the allocator, elsewhere by the process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def reset_peak_memory(device: torch.device) -> bool:
    """Lets `peak_memory_bytes` count from now on; False where the system cannot (it then counts since the
    start)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # Linux: 5 sets the process's high-water mark of resident memory back to what it holds now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


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
