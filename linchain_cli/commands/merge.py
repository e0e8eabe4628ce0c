"""linchain merge"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from linchain_cli import console
from linchain_cli.commands.options import AllowOtherBase, Base, Json, Overwrite, RunPath
from linchain_cli.commands.origin import AdaptedRun, open_run
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.export.comparison import LogitProof
    from linchain_cli.export.merge import MergeOptions, MergeResult
    from linchain_cli.model.files import FoundBase


def run(
    run_path: RunPath = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the checkpoint goes; left out, the run's merged/.", show_default=False
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
    subject = open_run(run_path)
    out = out or subject.opened.place("merged")
    # Before a base is fetched or converted, which may take long.
    check_output(out, MergeReceipt, overwrite=overwrite, sources=subject.inputs)
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
    result = _merge(subject, found, base, out, options)
    if json:
        console.print_json({"directory": str(result.directory), **asdict(result.receipt)})
    else:
        _show(result)


def _merge(
    subject: AdaptedRun, found: FoundBase, base: str | None, out: Path, options: MergeOptions
) -> MergeResult:
    """Merges, and shows how far it is."""
    from linchain_cli.export.merge import merge_checkpoint

    with console.Progress("bytes") as progress:
        return merge_checkpoint(
            found.directory,
            subject.adapter,
            out,
            options,
            subject.origin(found, base),
            keep=subject.inputs,
            progress=progress.show,
        )


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
