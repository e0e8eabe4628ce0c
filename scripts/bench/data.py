"""How long rows take to encode and to open again, how much memory that needs, and how much padding sorting
saves.

    python -m scripts.bench data --model DIR --data FILE [FILE ...] [--rows 170420 1704200]

Of the model only the tokenizer is used; the rows of the JSON files are repeated to each of the row counts.
Every figure comes from a process of its own: "encode" with an empty cache, "cached" with what that one left,
each followed by the batches of 200 steps. Memory is the process's resident set at its most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

from scripts.bench import options

CHILD = """
import json, sys, time
started = time.perf_counter()
from pathlib import Path
from linchain_cli.data.batches import collate, micro_batches, step_rows
from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.report import epoch_plan
from linchain_cli.machine import peak_resident_bytes
from linchain_cli.model.loading import load_tokenizer
from linchain_cli.recipe import DataConfig

def peak():
    return peak_resident_bytes() / 2**20

tokenizer = load_tokenizer(Path(sys.argv[1]))
imported, libraries, computed = time.perf_counter(), peak(), time.process_time()
config = DataConfig(train=sys.argv[2], template=sys.argv[3])
data = prepare_data(config, tokenizer, cache_dir=Path(sys.argv[4]))
prepared, opened, computed = time.perf_counter(), peak(), time.process_time() - computed
for step in range(200):
    rows = step_rows(len(data.train), 42, 16, step)
    for part in micro_batches(rows, data.train.lengths, 4):
        collate(data.train, part, 0)
batched, after = time.perf_counter(), peak()
plan = epoch_plan(data.train.lengths, data.train.supervised_counts, seed=42, global_batch=16, micro_batch=4)
print(json.dumps({
    "rows": data.report.kept, "tokens": data.report.tokens, "cached": data.report.cached,
    "import_seconds": imported - started, "prepare_seconds": prepared - imported,
    "cpu_seconds": computed,
    "ms_per_step": (batched - prepared) / 200 * 1e3,
    "libraries_mib": libraries, "prepare_mib": opened, "batches_mib": after,
    "padding": plan.padding, "padding_unsorted": plan.padding_unsorted,
}))
"""


def repeated(files: list[Path], rows: int, target: Path) -> Path:
    """A JSON list of `rows` rows, those of the files again and again."""
    originals = [
        json.dumps(row, ensure_ascii=False) for file in files for row in json.loads(file.read_text())
    ]
    with open(target, "w", encoding="utf-8") as handle:
        handle.write("[\n")
        for number, row in enumerate(islice(cycle(originals), rows)):
            handle.write((",\n" if number else "") + row)
        handle.write("\n]\n")
    return target


def measure(model: str, path: Path, template: str, cache: Path) -> dict:
    command = [sys.executable, "-c", CHILD, model, str(path), template, str(cache)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    made = options.parser(__doc__, rounds=1, data=False)
    made.add_argument("--data", nargs="+", type=Path, required=True, help="JSON files")
    made.add_argument("--rows", nargs="+", type=int, default=[170_420, 1_704_200])
    made.add_argument("--template", default="alpaca")
    arguments = made.parse_args()
    results = []
    columns = (
        "rows",
        "start",
        "file MB",
        "prepare s",
        "CPU s",
        "MiB before",
        "MiB prepared",
        "MiB 200 steps",
        "ms/step",
        "padding",
        "unsorted",
    )
    print(("{:>14}" * len(columns)).format(*columns))
    for rows in arguments.rows * arguments.rounds:
        with tempfile.TemporaryDirectory(prefix="linchain-bench-") as folder:
            path = repeated(arguments.data, rows, Path(folder) / "rows.json")
            for _ in range(2):
                found = measure(arguments.model, path, arguments.template, Path(folder) / "cache")
                cells = (
                    f"{found['rows']:,}",
                    "cached" if found["cached"] else "encode",
                    f"{path.stat().st_size / 1e6:.0f}",
                    f"{found['prepare_seconds']:.2f}",
                    f"{found['cpu_seconds']:.2f}",
                    f"{found['libraries_mib']:.0f}",
                    f"{found['prepare_mib']:.0f}",
                    f"{found['batches_mib']:.0f}",
                    f"{found['ms_per_step']:.2f}",
                    f"{found['padding']:.1%}",
                    f"{found['padding_unsorted']:.1%}",
                )
                print(("{:>14}" * len(cells)).format(*cells), flush=True)
                results.append(found)
    options.finish({"measured": results}, arguments.out)
