"""How long linchain takes before it does anything, as whole processes.

    python -m scripts.bench start --model DIR --data rows.json [rows2.json ...] [--rounds 5]

`linchain --help` and `linchain recipes list` are timed from start to end. `linchain train` is timed from its
start to the beginning of its first optimizer step, in turns with a process that imports transformers and
loads the same model in the same type: what no tool can save. The first round warms up caches and does not
count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench import options

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys, torch, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
"""


def main() -> None:
    arguments = options.parser(__doc__, rounds=5).parse_args()
    linchain = [sys.executable, "-m", "linchain_cli"]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(arguments, folder)))
        for number in range(arguments.rounds + 1):
            dtype, first_step = until_first_step([*linchain, "train", str(recipe), "--fresh"], Path(folder))
            found = {
                "linchain --help": whole([*linchain, "--help"]),
                "linchain recipes list": whole([*linchain, "recipes", "list"]),
                "import transformers, load the model": whole(
                    [sys.executable, "-c", LOAD, arguments.model, dtype]
                ),
                "linchain train, to its first step": first_step,
            }
            if number:
                for name, value in found.items():
                    seconds.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:38} {medians[name]:6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    load, train = list(medians)[-2:]
    pairs = zip(seconds[train], seconds[load], strict=True)
    medians["first step after loading alone"] = statistics.median(ours - alone for ours, alone in pairs)
    print(f"{'first step after loading alone':38} {medians['first step after loading alone']:6.2f} s")
    options.finish(medians, arguments.out)


def recipe_of(arguments: argparse.Namespace, folder: str) -> dict:
    return {
        "name": "start",
        "output_dir": folder,
        "model": {"path": str(Path(arguments.model).resolve())},
        "adapter": {"rank": 16, "depth": 3, "alpha": 32},
        "data": {"train": arguments.data, "validation": 0},
        "training": {"max_steps": 1, "warmup_steps": 0, "log_every": 1, "keep": "last"},
    }


def whole(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - began


def until_first_step(command: list[str], folder: Path) -> tuple[str, float]:
    """The model's type, and the seconds to the row of the first step less those that the step took."""
    began = time.time()
    whole(command)
    run = folder / "start"
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    # Written once, at the end of the only step.
    written = (run / "rows.jsonl").stat().st_mtime
    return json.loads((run / "run.json").read_text())["base"]["dtype"], written - began - row["step_seconds"]
