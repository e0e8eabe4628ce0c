"""Sections that pages share: recipe, rows, layers, machine and versions, how to repeat."""

from __future__ import annotations

from collections.abc import Sequence

from linchain_cli.chain import load_adapter
from linchain_cli.errors import LinchainError
from linchain_cli.model.files import find_base
from linchain_cli.model.hashing import refuse_other_base
from linchain_cli.recipe import Recipe
from linchain_cli.report.figures import layer_map, spectrum_lines
from linchain_cli.report.html import Markup, facts, figure, section, table, tag
from linchain_cli.report.layers import LayerNumbers, layer_numbers
from linchain_cli.report.samples import row_samples
from linchain_cli.run import RunDirectory, RunStatus

MOST_ROWS = 1000  # of the table of modules


def recipe_section(recipe: Recipe) -> Markup:
    """The whole recipe, every default written out."""
    return section("Recipe", tag("pre", recipe.to_yaml()))


def problem(what: str, error: Exception) -> Markup:
    """A sentence in the place of what could not be shown."""
    return tag("p", f"{what}: {error}", class_="faint")


def layers_section(run: RunDirectory, status: RunStatus, recipe: Recipe, base: str | None = None) -> Markup:
    """Spectra and sizes of ΔW, of the adapter that the run kept; `base` is where its base is now."""
    if not run.adapter_dir.is_dir():
        return Markup("")
    try:
        layers, missing = read_layers(run, status, recipe, base)
    except LinchainError as error:
        return section("What was learned", problem("The adapter cannot be shown", error))
    relative = layer_map(
        layers, lambda one: one.relative_norm, "‖ΔW‖ / ‖W0‖ (Frobenius norms)", logarithmic=True
    )
    absolute = layer_map(layers, lambda one: one.norm, "‖ΔW‖ (Frobenius norm)", logarithmic=True)
    ranks = layer_map(layers, lambda one: one.entropy_rank, "entropy rank of ΔW")
    top = layer_map(layers, lambda one: one.top_energy, "share of ‖ΔW‖² in its first direction")
    most = max(len(one.singular_values) for one in layers)
    note = (
        f"ΔW = (α/r)·B·Wn…W1·A has at most rank {most} here, whatever its depth. Entropy rank is exp(−Σ p ln"
        " p) with p = σ/Σσ: how many directions share the spectrum."
    )
    drawn = [figure(one) for one in (relative or absolute, ranks, top, spectrum_lines(layers))]
    return section(
        "What was learned",
        tag("p", note),
        missing,
        tag("div", drawn, class_="figures"),
        _layer_table(layers),
    )


def read_layers(
    run: RunDirectory, status: RunStatus, recipe: Recipe, base: str | None = None
) -> tuple[list[LayerNumbers], Markup]:
    """(numbers of every module in the order of layers, a sentence if ‖W0‖ could not be read).

    Raises:
        LinchainError: the adapter is missing or damaged.
    """
    adapter = load_adapter(run.adapter_dir)
    missing = Markup("")
    known = status.base_of(recipe.model.path, recipe.model.revision)
    try:
        directory = find_base(known, named=base, near=run.path, weights=False).directory
        refuse_other_base(directory, adapter.base.get("hash"), str(run.path))
        layers = layer_numbers(adapter, directory)
    except LinchainError as error:
        layers, missing = layer_numbers(adapter), problem("‖W0‖ is not shown", error)
    return sorted(layers, key=lambda one: (one.place[0] or 0, one.place[1])), missing


def _layer_table(layers: Sequence[LayerNumbers]) -> Markup:
    if len(layers) > MOST_ROWS:
        return tag("p", f"{len(layers):,} modules: the table of all of them is left out.", class_="faint")
    rows = [
        {
            "module": one.path,
            "‖ΔW‖": f"{one.norm:.4g}",
            "‖ΔW‖/‖W0‖": "" if one.relative_norm is None else f"{one.relative_norm:.3g}",
            "entropy rank": f"{one.entropy_rank:.2f}",
            "stable rank": f"{one.stable_rank:.2f}",
            "first direction": f"{one.top_energy:.1%}",
            "largest σ": f"{one.singular_values[0]:.3g}",
            "condition of links": ", ".join(f"{value:.3g}" for value in one.link_conditions),
        }
        for one in layers
    ]
    return tag(
        "details", tag("summary", f"All {len(rows)} modules in numbers"), table(rows, "Every adapted module")
    )


def samples_section(run: RunDirectory, recipe: Recipe, base: str | None = None) -> Markup:
    """Rows of the first step, with the tokens that the loss is over."""
    try:
        samples = row_samples(run, recipe, base=base)
    except LinchainError as error:
        return section("Rows", problem("Sample rows cannot be shown", error))
    if not samples:
        return Markup("")
    shown = []
    for sample in samples:
        text = [tag("mark", piece) if supervised else piece for piece, supervised in sample.pieces]
        learned = f"{sample.supervised} supervised" if sample.label is None else f"label {sample.label}"
        title = f"Row {sample.row}: {sample.tokens} tokens, {learned}"
        shown += [tag("h3", title), tag("pre", text, class_="tokens")]
    note = "The first rows of the first step"
    if samples[0].label is None:
        note += ". Marked tokens are supervised: the loss is over them."
    else:
        note += ", with their labels."
    return section("Rows", tag("p", note), shown)


def origin_section(status: RunStatus, command: str) -> Markup:
    """Versions, hashes, machine, and the command that does it again; of an imported adapter what it was made
    of."""
    machine, base = status.machine, status.base
    if status.imported is not None:
        origin = ("imported from", status.imported.get("from")), ("base model", base and base.path)
        return section("Where it is from", facts(origin))
    pairs = [(f"version of {name}", version) for name, version in status.versions.items()]
    pairs += [(f"SHA-256 of {name}", value) for name, value in status.hashes.items()]
    pairs += [
        ("base model", base and base.path),
        ("number format of the base", base and base.dtype),
        ("device", machine.device),
        ("processor", machine.processor),
        ("threads", machine.threads),
        ("processes", machine.processes),
    ]
    note = (
        "Save the recipe of this page as recipe.yaml. With the same versions, hashes, device and number of"
        " threads the losses are the same to the last digit; with others they differ by rounding."
    )
    return section(
        "How to repeat it",
        tag("p", note),
        tag("pre", tag("code", command)),
        facts(pairs),
    )
