"""How much memory each process takes to load a base that several share (`training.parallel: shard`), against
one that each holds whole (`replicate`).

Makes a Llama-shaped checkpoint of 1.1 billion random bfloat16 weights in a temporary directory (2.2 GB,
removed at the end), and loads it with two and with four processes (gloo, on the CPU). Memory is what belongs
to a process alone (RssAnon and RssShmem, read every 2 ms), Python and its libraries with it. The JSON holds,
by processes and quantization:

    peak_gb                  the most that any process took while it loaded and for one forward pass
    before_gb                what it had before
    bound_gb                 the base's share, two blocks, what stays whole (embeddings, head), and 0.5 GB
    seconds                  to load

    python -m scripts.bench shard [--processes 2 4] [--quantization none nf4] [--parallel shard] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from linchain_cli.training.launch import free_port
from scripts.bench import options
from scripts.bench.merge import make_base

GB = 1e9
_POLL_SECONDS = 0.002


class Watch:
    """The most private memory that this process holds from now on."""

    def __init__(self) -> None:
        self.before = self.peak = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self.peak = max(self.peak, private_bytes())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def worker(args: argparse.Namespace) -> None:
    """One process: prints what it took as JSON."""
    import torch

    from linchain_cli.model.loading import load_model
    from linchain_cli.training.processes import connect, disconnect
    from linchain_cli.training.sharded import load_sharded

    accelerator = connect()
    watch, start = Watch(), time.perf_counter()
    kept = {"dtype": "bfloat16", "quantization": args.quantization[0], "attention": "sdpa"}
    if args.parallel == "shard":
        model = load_sharded(args.dir, accelerator, **kept)
    else:
        model = load_model(args.dir, device="cpu", **kept)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits
    watch.stop()
    found = {"peak": watch.peak, "before": watch.before, "seconds": seconds, "logit": float(logits.sum())}
    Path(f"{args.report}-{accelerator.process_index}").write_text(json.dumps(found))
    disconnect()


def measure(base: Path, scratch: Path, processes: int, quantization: str, parallel: str) -> dict[str, float]:
    """What the worst of the processes took."""
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1"}
    fixed |= {"WORLD_SIZE": str(processes), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.bench", "shard", "--report", str(scratch / "found")]
    command += ["--dir", str(base), "--quantization", quantization, "--parallel", parallel]
    started = [
        subprocess.Popen(command, env=os.environ | fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    if any([process.wait() for process in started]):
        sys.exit("a process failed")
    found = [json.loads((scratch / f"found-{rank}").read_text()) for rank in range(processes)]
    if len({each["logit"] for each in found}) != 1:
        sys.exit("the processes compute different things")
    return {key: max(each[key] for each in found) for key in ("peak", "before", "seconds", "logit")}


def sizes(base: Path, quantization: str) -> tuple[float, float, float]:
    """Bytes: the whole base as it is held, one block as it is read, and what lies outside the blocks."""
    from linchain_cli.model.checkpoint import open_checkpoint
    from linchain_cli.training.forecast.memory import QUANTISED

    tensors = open_checkpoint(base).tensors
    blocks = sum(stored.nbytes for key, stored in tensors.items() if ".layers." in key)
    block = sum(stored.nbytes for key, stored in tensors.items() if ".layers.0." in key)
    rest = sum(stored.nbytes for stored in tensors.values()) - blocks
    held = blocks if quantization == "none" else blocks / 2 * QUANTISED["nf4"]
    return held + rest, block, rest


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    made.add_argument("--quantization", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    made.add_argument("--parallel", choices=["shard", "replicate"], default="shard")
    made.add_argument("--layers", type=int, default=22, help="decoder layers; fewer for a quick look")
    made.add_argument("--dir", type=Path, help="where the temporary directory goes")
    made.add_argument("--out", type=Path, help="also write the JSON there")
    made.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.report:
        return worker(args)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-shard-", dir=args.dir) as folder:
        make_base(Path(folder) / "base", args.layers)
        print(f"{'':<14}{'processes':>10}{'before':>9}{'peak':>9}{'bound':>9}  GB{'seconds':>10}")
        for quantization in args.quantization:
            whole, block, rest = sizes(Path(folder) / "base", quantization)
            for processes in args.processes:
                taken = measure(Path(folder) / "base", Path(folder), processes, quantization, args.parallel)
                row = {
                    "parallel": args.parallel,
                    "quantization": quantization,
                    "processes": processes,
                    "before_gb": taken["before"] / GB,
                    "peak_gb": taken["peak"] / GB,
                    "bound_gb": (whole / processes + 2 * block + rest) / GB + 0.5,
                    "seconds": taken["seconds"],
                    "logit": taken["logit"],
                }
                found.append(row)
                figures = "".join(f"{row[key]:>9.2f}" for key in ("before_gb", "peak_gb", "bound_gb"))
                print(f"{quantization:<14}{processes:>10}{figures}{row['seconds']:>14.1f}", flush=True)
    options.finish({"layers": args.layers, "rows": found}, args.out)
