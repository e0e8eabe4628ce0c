"""Training speed of linchain beside its peers and beside the limit: one run, interleaved rounds, medians,
ratios.

    python -m scripts.bench train --model DIR --data rows.json [rows2.json ...] [--device cuda]

Every arm is a process of its own with the model loaded; the arms take turns, a round of optimizer steps each,
so that a noisy machine is noisy for all of them. Speed is unpadded tokens per second of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from scripts.bench import options
from scripts.bench.processes import Arm

DEFAULT_ARMS = (
    "limit", "peft", "trl", "trl-packing", "uncollapsed", "linchain-0", "linchain-1", "linchain-3",
    "linchain-8", "linchain-3-compiled",
)  # fmt: skip


def parse() -> argparse.Namespace:
    made = options.parser(__doc__, rounds=5)
    made.add_argument(
        "--arms", nargs="+", default=list(DEFAULT_ARMS), help=f"out of {', '.join(DEFAULT_ARMS)}"
    )
    options.add_training(made, steps=2)
    return made.parse_args()


def ratio(arms: dict[str, Arm], first: str, second: str) -> float | None:
    """Median over rounds of first's speed divided by second's in the same round."""
    if first not in arms or second not in arms:
        return None
    pairs = zip(arms[first].rounds[1:], arms[second].rounds[1:], strict=True)
    return statistics.median(a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]) for a, b in pairs)


def main() -> None:
    arguments = parse()
    settings = options.training_settings(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        arms = {}
        for name in arguments.arms:
            arms[name] = Arm(name, settings, Path(scratch))
            arms[name].receive()
            print(f"{name} is ready", file=sys.stderr)
        for number in range(settings["rounds"]):
            for arm in arms.values():
                arm.round()
            print(f"round {number} of {arguments.rounds} done", file=sys.stderr)
        results = {name: arm.result() for name, arm in arms.items()}
        for arm in arms.values():
            arm.close()

    ours = "linchain-3"
    ratios = {
        f"{ours} to {other}": value
        for other in arms
        if other != ours and (value := ratio(arms, ours, other)) is not None
    }
    if (value := ratio(arms, "linchain-3-compiled", "limit")) is not None:
        ratios["linchain-3-compiled to limit"] = value
    if ours in results and "peft" in results:
        ratios[f"peak memory, {ours} to peft"] = (
            results[ours]["peak_memory_mb"] / results["peft"]["peak_memory_mb"]
        )
    print(f"{'arm':22} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'peak MB':>8}  first loss")
    for name, entry in results.items():
        first = entry["first_losses"][0]
        print(
            f"{name:22} {entry['tokens_per_second']:9.1f} {entry['lowest']:8.1f} {entry['highest']:8.1f}"
            f" {entry['peak_memory_mb']:8.0f}  {'' if first is None else f'{first:.4f}'}"
        )
    for name, value in ratios.items():
        print(f"{name:42} {value:6.3f}")
    document = {"settings": settings, "arms": results, "ratios": ratios}
    options.finish(document, arguments.out)
