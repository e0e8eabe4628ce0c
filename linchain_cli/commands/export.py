"""linchain export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from linchain_cli import console
from linchain_cli.commands.named_run import AdaptedRun, open_run
from linchain_cli.commands.options import Base, Json, Overwrite, RunPath
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.export.receipts import ExportReceipt
    from linchain_cli.model.files import FoundBase


def run(
    run_path: RunPath = None,
    format: Annotated[
        Literal["peft", "gguf"],
        typer.Option(
            help="A plain LoRA of the same rank: in PEFT's file format, or as GGUF for llama.cpp and Ollama."
        ),
    ] = "peft",
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the adapter goes; left out, the run's <format>/.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter in another tool's format."""
    from linchain_cli.export.output import check_output
    from linchain_cli.export.receipts import ExportReceipt

    subject = open_run(run_path)
    out = out or subject.opened.place(format)
    # Before a base is fetched or converted, which may take long.
    check_output(out, ExportReceipt, overwrite=overwrite, sources=subject.inputs)
    found = subject.find_base(base, weights=False)
    subject.warn_of_changed_base(found.directory)
    receipt = export_run(subject, found, base, out, format, overwrite)
    if json:
        console.print_json({"directory": str(out), **asdict(receipt)})
        return
    print(f"{out}: a LoRA of rank {subject.adapter.config.rank} on {receipt.modules} modules")
    print(
        f"  read back: every ΔW within {receipt.largest_error:.2g} of the chain's, largest at"
        f" {receipt.largest_error_module}"
    )
    for line in receipt.not_proven:
        print(f"  not shown: {line}")
    if receipt.load_with:
        arguments = ", ".join(f"{key}={value}" for key, value in receipt.load_with.items())
        print(f"  to be loaded with {arguments}, which its base does not say: README.md shows how")
    if format == "peft" and found.source is not None:
        print(
            f"  adapter_config.json names {found.source} as the base, for this machine; to publish it, export"
            " with --base and the base's hub id"
        )


def export_run(
    subject: AdaptedRun,
    found: FoundBase,
    base: str | None,
    out: Path,
    format: Literal["peft", "gguf"],
    overwrite: bool = False,
) -> ExportReceipt:
    """Exports a run's adapter; `base` is what its base was named by on the command line."""
    if subject.adapter.head and format == "gguf":
        raise InputError(
            f"{subject.opened.name} is a classifier, whose head a GGUF adapter does not hold: linchain merge"
            " writes a checkpoint that transformers loads, linchain export an adapter for PEFT"
        )
    from linchain_cli.data.telling import TELLING_FILE, Telling
    from linchain_cli.export.adapters import export_adapter
    from linchain_cli.export.classifier import empty_base, loading_of
    from linchain_cli.records import record_bytes

    model = empty_base(found.directory, subject.adapter.head)
    longest = subject.longest_row(found.directory)
    files = subject.travelling_files(found.directory)
    if subject.adapter.head:
        telling = Telling(classes=list(subject.adapter.head.classes), max_length=longest)
        files = {TELLING_FILE: record_bytes(telling)}
    return export_adapter(
        subject.adapter,
        model,
        out,
        format,
        subject.origin(found, base),
        overwrite=overwrite,
        keep=subject.inputs,
        template=None if subject.imported else subject.recipe.data.template,
        files=files,
        loading=loading_of(model, subject.adapter.head, found.directory, longest),
    )
