"""Which arms are measured on which model, in order of what is wanted most."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

PEERS = ("peft", "peft-unpadded", "trl-packing")
OURS = ("linchain-0", "linchain-3", "linchain-8")
COMPILED = "linchain-3-compiled"
# What the losses of linchain's depth 0 and 3 are to be, computed by somebody else.
REFERENCES = {"linchain-0": "peft", "linchain-3": "uncollapsed"}


@dataclass(frozen=True)
class Planned:
    """An arm of `scripts.bench.arms` on one model."""

    shape: str
    dtype: str
    quantization: str
    arm: str

    def __str__(self) -> str:
        return f"{self.arm} ({self.shape}, {self.precision})"

    @property
    def precision(self) -> str:
        return self.dtype if self.quantization == "none" else self.quantization


@dataclass(frozen=True)
class Measured(Planned):
    """What it did: speeds in unpadded tokens per second, the losses of the first steps, seconds of it all."""

    tokens_per_second: float
    lowest: float
    highest: float
    peak_memory_mb: float
    first_losses: list[float | None]
    seconds: float


def planned(shapes: list[str], reference: str, *, brief: bool = False) -> list[Planned]:
    """All arms; with `brief` each of them once, and two in nf4.

    Losses are compared on `reference`, speed is measured on every shape, on the largest (the last) first.
    """
    largest = shapes[-1]
    plan = [Planned(reference, "float32", "none", arm) for arm in (*REFERENCES.values(), *REFERENCES)]
    plan += [Planned(reference, "bfloat16", "none", arm) for arm in ("peft", "linchain-0", "linchain-3")]
    for quantization in ("none", "nf4"):
        plan += [Planned(largest, "bfloat16", quantization, arm) for arm in ("peft", "linchain-3")]
    for shape in sorted(shapes, key=lambda shape: shape != largest):
        for quantization in ("none", "nf4"):
            if brief and quantization != "none":
                continue
            arms = (*PEERS, *OURS, *(("limit",) if quantization == "none" else ()))
            plan += [Planned(shape, "bfloat16", quantization, arm) for arm in arms]
    # Compiling takes longest.
    plan += [Planned(shape, "bfloat16", "none", COMPILED) for shape in (reference, largest)]
    return list(dict.fromkeys(plan))


def missing_for(arm: Planned) -> str | None:
    """Which packages it needs that are not there; None if it has all."""
    needs = []
    if arm.arm.startswith(("peft", "trl")):
        needs.append("peft")
    if arm.arm.startswith("trl"):
        needs += ["trl", "datasets"]
    if arm.quantization != "none":
        needs.append("bitsandbytes")
    missing = [name for name in needs if find_spec(name) is None]
    return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed" if missing else None
