"""`linchain merge` from plan to receipt: write into a staging directory, prove it there, and only then give
it its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linchain_cli import __version__, storage
from linchain_cli.chain import Adapter, adapter_files
from linchain_cli.export.card import Origin, model_card
from linchain_cli.export.output import check_disk, check_factors, check_output, copy_files, staged_output
from linchain_cli.export.proof import TensorProof, prove_logits, prove_tensors
from linchain_cli.export.shards import write_checkpoint
from linchain_cli.export.sums import MergePlan, new_tensors, plan_merge
from linchain_cli.model.checkpoint import companion_files, open_checkpoint
from linchain_cli.model.hashing import refuse_other_base
from linchain_cli.model.loading import empty_model

RECEIPT_FILE = "merge.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeOptions:
    """What of a merge can be chosen.

    dtype: recast every floating-point tensor, None keeps each one's stored type
    max_shard_bytes: largest weight file
    overwrite: replace the output directory
    allow_other_base: take a base that the adapter was not trained on
    name: what messages call the adapter
    prompts: token ids of the prompts whose logits are compared; empty skips that half of the proof
    quantization: how the run had rounded its base; its logits are compared as well
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    allow_other_base: bool = False
    name: str = "the adapter"
    prompts: Sequence[Sequence[int]] = ()
    quantization: str = "none"


@dataclass(frozen=True)
class MergeResult:
    """Where the merged checkpoint is, and its receipt as merge.json holds it."""

    directory: Path
    receipt: dict[str, Any]


def merge_checkpoint(
    base_directory: Path,
    adapter: Adapter,
    out: Path,
    options: MergeOptions,
    origin: Origin,
    *,
    keep: Sequence[Path] = (),
    progress: Progress = lambda phase, done, total: None,
) -> MergeResult:
    """Merges `adapter` into the checkpoint at `base_directory` and writes the result to `out`, proven.

    `keep` are further paths that the output may not touch. `progress` is called with the phase's name, the
    bytes done and the bytes there are.

    Raises:
        InputError: the output cannot be written, the base is not the one that was trained on, or a module
        cannot be merged. LinchainError: the disk is too small, or the proof failed. Either way nothing is
        left of the output.
    """
    target = check_output(out, overwrite=options.overwrite, sources=[base_directory, *keep])
    found_hash = refuse_other_base(
        base_directory, adapter.base.get("hash"), options.name, allow=options.allow_other_base
    )
    base = open_checkpoint(base_directory)
    plan = plan_merge(base, adapter, empty_model(base_directory))
    check_factors(adapter)
    tensors = new_tensors(plan, options.dtype)
    companions = companion_files(base_directory)
    total = sum(tensor.nbytes for tensor in tensors)
    check_disk(target, total + sum(path.stat().st_size for path in companions))
    with staged_output(target) as staging:
        write_checkpoint(staging, tensors, options.max_shard_bytes, _counter("writing", total, progress))
        copy_files(companions, base_directory, staging)
        if options.dtype is not None:
            _set_config_dtype(staging / "config.json", options.dtype)
        proof = prove_tensors(plan, staging, options.dtype, _counter("proving", total, progress))
        logits = None
        if options.prompts:
            logits = prove_logits(base, adapter, staging, options.prompts, options.quantization)
        receipt = _receipt(plan, adapter, found_hash, proof, logits, options)
        storage.write_durable(staging / RECEIPT_FILE, storage.json_bytes(receipt))
        card = model_card(
            "merged", adapter, origin, str(adapter.base.get("path") or base_directory), _facts(receipt)
        )
        storage.write_durable(staging / "README.md", card.encode())
    return MergeResult(target, receipt)


def _counter(phase: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    return add


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Makes config.json name the type that the weights now have, wherever it names one."""
    config = json.loads(path.read_bytes())
    name = str(dtype).removeprefix("torch.")

    def rename(part: dict[str, Any]) -> None:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
        for value in part.values():
            if isinstance(value, dict):
                rename(value)

    rename(config)
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = name
    path.write_bytes(storage.json_bytes(config))


def _receipt(
    plan: MergePlan,
    adapter: Adapter,
    found_hash: str,
    proof: TensorProof,
    logits: dict[str, Any] | None,
    options: MergeOptions,
) -> dict[str, Any]:
    """merge.json: what was made from what, and what was verified. It depends on the inputs alone: no time, no
    place."""
    worst = max(proof.changed, key=proof.changed.__getitem__)
    return {
        "linchain": __version__,
        "base": {
            "path": adapter.base.get("path"),
            "hash": found_hash,
            "hash_expected": adapter.base.get("hash"),
        },
        "adapter": {
            "rank": adapter.config.rank,
            "depth": adapter.config.depth,
            "alpha": adapter.config.alpha,
            "modules": len(adapter.tensors),
            "hashes": {name: storage.sha256_bytes(data) for name, data in adapter_files(adapter).items()},
        },
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        "files": proof.hashes,
        "tensors": {
            "total": len(plan.base.tensors),
            "changed": len(proof.changed),
            "untouched": proof.untouched,
            "renamed": sum(target.parameter != key for key, target in plan.plain.items()),
            "converted": sum(len(group.conversion.keys) for group in plan.converted),
        },
        "largest_ulp": proof.largest_ulp,
        "largest_ulp_tensor": worst,
        "changed": proof.changed,
        "logits": logits,
    }


def _facts(receipt: dict[str, Any]) -> dict[str, str]:
    """The receipt in lines for the model card."""
    tensors = receipt["tensors"]
    facts = {
        "tensors": f"{tensors['changed']} changed, at most {receipt['largest_ulp']:.3f} ulp from the float64"
        f" sum; {tensors['untouched']} as in the base",
    }
    if logits := receipt["logits"]:
        facts["logits of merged against adapted model"] = (
            f"largest difference {logits['largest_difference']:.3g}, top-1 agreement"
            f" {100 * logits['top1_agreement']:.1f} % over {logits['positions']} positions"
            f" ({logits['dtype']})"
        )
    return facts
