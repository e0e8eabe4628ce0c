"""linchain on one GPU, in at most ten minutes: losses, speed and memory beside its peers, a killed run, NCCL.

    scripts/gpu_check.sh [--model SMOLLM2_DIRECTORY] [--out DIR]

Nothing is downloaded: without --model the weights are random, in the shape of Llama 3's 1B and 8B. Each arm
is a process alone on the GPU, the rows are those of `bench train`. Results are written as they come, as JSON
and as a Markdown table; what no time, memory or package was left for is listed. --tiny runs all of it on a
CPU. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from multiprocessing.context import BaseContext
from pathlib import Path

# Before anything asks CUDA: a process that has used it cannot fork others that do.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from linchain_cli.machine import suit_cuda_to_many_lengths  # noqa: E402
from scripts.gpu_check.plan import Measured, missing_for, planned  # noqa: E402
from scripts.gpu_check.report import Report  # noqa: E402

PRELOADED = [
    "linchain_cli.commands.train",
    "linchain_cli.training.runner",
    "linchain_cli.report.plots",
    "scripts.bench.arms",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "accelerate.utils",
]
# They bring bitsandbytes, which asks CUDA about the card when it is imported.
PEERS_PRELOADED = ["transformers.trainer", "peft", "trl.trainer.sft_trainer"]
NEEDED = ("pydantic", "typer", "torch", "transformers", "accelerate", "pyarrow", "matplotlib", "rich", "yaml")
# The last seconds of the time given are for writing, and for what an arm takes to end.
RESERVE = 8.0
FIRST_GUESS = 25.0  # seconds of an arm, before one of its shape was seen


def parse() -> argparse.Namespace:
    """The options. Ends with 2 and one message where they, or the machine, do not do."""
    made = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", type=Path, help="a SmolLM2 directory, for losses of real weights")
    made.add_argument("--out", type=Path, default=Path(), help="where the two files go (here)")
    made.add_argument("--minutes", type=float, default=10.0, help="all of it takes no longer")
    made.add_argument("--micro", type=int, help="rows per micro-batch (16; 4 below 40 GiB)")
    made.add_argument("--scratch", type=Path, help="where 20 GB of checkpoints fit (the system's)")
    made.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to check this script")
    options = made.parse_args()
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        made.error(f"{sys.executable} lacks {', '.join(lacking)}: install linchain there (pip install -e .)")
    if options.model is not None and not (options.model / "config.json").is_file():
        made.error(f"--model: {options.model} holds no checkpoint (config.json)")
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return options
    # Of several GPUs the first one, or linchain would start a process on each, and Trainer use them all.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    import torch

    if not torch.cuda.is_available():
        made.error("no GPU is visible to torch; --tiny runs the same on a CPU")
    return options


def main() -> None:
    """Runs the check and ends with its exit code."""
    began, options = time.monotonic(), parse()
    options.out.mkdir(parents=True, exist_ok=True)
    suit_cuda_to_many_lengths()  # as the command line does
    deadline = began + 60 * options.minutes - RESERVE
    with tempfile.TemporaryDirectory(prefix="linchain-gpu-check-", dir=options.scratch) as scratch:
        os.environ["LINCHAIN_CACHE"] = str(Path(scratch, "cache"))
        context = _context(options.tiny)
        report = Report(options.out, tiny=options.tiny, minutes=options.minutes)
        check(options, report, Path(scratch), context, deadline)
        if report.has_failures:
            report.keep_logs(Path(scratch))
    report.write(seconds=time.monotonic() - began)
    print(report.markdown())
    print(f"written: {report.json_path} and {report.markdown_path}", file=sys.stderr)
    sys.exit(1 if report.failed else 0)


def _context(tiny: bool) -> BaseContext:
    """Processes that start with all imports done; fresh interpreters where CUDA does not allow that."""
    forked = multiprocessing.get_context("forkserver")
    peers = PEERS_PRELOADED if tiny or find_spec("bitsandbytes") is None else []
    forked.set_forkserver_preload(
        [name for name in (*PRELOADED, *peers) if find_spec(name.partition(".")[0])]
    )
    if tiny:
        return forked
    probe = forked.Process(target=_touch_gpu)
    probe.start()
    probe.join()
    return forked if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _touch_gpu() -> None:
    import torch

    torch.zeros(1, device="cuda")


def check(
    options: argparse.Namespace, report: Report, scratch: Path, context: BaseContext, deadline: float
) -> None:
    """All parts in order of what is wanted most, until the time is over."""
    from scripts.gpu_check import exact
    from scripts.gpu_check.models import Models

    models = Models(options.model, scratch, options.tiny, context)
    micro = options.micro or (16 if report.memory_gib >= 40 and not options.tiny else 4)
    reference = models.reference
    for deterministic in (True,) if options.tiny else (True, False):
        name = f"killed and resumed, training.deterministic: {str(deterministic).lower()}"
        path, why = (None, no_time) if (no_time := _no_time(deadline)) else models.path(reference)
        if path is None:
            report.left_out(name, why)
            continue
        place = scratch / f"resume-{deterministic}"
        arguments = (path, "bfloat16", deterministic, place, context, deadline)
        report.check(name, partial(exact.killed_and_resumed, *arguments))
    if why := _no_time(deadline):
        report.left_out("one process of a group", why)
    else:
        report.check("one process of a group", partial(exact.one_process, scratch, context, deadline))
    longest: dict[str, float] = {}
    for arm in planned(models.shapes, reference, brief=options.tiny):
        path, why = None, missing_for(arm) or _no_time(deadline, longest.get(arm.shape, FIRST_GUESS))
        if not why:
            path, why = models.path(arm.shape)
        if path is None:
            report.left_out(str(arm), why)
            continue
        began = time.monotonic()
        settings = {
            "model": str(path), "data": ["everyday"], "device": "cpu" if options.tiny else "cuda",
            "dtype": arm.dtype, "quantization": arm.quantization, "micro": micro, "rank": 16,
            "max_length": 256, "train_on_inputs": False, "rounds": 3 if options.tiny else 4,
            "steps": 1 if options.tiny else 4,
            # Kernels for a CPU take two minutes to generate.
            "compile_backend": "eager" if options.tiny else "inductor",
        }  # fmt: skip
        result = _measure(arm.arm, settings, scratch, context, deadline - began)
        seconds = time.monotonic() - began
        longest[arm.shape] = max(longest.get(arm.shape, 0.0), seconds)
        if isinstance(result, str):
            report.left_out(str(arm), result)
        else:
            report.measured(Measured(**asdict(arm), **result, seconds=round(seconds, 1)))
    report.compare_losses(reference)


def _no_time(deadline: float, wanted: float = FIRST_GUESS) -> str | None:
    left = deadline - time.monotonic()
    return None if left >= wanted else f"no time: {max(0, left):.0f} of about {wanted:.0f} s were left"


def _measure(name: str, settings: dict, scratch: Path, context: BaseContext, seconds: float) -> dict | str:
    """What an arm measured, or why it did not."""
    from scripts.bench.processes import Arm, ArmFailed

    arm = Arm(name, settings, Path(tempfile.mkdtemp(dir=scratch)), context=context)
    limit = threading.Timer(seconds, arm.process.kill)
    limit.start()
    try:
        arm.receive()
        for _ in range(settings["rounds"]):
            arm.round()
        return arm.result()
    except (ArmFailed, BrokenPipeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if arm.process.exitcode is not None and arm.process.exitcode < 0:
            return "cut when the time was over" if limit.finished.is_set() else "killed from outside"
        return "out of memory" if "OutOfMemoryError" in str(error) else f"failed: {lines[-1].strip()[:300]}"
    finally:
        limit.cancel()
        arm.close()


if __name__ == "__main__":
    main()
