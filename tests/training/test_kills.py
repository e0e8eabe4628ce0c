"""SIGKILL to real processes, again and again, until the run is done: its end must be that of a run nobody
touched.

Half of the kills come at random instants, half at a random operation on the disk within a save.
LINCHAIN_TEST_KILLS sets how many there are (20); `pytest -s` shows where they struck.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter

from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training.checkpoints import CheckpointStore

KILLS = int(os.environ.get("LINCHAIN_TEST_KILLS", "20"))
# Dropout, two micro-batches a step, validations and saves at different steps.
CHANGES = {"adapter.dropout": 0.1, "training.max_steps": 12}
OPERATIONS = 60  # on the disk, in the first two saves or so


def state_of(run: RunDirectory) -> dict[str, bytes | list]:
    """What must be the same, bit for bit."""
    last = run.checkpoints_dir / "step-000012"
    files = {
        "adapter": run.adapter_dir / "chain.safetensors",
        "adapter description": run.adapter_dir / "chain.json",
        "optimizer": last / "optimizer.safetensors",
        "last values": last / "chain.safetensors",
        "rows": run.rows_path,
    }
    found: dict[str, bytes | list] = {name: path.read_bytes() for name, path in files.items()}
    timings = {"tokens_per_second", "step_seconds", "peak_memory_bytes", "padding_share"}
    found["metrics"] = [
        {k: v for k, v in row.items() if k not in timings} for row in read_jsonl(run.metrics_path)
    ]
    return found


def test_killed_runs_end_as_untouched_ones(starter, recipe_of, recipe_file):
    recipe = recipe_file(CHANGES)
    untouched = RunDirectory(recipe_of({"name": "untouched"}).run_path)
    assert starter.start("train", recipe, "name=untouched").wait() == 0  # its start warms up caches
    began = time.monotonic()
    assert starter.start("train", recipe, "name=untouched", "--fresh").wait() == 0
    duration = time.monotonic() - began
    expected = state_of(untouched)

    generator = random.Random(0)
    struck: Counter[str] = Counter()
    runs = lives = 0
    run = None
    while struck.total() < KILLS or run is not None:
        if run is None:
            run = RunDirectory(recipe_of({"name": f"killed-{runs}"}).run_path)
            runs += 1
        lives += 1
        arguments = ("train", recipe, f"name={run.path.name}", "--resume")
        if struck.total() >= KILLS:
            process, kind = starter.start(*arguments), "none"
        elif struck.total() % 2:
            kind = "in a save"
            operation, torn = generator.randrange(OPERATIONS), generator.random() < 0.5
            process = starter.start(*arguments, hook="kill_in_save", operation=operation, torn=torn)
        else:
            process, kind = starter.start(*arguments), "at random"
            # Loading the model takes the first part of a process's life, and few of the kills.
            process.handle.join(duration * generator.uniform(0 if generator.random() < 0.2 else 0.4, 1))
            if process.handle.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
        if code == -signal.SIGKILL:
            struck[kind] += 1
            if run.exists():
                json.loads(run.status_path.read_bytes())
                # All that is there is whole.
                CheckpointStore(run.checkpoints_dir, 2).read_latest(lambda problem: None)
            continue
        assert code == 0, process.log
        assert run.read_status().status == "finished"
        assert state_of(run) == expected, f"{run.path.name} ended differently: {process.log}"
        assert not [path for path in run.checkpoints_dir.iterdir() if not path.name.startswith("step-")]
        run = None
    where = ", ".join(f"{count} {kind}" for kind, count in struck.items())
    print(f"\n{struck.total()} kills ({where}) in {runs} runs and {lives} lives: the same bits at every end")
    assert struck.total() >= KILLS and runs >= 2
