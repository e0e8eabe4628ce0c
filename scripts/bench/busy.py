"""Training speed on CPUs that other processes use too, beside the same arms alone: rounds and medians.

    python scripts/bench_busy.py --model DIR --data rows.json [rows2.json ...] [--competitors 1]

Every arm is a process of its own with the model loaded; they take turns. In each round every arm runs alone,
and again beside processes that only count. `linchain` sets its threads by the load, as training does;
`linchain, all threads` keeps torch's number, `linchain, one thread` takes one. An untimed step comes before
each timed one, and the load is noticed in it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench_train import Arm

# Names of arms: what scripts/bench/train_arms.py calls them, and their environment.
ARMS = {
    "linchain": ("linchain-3", {}),
    "linchain, all threads": ("linchain-3", {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}),
    "linchain, one thread": ("linchain-3", {"OMP_NUM_THREADS": "1"}),
    "PEFT": ("peft", {}),
    "PEFT, one thread": ("peft", {"OMP_NUM_THREADS": "1"}),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="checkpoint directory")
    parser.add_argument("--data", nargs="+", default=["everyday"], help="row files or a registered name")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--competitors", type=int, default=1, help="other processes, each busy on one CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    return parser.parse_args()


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
    options = parse()
    os.environ.pop("OMP_NUM_THREADS", None)
    settings = {
        "model": options.model, "data": options.data, "device": "cpu", "dtype": "auto",
        "quantization": "none", "steps": 1, "micro": options.micro, "rank": 16, "max_length": 256,
        "train_on_inputs": False, "rounds": 4 * options.rounds,
    }  # fmt: skip
    idle, busy = [], []
    with tempfile.TemporaryDirectory() as scratch:
        arms = {}
        for name in options.arms:
            kind, environment = ARMS[name]
            directory = Path(scratch, name.replace(" ", "-"))
            directory.mkdir()
            arms[name] = Arm(kind, settings, directory, environment)
            arms[name].receive()
        for number in range(options.rounds):
            idle.append(measure(arms))
            with competitors(options.competitors):
                busy.append(measure(arms))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        for arm in arms.values():
            arm.process.stdin.close()
            arm.process.wait()

    results = {
        name: {
            "idle": statistics.median(speeds[name] for speeds in idle),
            "busy": statistics.median(speeds[name] for speeds in busy),
        }
        for name in arms
    }
    print(f"{'tokens per second':24} {'alone':>8} {f'beside {options.competitors}':>10}")
    for name, result in results.items():
        print(f"{name:24} {result['idle']:8.0f} {result['busy']:10.0f}")
    document = {"settings": settings, "competitors": options.competitors, "arms": results}
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
