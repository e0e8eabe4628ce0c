"""The learning rate as a pure function of the step: nothing to save, nothing that several processes could
step twice.
"""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, scheduler: str) -> float:
    """The rate of optimizer step `step` (0-based) out of `total_steps`.

    It rises linearly and reaches `peak` at the last warm-up step, then decays to 0 just after the last step
    along a line or a half cosine, or stays (`linear`, `cosine`, `constant`).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "constant":
        return peak
    if scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
