"""Training speed on CPUs that other processes use too, beside the same arms alone: rounds and medians.

    python -m scripts.bench busy --model DIR --data rows.json [rows2.json ...] [--competitors 1]

Every arm is a process of its own with the model loaded; they take turns. In each round every arm runs alone,
and again beside processes that only count. `linchain` sets its threads by the load, as training does;
`linchain, all threads` keeps torch's number, `linchain, one thread` takes one. An untimed step comes before
each timed one, and the load is noticed in it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.bench import options
from scripts.bench.processes import Arm

# Names of arms: what arms.py calls them, and their environment.
ARMS = {
    "linchain": ("linchain-3", {}),
    "linchain, all threads": ("linchain-3", {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}),
    "linchain, one thread": ("linchain-3", {"OMP_NUM_THREADS": "1"}),
    "PEFT": ("peft", {}),
    "PEFT, one thread": ("peft", {"OMP_NUM_THREADS": "1"}),
}


def parse() -> argparse.Namespace:
    made = options.parser(__doc__, rounds=3)
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    made.add_argument("--competitors", type=int, default=1, help="other processes, each busy on one CPU")
    options.add_training(made, steps=1)
    return made.parse_args()


@contextlib.contextmanager
def competitors(count: int) -> Iterator[None]:
    """Processes that each keep one CPU busy while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(arms: dict[str, Arm]) -> dict[str, float]:
    """Tokens per second of each arm in turn."""
    speeds = {}
    for name, arm in arms.items():
        arm.round()
        arm.round()
        speeds[name] = arm.rounds[-1]["tokens"] / arm.rounds[-1]["seconds"]
    return speeds


def main() -> None:
    arguments = parse()
    os.environ.pop("OMP_NUM_THREADS", None)
    settings = options.training_settings(arguments, device="cpu", rounds=4 * arguments.rounds)
    idle, busy = [], []
    with tempfile.TemporaryDirectory() as scratch:
        arms = {}
        for name in arguments.arms:
            kind, environment = ARMS[name]
            directory = Path(scratch, name.replace(" ", "-"))
            directory.mkdir()
            arms[name] = Arm(kind, settings, directory, environment)
            arms[name].receive()
        for number in range(arguments.rounds):
            idle.append(measure(arms))
            with competitors(arguments.competitors):
                busy.append(measure(arms))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
        for arm in arms.values():
            arm.close()

    results = {
        name: {
            "idle": statistics.median(speeds[name] for speeds in idle),
            "busy": statistics.median(speeds[name] for speeds in busy),
        }
        for name in arms
    }
    print(f"{'tokens per second':24} {'alone':>8} {f'beside {arguments.competitors}':>10}")
    for name, result in results.items():
        print(f"{name:24} {result['idle']:8.0f} {result['busy']:10.0f}")
    document = {"settings": settings, "competitors": arguments.competitors, "arms": results}
    options.finish(document, arguments.out)
