"""What must be exact: a killed run that goes on ends with the same bits, and processes agree over NCCL."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from linchain_cli.run import RunDirectory, read_jsonl
from scripts.bench.processes import in_process

STEPS, KILLED_AFTER = 16, 5
SAME = ("adapter/chain.safetensors", f"checkpoints/step-{STEPS:06d}/optimizer.safetensors", "rows.jsonl")


class Failed(Exception):
    """A check did not come out as it must."""


def killed_and_resumed(
    model: Path, dtype: str, deterministic: bool, directory: Path, context: BaseContext, deadline: float
) -> str:
    """A run that nobody touches, as the one process of a launcher, beside one that is killed and resumed.

    Returns what was found; whether the bits are the same without `training.deterministic` is only told.
    """
    directory.mkdir()
    recipe = directory / "recipe.yaml"
    recipe.write_text(json.dumps(_recipe(model, dtype, deterministic, directory)))
    whole = _linchain(context, directory / "whole.log", ["train", str(recipe), "name=whole"], _launched())
    killed = _linchain(context, directory / "killed.log", ["train", str(recipe), "name=killed"])
    run = RunDirectory(directory / "killed")
    while len(read_jsonl(run.rows_path)) < KILLED_AFTER:
        if not killed.is_alive() or time.monotonic() > deadline:
            killed.kill()
            raise Failed(f"a run ended before it could be killed: {_end(directory / 'killed.log')}")
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    step = len(read_jsonl(run.rows_path))
    resumed = _linchain(context, directory / "resumed.log", ["train", str(recipe), "name=killed", "--resume"])
    for process, log in ((whole, "whole.log"), (resumed, "resumed.log")):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode != 0:
            process.kill()
            raise Failed(f"a run ended with {process.exitcode}: {_end(directory / log)}")
    other = [name for name in SAME if not _same(directory / "whole" / name, run.path / name)]
    how = f"killed after step {step} of {STEPS} and resumed"
    if other and deterministic:
        raise Failed(f"{how}: {', '.join(other)} differ from the run nobody touched")
    if other:
        return f"{how}: other bits ({', '.join(other)}), which training.deterministic prevents"
    return f"{how}: the same bits"


def one_process(directory: Path, context: BaseContext, deadline: float) -> str:
    """linchain's own process group of one process: a sum on the device, and an object that goes round."""
    found, log = directory / "group.json", directory / "group.log"
    process = context.Process(target=in_process, args=(_sum_alone, (str(found),), _launched(), str(log)))
    process.start()
    process.join(max(0.0, deadline - time.monotonic()))
    if process.exitcode != 0:
        process.kill()
        raise Failed(f"the process ended with {process.exitcode}: {_end(log)}")
    return "{backend}, a sum of {megabytes} MB took {milliseconds:.2f} ms".format(
        **json.loads(found.read_text())
    )


def _sum_alone(path: str) -> None:
    from accelerate.utils import gather_object

    from linchain_cli.training.processes import connect, disconnect, together

    accelerator = connect()
    flat = torch.ones(1 << 23, device=accelerator.device)
    torch.distributed.all_reduce(flat)
    began = time.perf_counter()
    torch.distributed.all_reduce(flat)
    total = flat.sum().item()
    seconds = time.perf_counter() - began
    assert total == flat.numel() and gather_object([7]) == [7] and together(accelerator, lambda: 7) == 7
    found = {
        "backend": str(torch.distributed.get_backend_config()),
        "megabytes": flat.nbytes >> 20,
        "milliseconds": 1e3 * seconds,
    }
    if flat.is_cuda:
        assert "cuda:nccl" in found["backend"] and "cpu:gloo" in found["backend"], found["backend"]
        allocator = torch.cuda.memory._snapshot()["allocator_settings"]
        found["backend"] += f", expandable segments: {allocator.get('expandable_segments')}"
    disconnect()
    Path(path).write_text(json.dumps(found))


def _recipe(model: Path, dtype: str, deterministic: bool, directory: Path) -> dict:
    return {
        "name": "whole",
        "output_dir": str(directory),
        "model": {"path": str(model), "dtype": dtype},
        "adapter": {"rank": 16, "depth": 3, "alpha": 32, "dropout": 0.05},
        "data": {"train": ["everyday"], "validation": 16, "max_length": 256},
        "training": {
            "max_steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 8,
            "save_every": 4,
            "deterministic": deterministic,
        },
    }


def _launched() -> dict[str, str]:
    """The environment of the one process of a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _linchain(
    context: BaseContext, log: Path, arguments: list[str], environment: dict[str, str] | None = None
) -> BaseProcess:
    process = context.Process(
        target=in_process, args=(_command_line, (arguments,), environment or {}, str(log))
    )
    process.start()
    return process


def _command_line(arguments: list[str]) -> None:
    import sys

    from linchain_cli import cli

    sys.argv = ["linchain", *arguments]
    cli.main()


def _same(path: Path, other: Path) -> bool:
    return path.read_bytes() == other.read_bytes()


def _end(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return " / ".join(line.strip() for line in lines if line.strip())[-400:]
