"""Figures of runs and comparisons, drawn without a display; every figure says in words what it shows."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from linchain_cli.report.layers import LayerNumbers

# Okabe and Ito's palette, which people with any colour vision can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
# As wide as a phone's column in points, so that text stays readable there.
WIDTH, HEIGHT = 4.8, 3.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A drawing with its caption and with words for those who cannot see it."""

    svg: bytes
    caption: str
    alt: str


def picture(figure: Figure, caption: str, alt: str) -> Picture:
    """The figure as an SVG whose bytes depend on the drawing alone."""
    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "linchain"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    return Picture(data.getvalue(), caption, alt)


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200)
    return data.getvalue()


def _figure(width: float = WIDTH, height: float = HEIGHT, **grid: Any) -> tuple[Figure, Any]:
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(**grid)
    return figure, axes


def _finish(axes: Axes, values: Sequence[float], **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if values and max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Names the curves of `axes` below the figure, in two columns; the figure grows by as much."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(2, len(labels))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def running_mean(points: Points, window: int) -> list[tuple[float, float]]:
    """Means over up to `window` neighbours, centred; fewer at both ends."""
    values = [value for _, value in points]
    half = window // 2
    return [
        (step, statistics.fmean(values[max(0, i - half) : i + half + 1]))
        for i, (step, _) in enumerate(points)
    ]


def _window(points: int) -> int:
    """An odd number of points to average, about a twentieth of them."""
    return max(1, points // 20) | 1


def _dot(points: Sequence[Any]) -> str | None:
    """The marker of a line: one point alone is none, and would not be seen."""
    return "o" if len(points) == 1 else None


def _ends(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{start:.4g} at step {first} to {end:.4g} at step {last}"


def loss_figure(training: Points, validation: Points, per: str = "supervised token") -> Figure:
    """Training and validation loss of one run over its steps; one of them at least has points. `per` is what
    it is a mean over."""
    figure, axes = _figure()
    if training:
        window = _window(len(training))
        axes.plot(
            *zip(*training, strict=True),
            color=COLORS[0],
            linewidth=0.8,
            alpha=0.4 if window > 1 else 1,
            marker=_dot(training),
            markersize=3,
        )
        if window > 1:
            smooth = running_mean(training, window)
            axes.plot(
                *zip(*smooth, strict=True),
                color=COLORS[0],
                linewidth=1.4,
                label=f"training, mean of {window} logged steps",
            )
        else:
            axes.lines[0].set_label("training")
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color=COLORS[1],
            marker="o",
            markersize=3,
            linewidth=1.2,
            label="validation",
        )
    values = [value for _, value in (*training, *validation)]
    _finish(axes, values, xlabel="optimizer step", ylabel=f"loss per {per}")
    axes.legend(frameon=False, fontsize="small")
    return figure


def rate_figure(tested: Points, tried: Points, chosen: float) -> Figure:
    """Losses over learning rates: of the watched rows in a range test, and after a run at each of a few."""
    figure, axes = _figure()
    axes.plot(*zip(*tested, strict=True), color=COLORS[0], linewidth=1.2, label="range test, step by step")
    axes.plot(
        *zip(*tried, strict=True),
        color=COLORS[1],
        marker="o",
        markersize=4,
        linewidth=1.2,
        label="after a short run at one rate",
    )
    axes.axvline(chosen, color=COLORS[2], linestyle="--", linewidth=1, label=f"chosen: {chosen:g}")
    losses = [loss for _, loss in (*tested, *tried)]
    _finish(axes, losses, xlabel="learning rate", ylabel="validation loss")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize="small")
    return figure


def loss_curves(training: Points, validation: Points, per: str = "supervised token") -> Picture | None:
    """`loss_figure` with its words; None when nothing was logged."""
    if not training and not validation:
        return None
    said = []
    if training:
        said.append(f"training loss from {_ends(training)}")
    if validation:
        said.append(f"validation loss from {_ends(validation)}, lowest {min(v for _, v in validation):.4g}")
    caption = "Training loss (each step's rows) and validation loss."
    return picture(loss_figure(training, validation, per), caption, "Line chart: " + "; ".join(said) + ".")


@dataclass(frozen=True)
class Curve:
    """One arm's mean over seeds at each step, with the lowest and the highest seed."""

    label: str
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def seed_curve(label: str, runs: Sequence[Points], smooth: bool = False) -> Curve | None:
    """The curve of an arm over its runs, at the steps that all of them have; None of no points."""
    window = _window(min((len(run) for run in runs), default=0)) if smooth else 1
    series = [dict(running_mean(run, window)) for run in runs]
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    if not steps:
        return None
    values = [[one[step] for one in series] for step in steps]
    return Curve(
        label,
        tuple(steps),
        tuple(map(statistics.fmean, values)),
        tuple(map(min, values)),
        tuple(map(max, values)),
    )


def _plain(text: str) -> str:
    """A label that matplotlib takes as it is (`$` begins a formula), and that fits into a legend."""
    text = text if len(text) <= 48 else f"{text[:45]}..."
    return text.replace("$", r"\$")


def _draw(axes: Axes, curves: Sequence[Curve], ylabel: str, marker: str | None) -> None:
    for number, curve in enumerate(curves):
        # Arms often lie on each other: broken lines let the one below be seen.
        color, style = COLORS[number % len(COLORS)], STYLES[number % len(STYLES)]
        axes.plot(
            curve.steps,
            curve.mean,
            style,
            color=color,
            linewidth=1.2,
            marker=marker or _dot(curve.steps),
            markersize=3,
            label=_plain(curve.label),
        )
        if curve.low != curve.high:
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    _finish(axes, [value for curve in curves for value in curve.low], xlabel="optimizer step", ylabel=ylabel)


def arm_curves(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Curve], list[Curve]]:
    """(training curves, validation curves) of a table's arms, from results.json."""
    training, validation = [], []
    for row in rows:
        runs = [run for run in results["runs"] if run["arm"] == row["arm"] and run["seed"] in row["seeds"]]
        label = row["label"]
        if len({other["learning_rate"] for other in rows}) > 1:
            label += f", rate {row['learning_rate']:g}"
        training.append(
            seed_curve(label, [[tuple(point) for point in run["training"]] for run in runs], smooth=True)
        )
        validation.append(
            seed_curve(label, [[(step, loss) for step, _, loss in run["validation"]] for run in runs])
        )
    return [curve for curve in training if curve], [curve for curve in validation if curve]


