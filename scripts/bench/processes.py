"""An arm of a training benchmark: a process of its own, which trains when it is its turn."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path


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
            [sys.executable, "-m", "scripts.bench.arms", name, str(path)],
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
        """Runs a round and keeps what it measured."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.receive())

    def result(self) -> dict:
        """Speeds, memory and losses over the rounds."""
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

    def close(self) -> None:
        """Lets the process end."""
        self.process.stdin.close()
        self.process.wait()
