"""linchain inspect"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli import console
from linchain_cli.commands.named_run import AdaptedRun, open_run
from linchain_cli.commands.options import AllowOtherBase, Base, Json, RunPath
from linchain_cli.errors import LinchainError

if TYPE_CHECKING:
    from linchain_cli.report.layers import LayerNumbers


def run(
    run_path: RunPath = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    json: Json = False,
) -> None:
    """Show spectra and sizes of what was learned."""
    from linchain_cli import storage
    from linchain_cli.export.output import check_factors
    from linchain_cli.report.figures import layer_map_plot, png
    from linchain_cli.report.layers import layer_numbers

    subject = open_run(run_path)
    check_factors(subject.adapter)
    directory = _base(subject, base, allow_other_base)
    layers = layer_numbers(subject.adapter, directory)
    config, found = subject.adapter.config, _as_json(subject, layers)
    target = Path(f"{subject.opened.place('inspect')}.json")
    if json:
        console.print_json(found)
    else:
        _show(layers, config.rank, config.depth)
    try:
        storage.write_json(target, found)
    except OSError as error:  # of a run that can only be read, what there is to see has been shown
        console.note(f"{target} cannot be written: {error.strerror or error}")
        return
    written = [target]
    heat_map = layer_map_plot(layers, lambda layer: layer.entropy_rank, "entropy rank of ΔW")
    if heat_map is not None:
        heat_map[0].suptitle(f"entropy rank of ΔW (at most {config.rank})")
        written.append(target.with_suffix(".png"))
        storage.write_atomic(written[-1], png(heat_map[0]))
    for path in written if not json else ():
        print(f"written: {path}")


def _base(subject: AdaptedRun, base: str | None, allow_other: bool) -> Path | None:
    """The base's directory for ‖W0‖; None where it is not at hand, since all else can be told without it.

    Raises:
        LinchainError: a base that was named on the command line cannot be had, or is another one.
    """
    from linchain_cli.model.hashing import refuse_other_base

    try:
        directory = subject.base_directory(base)
        wanted = subject.adapter.base.get("hash")
        refuse_other_base(directory, wanted, subject.opened.name, allow=allow_other)
        return directory
    except LinchainError as error:
        if base is not None:
            raise
        console.note(f"‖W0‖ is left out: {error}")
        return None


def _show(layers: list[LayerNumbers], rank: int, depth: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    prefix = _common_prefix([layer.path for layer in layers])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{prefix}…" if prefix else "module", overflow="fold")
    titles = ["σ1", "entropy\nrank", "stable\nrank", "top-1\nenergy", "‖ΔW‖", "‖ΔW‖\n/‖W0‖"]
    for title in titles + (["worst\ncond(W)"] if depth else []):
        table.add_column(title, justify="right", no_wrap=True)
    rows: dict[str, list[LayerNumbers]] = {}
    for layer in layers:
        rows.setdefault(layer.matrices, []).append(layer)
    for path, alike in rows.items():
        middle = {
            name: statistics.median(getattr(layer, name) for layer in alike)
            for name in ("entropy_rank", "stable_rank", "top_energy", "norm")
        }
        relative = [layer.relative_norm for layer in alike if layer.relative_norm is not None]
        cells = [
            f"{statistics.median(layer.singular_values[0] for layer in alike):.3g}",
            f"{middle['entropy_rank']:.2f}",
            f"{middle['stable_rank']:.2f}",
            f"{middle['top_energy']:.3f}",
            f"{middle['norm']:.3g}",
            f"{statistics.median(relative):.2e}" if relative else "",
        ]
        if depth:
            cells.append(f"{max(max(layer.link_conditions) for layer in alike):.3g}")
        table.add_row(path.removeprefix(prefix), *cells)
    console.table_console().print(table)
    if len(rows) < len(layers):
        print("* is all experts: the middle one of them in each number, and the worst cond(W).")
    middle = statistics.median(layer.entropy_rank for layer in layers)
    print(
        f"{len(layers)} modules. Every ΔW has rank {rank} at most, whatever the depth; the median entropy"
        f" rank is {middle:.2f}. Compare adapters at equal loss only."
    )


def _common_prefix(paths: list[str]) -> str:
    """What all dotted paths begin with, up to a dot."""
    prefix = os.path.commonprefix(paths)
    return prefix[: prefix.rfind(".") + 1]


def _as_json(subject: AdaptedRun, layers: list[LayerNumbers]) -> dict[str, Any]:
    config = subject.adapter.config
    return {
        "run": subject.recipe.name,
        "rank": config.rank,
        "depth": config.depth,
        "alpha": config.alpha,
        "largest_possible_rank": config.rank,
        "modules": {
            layer.path: {
                "singular_values": list(layer.singular_values),
                "entropy_rank": layer.entropy_rank,
                "stable_rank": layer.stable_rank,
                "top_energy": layer.top_energy,
                "norm": layer.norm,
                "base_norm": layer.base_norm,
                "relative_norm": layer.relative_norm,
                "link_condition_numbers": [
                    number if number < float("inf") else None for number in layer.link_conditions
                ],
            }
            for layer in layers
        },
    }
