"""linchain export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from linchain_cli.commands.options import Base, Overwrite, RunPath
from linchain_cli.commands.origin import open_run


def run(
    run_path: RunPath = None,
    format: Annotated[
        Literal["peft"], typer.Option(help="peft: a plain LoRA of the same rank in PEFT's file format.")
    ] = "peft",
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the adapter goes; left out, the run's <format>/.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another tool's format."""
    from linchain_cli import storage
    from linchain_cli.export.card import model_card
    from linchain_cli.export.output import check_output, staged_output
    from linchain_cli.export.peft import write_peft
    from linchain_cli.model.loading import empty_model

    subject = open_run(run_path)
    out = out or subject.opened.place(format)
    target = check_output(out, overwrite=overwrite, sources=subject.inputs)
    model = empty_model(subject.base_directory(base, weights=False))
    with staged_output(target) as staging:
        proof = write_peft(subject.adapter, model, staging)
        found = f"within {proof.largest_error:.2g} of the chain's (relative, Frobenius)"
        facts = {"ΔW of every module, read back": found}
        card = model_card("peft", subject.adapter, subject.origin, subject.recipe.model.path, facts)
        storage.write_durable(staging / "README.md", card.encode())
        storage.write_durable(staging / "export.json", storage.json_bytes(asdict(proof)))
    print(f"{out}: a LoRA of rank {subject.adapter.config.rank} on {proof.modules} modules")
    print(
        f"  read back: every ΔW within {proof.largest_error:.2g} of the chain's, largest at"
        f" {proof.largest_error_module}"
    )
