"""Training speed of linchain beside its peers and beside the limit: one run, interleaved rounds, medians,
ratios.

    python scripts/bench_train.py --model DIR --data rows.json [rows2.json ...] [--device cuda] [--out
    results.json]

Every arm is a process of its own with the model loaded; the arms take turns, a round of optimizer steps each,
so that a noisy machine is noisy for all of them. Speed is unpadded tokens per second of wall time. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT_ARMS = (
    "limit", "peft", "trl", "trl-packing", "uncollapsed", "linchain-0", "linchain-1", "linchain-3",
    "linchain-8", "linchain-3-compiled",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="checkpoint directory")
    parser.add_argument("--data", nargs="+", default=["everyday"], help="row files or a registered name")
    parser.add_argument(
        "--arms", nargs="+", default=list(DEFAULT_ARMS), help=f"out of {', '.join(DEFAULT_ARMS)}"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of 16 rows per round")
    parser.add_argument("--micro", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--train-on-inputs", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    return parser.parse_args()


class Arm:
    """A worker process and what it measured."""

    def __init__(self, name: str, settings: dict, scratch: Path, environment: dict[str, str] | None = None):
        path = scratch / f"{name}.json"
        path.write_text(json.dumps(settings | {"scratch": str(scratch / name)}))
        fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | fixed | (environment or {})
        if settings["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.name, self.rounds = name, []
        self.log = open(scratch / f"{name}.log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "bench" / "train_arms.py"), name, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def receive(self) -> dict:
        """The worker's next JSON line; other lines are library talk."""
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(f"the {self.name} arm ended early:\n{self.log.read()[-3000:]}")

    def round(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.receive())

    def result(self) -> dict:
        # The first round warms up (allocator, compilation); it counts for the losses alone.
        timed = self.rounds[1:]
        speeds = [entry["tokens"] / entry["seconds"] for entry in timed]
        losses = [loss for entry in self.rounds for loss in entry["losses"]][:10]
        return {
            "tokens_per_second": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "peak_memory_mb": max(entry["peak_mb"] for entry in timed),
            "first_losses": [None if math.isnan(loss) else loss for loss in losses],
        }


def ratio(arms: dict[str, Arm], first: str, second: str) -> float | None:
    """Median over rounds of first's speed divided by second's in the same round."""
    if first not in arms or second not in arms:
        return None
    pairs = zip(arms[first].rounds[1:], arms[second].rounds[1:], strict=True)
    return statistics.median(a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]) for a, b in pairs)


def main() -> None:
    options = parse()
    settings = {
        key: getattr(options, key)
        for key in (
            "model",
            "data",
            "device",
            "dtype",
            "quantization",
            "steps",
            "micro",
            "rank",
            "max_length",
            "train_on_inputs",
        )
    } | {"rounds": options.rounds + 1}
    with tempfile.TemporaryDirectory() as scratch:
        arms = {}
        for name in options.arms:
            arms[name] = Arm(name, settings, Path(scratch))
            arms[name].receive()
            print(f"{name} is ready", file=sys.stderr)
        for number in range(settings["rounds"]):
            for arm in arms.values():
                arm.round()
            print(f"round {number} of {options.rounds} done", file=sys.stderr)
        results = {name: arm.result() for name, arm in arms.items()}
        for arm in arms.values():
            arm.process.stdin.close()
            arm.process.wait()

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
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
