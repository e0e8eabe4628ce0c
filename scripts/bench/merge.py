"""What a merge costs: linchain's write phase against copying the files, and against PEFT's merge_and_unload +
save_pretrained.

Makes a Llama-shaped checkpoint of 1.1 billion random bfloat16 weights in several shards and a random adapter,
in a temporary directory (about 7 GB, removed at the end), and runs the three arms in turn, each in a process
of its own, several times. Every arm ends with its files fsynced. The JSON holds:

    ratio_to_copy, peft_ratio_to_copy                  seconds over those of the copy in the same round
    (median) peak_above_import_mb, peft_peak_above_import_mb    peak resident memory above that after the
    imports (largest)

PEFT's time counts loading the model, because a streaming merge reads it as well; its parts are in the table.

    python -m scripts.bench merge [--rounds 3] [--layers 22] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench import options

SHARD_BYTES = 600_000_000
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ARMS = ("copy", "linchain", "peft")


def llama_config(layers: int):
    """The shape of TinyLlama-1.1B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def make_base(directory: Path, layers: int) -> None:
    """Random weights, written tensor by tensor with the writer that merges use."""
    import torch
    from transformers import AutoModelForCausalLM

    from linchain_cli.export.shards import NewTensor, write_checkpoint

    config = llama_config(layers)
    directory.mkdir()
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        }

    def tensor(seed: int, name: str, shape: torch.Size) -> NewTensor:
        def weights() -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

        return NewTensor(name, "BF16", shape, 2 * shape.numel(), lambda: [(shape.numel(), weights)])

    tensors = [tensor(seed, name, shape) for seed, (name, shape) in enumerate(shapes.items())]
    write_checkpoint(directory, tensors, SHARD_BYTES)


def make_adapters(base: Path, chain: Path, peft: Path) -> None:
    """A random chain of rank 16 and depth 3, and the same as a plain LoRA."""
    import torch

    from linchain_cli.chain import ChainConfig, adapter_of, chain_layers, inject, save_adapter
    from linchain_cli.export.peft import write_peft
    from linchain_cli.model.config import empty_model

    model = empty_model(base)
    config = ChainConfig(rank=16, depth=3, alpha=32, target_modules=TARGETS)
    inject(model, config)
    for layer in chain_layers(model).values():
        layer.to_empty(device="cpu", recurse=False)
        for name, parameter in layer.named_parameters(recurse=False):
            torch.nn.init.orthogonal_(parameter.data) if name == "links" else torch.nn.init.normal_(
                parameter.data, std=0.02
            )
    adapter = adapter_of(model, config, {"path": str(base), "hash": None})
    save_adapter(adapter, chain)
    write_peft(adapter, empty_model(base), peft)


def fsync_all(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def run_copy(args) -> dict[str, float]:
    for path in sorted(args.base.iterdir()):
        shutil.copyfile(path, args.out / path.name)
    return {}


def run_linchain(args) -> dict[str, float]:
    from linchain_cli.chain import load_adapter
    from linchain_cli.export.output import copy_files
    from linchain_cli.export.shards import write_checkpoint
    from linchain_cli.export.sums import new_tensors, plan_merge
    from linchain_cli.model.checkpoint import companion_files, open_checkpoint
    from linchain_cli.model.config import empty_model

    plan = plan_merge(open_checkpoint(args.base), load_adapter(args.chain), empty_model(args.base))
    write_checkpoint(args.out, new_tensors(plan), SHARD_BYTES)
    copy_files(companion_files(args.base), args.base, args.out)
    return {}


def run_peft(args) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(args.base, dtype="bfloat16"), args.peft
    )
    loaded = time.perf_counter()
    merged = model.merge_and_unload()
    summed = time.perf_counter()
    merged.save_pretrained(args.out, max_shard_size=f"{SHARD_BYTES // 10**6}MB")
    return {"load": loaded - start, "merge": summed - loaded, "save": time.perf_counter() - summed}


def run_arm(args) -> None:
    """One arm in this process: prints its seconds and its memory as JSON."""
    import torch  # the imports belong to no arm's time or memory
    import transformers.models.llama.modeling_llama  # noqa: F401

    import linchain_cli.export.sums  # noqa: F401
    from linchain_cli.machine import peak_resident_bytes, resident_bytes
    from linchain_cli.training.metrics import reset_peak_memory

    if args.arm == "peft":
        import peft  # noqa: F401
    args.out.mkdir()
    before = resident_bytes()
    reset_peak_memory(torch.device("cpu"))
    start = time.perf_counter()
    parts = {"copy": run_copy, "linchain": run_linchain, "peft": run_peft}[args.arm](args)
    fsync_all(args.out)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": (peak_resident_bytes() - before) / 2**20, **parts}))


def call_arm(arm: str, work: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.bench", "merge", "--arm", arm, "--dir", str(work)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(work / "out")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    made = options.parser(__doc__, rounds=3, model=False, data=False)
    made.add_argument("--layers", type=int, default=22, help="decoder layers; fewer for a quick look")
    made.add_argument("--dir", type=Path, help="where the temporary directory goes")
    made.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.arm:
        args.base, args.chain, args.peft, args.out = (
            args.dir / name for name in ("base", "chain", "peft", "out")
        )
        return run_arm(args)

    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=args.dir) as folder:
        work = Path(folder)
        make_base(work / "base", args.layers)
        make_adapters(work / "base", work / "chain", work / "peft")
        size = sum(path.stat().st_size for path in (work / "base").iterdir())
        print(
            f"base: {size / 1e9:.2f} GB in {len(list((work / 'base').glob('*.safetensors')))} shards",
            flush=True,
        )
        rounds = []
        for number in range(args.rounds):
            order = ARMS[number % 3 :] + ARMS[: number % 3]
            rounds.append({arm: call_arm(arm, work) for arm in order})
            print(
                f"round {number + 1}: "
                + ", ".join(f"{arm} {rounds[-1][arm]['seconds']:.2f} s" for arm in ARMS),
                flush=True,
            )
    options.finish(report(rounds), args.out)


def report(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    ratios = {
        arm: statistics.median(r[arm]["seconds"] / r["copy"]["seconds"] for r in rounds) for arm in ARMS
    }
    peaks = {arm: max(r[arm]["peak_mb"] for r in rounds) for arm in ARMS}
    print(f"\n{'':<10}{'seconds':>10}{'to copy':>10}{'peak MB':>10}")
    for arm in ARMS:
        seconds = statistics.median(r[arm]["seconds"] for r in rounds)
        print(f"{arm:<10}{seconds:>10.2f}{ratios[arm]:>10.2f}{peaks[arm]:>10.0f}")
    parts = {part: statistics.median(r["peft"][part] for r in rounds) for part in ("load", "merge", "save")}
    print("peft's seconds: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))
    return {
        "ratio_to_copy": round(ratios["linchain"], 3),
        "peak_above_import_mb": round(peaks["linchain"], 1),
        "peft_ratio_to_copy": round(ratios["peft"], 3),
        "peft_peak_above_import_mb": round(peaks["peft"], 1),
    }
