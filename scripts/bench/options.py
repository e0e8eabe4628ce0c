"""Options that several benchmarks share, with one name and one default each, and how all of them end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODEL = "models/SmolLM2-135M-Instruct"


def parser(summary: str, *, rounds: int, model: bool = True, data: bool = True) -> argparse.ArgumentParser:
    """--rounds, --out and, if wanted, --model and --data. `summary` is the module's docstring."""
    made = argparse.ArgumentParser(description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        made.add_argument("--model", default=MODEL, help="checkpoint directory")
    if data:
        made.add_argument("--data", nargs="+", default=["everyday"], help="row files or a registered name")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="also write the JSON there")
    return made


def add_training(made: argparse.ArgumentParser, *, steps: int) -> None:
    """What a training step is: its model's form, its rows, its chain."""
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    made.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none")
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps of 16 rows per round")
    made.add_argument("--micro", type=int, default=4, help="rows per micro-batch")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--max-length", type=int, default=256)
    made.add_argument("--train-on-inputs", action="store_true")


def training_settings(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The options of `parser` and `add_training` as `job.make_job` takes them, with a round to warm up."""
    keys = ("model", "data", "device", "dtype", "quantization", "steps", "micro", "rank", "max_length")
    own = {key: getattr(options, key) for key in (*keys, "train_on_inputs")}
    return own | {"rounds": options.rounds + 1} | changes


def finish(document: dict[str, Any], out: Path | None) -> None:
    """Prints the JSON as the last line, and writes it where it was asked for."""
    if out:
        out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
