"""Step time against rank, depth and length: does it grow as the arithmetic says?

    python -m scripts.bench scaling --model DIR [--plot docs/scaling.png] [--device cuda]

Every point is a job of its own with linchain's own optimizer step over four rows of one length; points take
turns, and the median over the rounds counts. The dashed line is the arithmetic, fitted at its first point:
4·d_in·d_out per adapted module and token for the base, 6·r·(d_in + d_out) for the chain, n − 1 products of
r × r per module and step for the collapse, attention by the length's square. No two rows begin alike, which
training would compute once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import optimizer_step
from scripts.bench import options
from scripts.bench.job import RATE, BenchRows, make_job

RANKS, DEPTHS, LENGTHS = (8, 32, 128), (0, 1, 2, 4, 8), (64, 128, 256, 512, 1024)
RANK, DEPTH, LENGTH = 16, 3, 128
ROWS = 4


def main() -> None:
    arguments = parse()
    points = {("rank", rank): (rank, DEPTH, LENGTH) for rank in RANKS}
    points |= {("depth", depth): (RANK, depth, LENGTH) for depth in DEPTHS}
    points |= {("length", length): (RANK, DEPTH, length) for length in LENGTHS}
    seconds, work = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for axis in ("rank", "depth", "length"):
            mine = [key for key in points if key[0] == axis]
            steps = {}
            for key in mine:
                steps[key], work[key] = point(arguments, Path(scratch), *points[key])
            times = {key: [] for key in mine}
            for number in range(arguments.rounds + 1):
                for key in mine:
                    times[key].append(steps[key](number))
            for key in mine:
                seconds[key] = statistics.median(times[key][1:])  # the first warms up
                print(f"{axis} {key[1]:5}  {1e3 * seconds[key]:8.0f} ms", flush=True)
    if arguments.plot:
        plot(seconds, work, arguments.plot)
    options.finish({f"{axis} {value}": time for (axis, value), time in seconds.items()}, arguments.out)


def parse() -> argparse.Namespace:
    made = options.parser(__doc__, rounds=5, data=False)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    made.add_argument("--plot", type=Path, help="where the PNG goes")
    return made.parse_args()


def point(arguments: argparse.Namespace, scratch: Path, rank: int, depth: int, length: int):
    """(a function that takes one step and returns its seconds, the step's multiplications and additions)."""
    rows = scratch / f"{length}.json"
    text = " Is it so? " + "again and " * length
    text = text[: 5 * (length - 8)]
    beginnings = ("Now", "Here", "Then", "What")
    answer = {"input": "", "output": "the correct answer is true"}
    rows.write_text(json.dumps([{"instruction": first + text} | answer for first in beginnings]))
    settings = {
        "model": arguments.model,
        "data": str(rows),
        "template": "plain",
        "device": arguments.device,
        "dtype": arguments.dtype,
        "quantization": "none",
        "steps": 1,
        "rounds": arguments.rounds + 1,
        "micro": ROWS,
        "rank": rank,
        "max_length": 2 * length + 64,
        "train_on_inputs": False,
        "scratch": str(scratch / f"{rank}-{depth}-{length}"),
    }
    job = make_job(settings, depth)
    steps, stop = BenchRows(job), StopRequest()

    def step(number: int) -> float:
        started = time.perf_counter()
        optimizer_step(job, steps.by_step(number), RATE, stop).result()
        return time.perf_counter() - started

    return step, arithmetic(job, steps.tokens(0), rank, depth)


def arithmetic(job, tokens: int, rank: int, depth: int) -> float:
    """Operations of a step over four rows of one length."""
    config = job.model.config.get_text_config()
    embeddings = job.model.get_input_embeddings().weight.numel()
    base = sum(p.numel() for p in job.model.parameters() if not p.requires_grad) - embeddings
    chain = sum(6 * rank * sum(layer.base.weight.shape) for layer in job.layers.values())
    attention = 12 * config.num_hidden_layers * config.hidden_size * tokens / ROWS
    collapse = 6 * max(0, depth - 1) * rank**3 * len(job.layers)
    return tokens * (4 * base + chain + attention) + collapse


def plot(seconds: dict, work: dict, target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, axis in zip(figure.subplots(1, 3), ("rank", "depth", "length"), strict=True):
        keys = [key for key in seconds if key[0] == axis]
        values = [key[1] for key in keys]
        scale = seconds[keys[0]] / work[keys[0]]
        axes.plot(values, [1e3 * seconds[key] for key in keys], "o-", label="measured")
        axes.plot(values, [1e3 * scale * work[key] for key in keys], "k--", label="arithmetic")
        axes.set_xlabel(axis)
        axes.set_ylabel("ms per step")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xticks(values if axis != "length" else [64, 256, 512, 1024])
    axes.legend()
    figure.savefig(target, dpi=110, metadata={"Software": None})
