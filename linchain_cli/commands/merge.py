"""linchain merge"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from linchain_cli import console
from linchain_cli.commands.options import AllowOtherBase, Base, Json, Overwrite
from linchain_cli.commands.origin import AdaptedRun, open_run
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.export.card import Origin
    from linchain_cli.export.comparison import LogitProof
    from linchain_cli.export.merge import MergeOptions, MergeResult


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
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Left out, each tensor keeps its stored type.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    overwrite: Overwrite = False,
    no_proof: Annotated[
        bool,
        typer.Option("--no-proof", help="Leave out the comparison of merged and adapted model's logits."),
    ] = False,
    json: Json = False,
) -> None:
    """Fold a run's adapter into its base checkpoint."""
    import torch

    from linchain_cli.export.merge import MergeOptions
    from linchain_cli.export.output import check_output, parse_size
    from linchain_cli.export.receipts import MergeReceipt

    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    factors = _factors(weights, len(run_paths or (None,)), out)
    subjects = [open_run(path) for path in run_paths or [None]]
    subject = subjects[0]
    out = out or subject.opened.place("merged")
    keep = [path for each in subjects for path in each.inputs]
    # Before a base is fetched or converted, which may take long.
    check_output(out, MergeReceipt, overwrite=overwrite, sources=keep)
    found = subject.find_base(base)
    options = MergeOptions(
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=shard_bytes,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
        name=subject.opened.name,
        prompts=() if no_proof else _prompts(subject, found.directory),
        quantization=subject.recipe.model.quantization,
        chat_template=subject.recipe.data.chat.template,
        files=subject.travelling_files(found.directory),
    )
    adapter, origin = subject.adapter, subject.origin(found, base)
    if factors is not None:
        adapter, origin, options = _sum(subjects, factors, found.directory, origin, options)
    result = _merge(found.directory, adapter, out, options, origin, keep)
    if json:
        console.print_json({"directory": str(result.directory), **asdict(result.receipt)})
    else:
        _show(result)


def _factors(weights: str | None, runs: int, out: Path | None) -> list[float] | None:
    """--weights as numbers, one for each run; None where one run is merged as it is.

    Raises:
        InputError: they are missing, are no numbers, or are not one for each run; a sum has no --out.
    """
    if weights is None and runs == 1:
        return None
    if weights is None:
        even = ",".join([f"{1 / runs:.3g}"] * runs)
        raise InputError(f"{runs} runs are summed: say how with --weights, such as {even} for their mean")
    if out is None:
        raise InputError("a weighted sum belongs to no run: say where it goes with --out DIR")
    try:
        factors = [float(word) for word in weights.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(map(math.isfinite, factors)) or not any(factors):
        raise InputError(f"--weights: '{weights}' is not a list of numbers such as 0.5,0.5")
    if len(factors) != runs:
        raise InputError(f"--weights: {len(factors)} numbers for {runs} runs")
    return factors


def _sum(
    subjects: Sequence[AdaptedRun],
    factors: Sequence[float],
    base: Path,
    origin: Origin,
    options: MergeOptions,
) -> tuple[Adapter, Origin, MergeOptions]:
    """The weighted sum of the runs' adapters, which all have to be of the base that is there; it is asked as
    the first of them."""
    from linchain_cli.chain import sum_error, weighted_sum
    from linchain_cli.export.output import check_factors
    from linchain_cli.export.receipts import ReceiptAdapter, ReceiptPart
    from linchain_cli.model.hashing import refuse_other_base

    adapters = [subject.adapter for subject in subjects]
    for subject in subjects:
        wanted = subject.adapter.base.get("hash")
        refuse_other_base(base, wanted, subject.opened.name, allow=options.allow_other_base)
        check_factors(subject.adapter)
    templates = {str(subject.recipe.data.template): subject.opened.name for subject in subjects}
    if len(templates) > 1:
        console.warn(
            f"the runs were trained with different templates ({', '.join(templates)}): the sum is asked as"
            f" {subjects[0].opened.name} was"
        )
    names = [subject.recipe.name for subject in subjects]
    parts = [
        ReceiptPart(name=name, weight=factor, adapter=ReceiptAdapter.of(adapter))
        for name, factor, adapter in zip(names, factors, adapters, strict=True)
    ]
    data = tuple(dict.fromkeys(source.path for each in subjects for source in each.recipe.data.sources))
    roundings = {subject.recipe.model.quantization for subject in subjects}
    combined = weighted_sum(adapters, factors)
    return (
        combined,
        replace(
            origin,
            name=" + ".join(names),
            recipe=None,
            data=data,
            results=(),
            parts=tuple(zip(factors, names, strict=True)),
        ),
        replace(
            options,
            quantization=roundings.pop() if len(roundings) == 1 else "none",
            parts=parts,
            sum_error=sum_error(combined, adapters, factors),
        ),
    )


def _merge(
    base: Path, adapter: Adapter, out: Path, options: MergeOptions, origin: Origin, keep: Sequence[Path]
) -> MergeResult:
    """Merges, and shows how far it is."""
    from linchain_cli.export.merge import merge_checkpoint

    with console.Progress("bytes") as progress:
        return merge_checkpoint(base, adapter, out, options, origin, keep=keep, progress=progress.show)


def _prompts(subject: AdaptedRun, directory: Path) -> list[list[int]]:
    """Prompts of the run's own rows; of plain sentences for an imported adapter, or where the rows are
    gone."""
    from linchain_cli.export.prompts import plain_prompts, run_prompts
    from linchain_cli.model.loading import load_tokenizer

    tokenizer = load_tokenizer(directory)
    if subject.imported:
        return plain_prompts(tokenizer)
    try:
        return run_prompts(subject.recipe.data, tokenizer)
    except InputError as error:
        console.note(f"The run's rows cannot be read ({error}); comparing logits on plain sentences instead.")
        return plain_prompts(tokenizer)


def _show(result: MergeResult) -> None:
    receipt = result.receipt
    tensors, logits = receipt.tensors, receipt.logits
    others = f"the base's, as {receipt.dtype}" if receipt.dtype else "the base's"
    print(
        f"{result.directory}: {tensors['changed']} of {tensors['total']} tensors changed, the others are"
        f" {others}"
    )
    if receipt.parts:
        parts = " + ".join(f"{part.weight:g} × {part.name}" for part in receipt.parts)
        print(f"  {parts}: every ΔW within {receipt.sum_error:.2g} of the sum")
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
    print(f"  receipt: {result.directory / receipt.FILE}")


def _logits(logits: LogitProof) -> str:
    return (
        f"largest difference {logits.largest_difference:.3g}, top-1 agreement"
        f" {100 * logits.top1_agreement:.1f} % over {logits.positions} positions of {logits.prompts} prompts"
        f" ({logits.dtype})"
    )