def comparison_figure(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss of a table's arms side by side."""
    training, validation = arm_curves(results, rows)
    figure, (left, right) = _figure(2 * WIDTH, 1.2 * HEIGHT, ncols=2)
    _draw(left, training, "training loss (running mean)", None)
    _draw(right, validation, "validation loss", "o")
    _legend_below(figure, right)
    figure.suptitle(_band(rows), fontsize=9)
    return figure


def comparison_pictures(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The same two panels, each a figure of its own."""
    training, validation = arm_curves(results, rows)
    found = []
    for curves, name, marker in ((validation, "validation loss", "o"), (training, "training loss", None)):
        if not curves:
            continue
        figure, axes = _figure()
        _draw(axes, curves, name, marker)
        _legend_below(figure, axes)
        said = "; ".join(
            f"{curve.label} from {_ends(list(zip(curve.steps, curve.mean, strict=True)))}" for curve in curves
        )
        how = " (running mean)" if marker is None else ""
        found.append(
            picture(figure, f"{name.capitalize()}{how}: {_band(rows)}.", f"Line chart of {name}: {said}.")
        )
    return found


def _band(rows: Sequence[Mapping[str, Any]]) -> str:
    most = max((len(row["seeds"]) for row in rows), default=0)
    return f"mean over {most} seeds, bands from the lowest to the highest" if most > 1 else "one seed"


def layer_map(
    layers: Sequence[LayerNumbers],
    value: Callable[[LayerNumbers], float | None],
    title: str,
    logarithmic: bool = False,
) -> Picture | None:
    """A heat map of one number per adapted module: kinds of modules by layers. Modules of one place are
    averaged.

    None where no module has the number.
    """
    drawn = layer_map_plot(layers, value, title, logarithmic)
    return drawn and picture(drawn[0], f"{title[0].upper()}{title[1:]}, by layer and module.", drawn[1])


def layer_map_plot(
    layers: Sequence[LayerNumbers],
    value: Callable[[LayerNumbers], float | None],
    title: str,
    logarithmic: bool = False,
) -> tuple[Figure, str] | None:
    """What `layer_map` shows, as a figure, and in words."""
    cells: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        found = value(layer)
        if found is not None and math.isfinite(found):
            number, kind = layer.place
            cells.setdefault((kind, number or 0), []).append(found)
    if not cells:
        return None
    kinds = sorted({kind for kind, _ in cells})
    numbers = sorted({number for _, number in cells})
    grid = [
        [statistics.fmean(cells[kind, number]) if (kind, number) in cells else math.nan for number in numbers]
        for kind in kinds
    ]
    figure, axes = _figure(WIDTH, 0.9 + 0.28 * len(kinds))
    positive = all(one > 0 for row in grid for one in row if not math.isnan(one))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", norm="log" if logarithmic and positive else None)
    axes.set_yticks(range(len(kinds)), _short(kinds))
    axes.set_xticks(range(len(numbers)), numbers)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.xaxis.set_major_formatter(
        lambda x, _: str(numbers[int(x)]) if 0 <= x < len(numbers) and x == int(x) else ""
    )
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    flat = {key: statistics.fmean(values) for key, values in cells.items()}
    low, high = min(flat, key=flat.__getitem__), max(flat, key=flat.__getitem__)
    alt = (
        f"Heat map of {title} by layer and module: lowest {flat[low]:.4g} in layer {low[1]} {low[0]},"
        f" highest {flat[high]:.4g} in layer {high[1]} {high[0]}."
    )
    return figure, alt


def _short(kinds: Sequence[str]) -> list[str]:
    """Kinds of modules by the ends of their names, where those tell them apart."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return [_plain(name) for name in (ends if len(set(ends)) == len(ends) else kinds)]


def spectrum_lines(layers: Sequence[LayerNumbers]) -> Picture | None:
    """Singular values of ΔW, one panel per kind of module, one line per layer; None when all are zero."""
    by_kind: dict[str, list[LayerNumbers]] = {}
    for layer in layers:
        if layer.norm > 0:
            by_kind.setdefault(layer.place[1], []).append(layer)
    if not by_kind:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    kinds = sorted(by_kind)
    rows = math.ceil(len(kinds) / 2)
    figure, grid = _figure(
        WIDTH, 0.6 + 1.5 * rows, nrows=rows, ncols=2, sharex=True, sharey=True, squeeze=False
    )
    last = max((layer.place[0] or 0) for layer in layers)
    scale = Normalize(0, max(1, last))
    top = max(layer.singular_values[0] for layer in layers)
    for number, axes in enumerate(grid.flat):
        if number >= len(kinds):
            axes.set_axis_off()
            continue
        for layer in by_kind[kinds[number]]:
            values = [value for value in layer.singular_values if value > 1e-7 * top]
            color = colormaps["viridis"](scale(layer.place[0] or 0))
            axes.plot(range(1, len(values) + 1), values, color=color, linewidth=0.7)
        axes.set_title(_short(kinds)[number], fontsize="medium")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    figure.supxlabel("singular value, largest first", fontsize="medium")
    ticks = MaxNLocator(nbins=5, integer=True)
    colours = ScalarMappable(scale, "viridis")
    figure.colorbar(colours, ax=grid, label="layer", ticks=ticks, fraction=0.04, pad=0.02)
    said = "; ".join(
        f"{kind}: largest {statistics.median(one.singular_values[0] for one in found):.3g}, entropy rank"
        f" {statistics.median(one.entropy_rank for one in found):.3g} (medians over layers)"
        for kind, found in sorted(by_kind.items())
    )
    return picture(
        figure, "Singular values of ΔW: one line per layer.", f"Line charts of singular values. {said}."
    )
