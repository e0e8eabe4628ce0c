"""The models of the check: a directory that was given, and random weights, written at their first use."""

from __future__ import annotations

import shutil
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from scripts.bench.processes import in_process
from scripts.gpu_check import shapes

ROOM = 1.15  # what must be free for a checkpoint, and on the GPU, to its size


class Models:
    """`shapes` names them, the smallest first; losses are compared on `reference`."""

    def __init__(self, given: Path | None, scratch: Path, tiny: bool, context: BaseContext):
        random = ["tiny"] if tiny else ["1b", "8b"]
        name = given.resolve().name if given else None
        self.shapes = [name, *random] if name else random
        self.reference = self.shapes[0]
        self._scratch, self._context = scratch, context
        self._device = "cpu" if tiny else "cuda"
        self._found: dict[str, tuple[Path | None, str | None]] = {name: (given, None)} if name else {}

    def path(self, shape: str) -> tuple[Path | None, str | None]:
        """The checkpoint's directory, or None and why there is none."""
        if shape not in self._found:
            self._found[shape] = self._write(shape)
        return self._found[shape]

    def _write(self, shape: str) -> tuple[Path | None, str | None]:
        wanted, gib = ROOM * shapes.bfloat16_bytes(shape), 2**30
        free = shutil.disk_usage(self._scratch).free
        if free < wanted:
            return None, f"{wanted / gib:.0f} GiB of disk are needed and {free / gib:.0f} free (--scratch)"
        if self._device == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
            if memory < wanted:
                return None, f"{wanted / gib:.0f} GiB of memory are needed, the GPU has {memory / gib:.0f}"
        directory, log = self._scratch / shape, self._scratch / f"{shape}.log"
        # In a process of its own, so that this one holds nothing on the GPU.
        arguments = (shape, directory, torch.device(self._device))
        writer = self._context.Process(
            target=in_process, args=(shapes.write_checkpoint, arguments, {}, str(log))
        )
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            return None, f"its weights could not be written: {log.read_text(errors='replace')[-300:]}"
        return directory, None
