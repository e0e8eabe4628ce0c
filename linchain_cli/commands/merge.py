"""linchain merge"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.adapter_run import write_adapter_run
from linchain_cli.commands.named_run import AdaptedRun, open_run
from linchain_cli.commands.options import AllowOtherBase, Base, Dtype, Json, Overwrite
from linchain_cli.commands.summing import Sum, describe_sum, parse_weights, sum_runs
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.export.card import Origin
    from linchain_cli.export.logits import LogitProof
    from linchain_cli.export.merge import MergeOptions
    from linchain_cli.export.receipts import MergeReceipt
    from linchain_cli.model.files import FoundBase


def run(
    run_paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="A run directory, or one of its checkpoints; left out, the newest finished run under "
            "./runs. Several of one base are summed, as --weights says.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER,...",
            help="What each run's ΔW is multiplied by: 0.5,0.5 is the mean of two.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the checkpoint goes; left out, the run's merged/. A sum has no place of its own.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Left out, each tensor keeps its stored type.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    overwrite: Overwrite = False,
    no_proof: Annotated[
        bool,
        typer.Option("--no-proof", help="Leave out the comparison of merged and adapted model's logits."),
    ] = False,
    as_adapter: Annotated[
        bool,
        typer.Option("--as-adapter", help="Of a sum: write it as an adapter, a run that was not trained."),
    ] = False,
    json: Json = False,
) -> None:
    """Fold a run's adapter into its base checkpoint."""
    import torch

    from linchain_cli.export.merge import MergeOptions, merge_checkpoint
    from linchain_cli.export.output import check_output, parse_size
    from linchain_cli.export.receipts import ImportReceipt, MergeReceipt

    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    factors = parse_weights(weights, len(run_paths or (None,)), out)
    if as_adapter and factors is None:
        raise InputError("--as-adapter is for a sum of runs: one run's adapter is in its adapter/ already")
    subjects = [open_run(path) for path in run_paths or [None]]
    subject = subjects[0]
    out = out or subject.opened.place("merged")
    keep = [path for each in subjects for path in each.inputs]
    # Before a base is fetched or converted, which may take long.
    receipt = ImportReceipt if as_adapter else MergeReceipt
    check_output(out, receipt, overwrite=overwrite, sources=keep)
    found = subject.find_base(base)
    for each in subjects:
        each.warn_of_changed_base(found.directory)
    summed = sum_runs(subjects, factors, found.directory, allow_other_base) if factors else None
    if as_adapter:
        _write_adapter(summed, found, out, overwrite, json)
        return
    options = MergeOptions(
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=shard_bytes,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
        name=subject.opened.name,
        prompts=() if no_proof else _prompts(subject, found.directory),
        quantization=subject.recipe.model.quantization,
        chat_template=subject.recipe.data.chat.template,
        max_length=subject.longest_row(found.directory),
        files=subject.travelling_files(found.directory, template_travels=True),
    )
    adapter, origin = subject.adapter, subject.origin(found, base)
    if summed is not None:
        adapter, origin, options = _with_sum(summed, origin, options)
    with console.Progress("bytes", counted=["trying"]) as progress:
        merged = merge_checkpoint(
            found.directory, adapter, out, options, origin, keep=keep, progress=progress.show
        )
    if json:
        console.print_json({"directory": str(out), **asdict(merged.receipt)})
    else:
        _show(out, merged.receipt)


def _with_sum(summed: Sum, origin: Origin, options: MergeOptions) -> tuple[Adapter, Origin, MergeOptions]:
    names = [part.name for part in summed.parts]
    origin = replace(
        origin,
        name=" + ".join(names),
        recipe=None,
        data=summed.data,
        results=(),
        parts=tuple((part.weight, part.name) for part in summed.parts),
    )
    options = replace(options, quantization=summed.quantization, parts=summed.parts, sum_error=summed.error)
    return summed.adapter, origin, options


def _write_adapter(summed: Sum, found: FoundBase, out: Path, overwrite: bool, json: bool) -> None:
    """The sum as a run, instead of a checkpoint."""
    from linchain_cli.export.output import check_output
    from linchain_cli.export.receipts import ImportReceipt

    target = check_output(out, ImportReceipt, overwrite=overwrite, sources=[])
    origin = {
        "from": " + ".join(part.name for part in summed.parts),
        "parts": [{"name": part.name, "weight": part.weight} for part in summed.parts],
        "sum_error": summed.error,
    }
    write_adapter_run(target, summed.adapter, found, origin, asking=summed.asking, overwrite=overwrite)
    config = summed.adapter.config
    if json:
        about = {"directory": str(out), "rank": config.rank, "depth": config.depth}
        console.print_json({**about, "modules": len(summed.adapter.tensors), **origin})
        return
    print(f"{out}: an adapter of rank {config.rank} on {len(summed.adapter.tensors)} modules")
    print(f"  {describe_sum(summed.parts, summed.error)}")


def _prompts(subject: AdaptedRun, directory: Path) -> list[list[int]]:
    """Prompts of the run's own rows; of plain sentences for an imported adapter, or where the rows are
    gone."""
    from linchain_cli.export.prompts import label_prompts, plain_prompts, run_prompts
    from linchain_cli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    data = subject.recipe_from_here.data
    if subject.imported:
        return plain_prompts(tokenizer)
    if subject.adapter.head:
        return label_prompts(data, tokenizer, subject.adapter.head.classes)
    try:
        return run_prompts(data, tokenizer)
    except InputError as error:
        console.note(f"The run's rows cannot be read ({error}); comparing logits on plain sentences instead.")
        return plain_prompts(tokenizer)


def _show(out: Path, receipt: MergeReceipt) -> None:
    tensors, logits = receipt.tensors, receipt.logits
    others = f"the base's, as {receipt.dtype}" if receipt.dtype else "the base's"
    print(f"{out}: {tensors['changed']} of {tensors['total']} tensors changed, the others are {others}")
    if receipt.parts:
        print(f"  {describe_sum(receipt.parts, receipt.sum_error)}")
    for line in receipt.changes:
        print(f"  changed: {line}")
    print(f"  read back: at most {receipt.largest_ulp:.3f} ulp from W0 + ΔW ({receipt.largest_ulp_tensor})")
    if logits:
        print(f"  logits, merged against adapted: {_logits(logits)}")
        print(f"  (switching the adapter off changes them by up to {logits.adapter_effect:.3g})")
        if logits.adapter_lost:
            print(
                "  WARNING: rounding to the stored type loses most of what the adapter does. Merge with"
                " --dtype float32."
            )
    if receipt.quantized:
        print(f"  logits, merged against the adapter on the rounded base: {_logits(receipt.quantized)}")
    if receipt.generated:
        print("  transformers' generate runs with the settings in this directory")
    for line in receipt.not_proven:
        print(f"  not shown: {line}")
    print(f"  receipt: {out / receipt.FILE}")


def _logits(logits: LogitProof) -> str:
    return f"{logits} of {logits.prompts} prompts ({logits.dtype})"
