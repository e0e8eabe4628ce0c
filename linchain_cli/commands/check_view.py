"""What `linchain check` prints, section by section; in colour on a terminal, readable without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.chain import Coverage, Matches, MatrixShape
    from linchain_cli.data.dataset import PreparedData
    from linchain_cli.data.report import EpochPlan
    from linchain_cli.data.store import EncodedRows
    from linchain_cli.recipe import Recipe
    from linchain_cli.training.forecast import Forecast
    from linchain_cli.training.rate import AutoRate

BAR = 40  # characters of the histogram's longest bar


def _section(console: Console, title: str) -> None:
    from rich.text import Text

    console.print()
    console.print(Text(title, style="bold"))


def _print_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], bars: bool = False
) -> None:
    """A plain table: the first column (and with `bars` the last) to the left, numbers to the right."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for number, row in enumerate([header, *rows]):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if bars:
            cells[-1] = row[-1]
        line = "  ".join(cells).rstrip()
        if line:
            console.print(Text(line, style="" if number else "dim"))


def notes(console: Console, messages: Iterable[str]) -> None:
    """What the user should know, a line each."""
    for message in messages:
        console.print(f"note: {message}", style="yellow")


def _count(number: int) -> str:
    return f"{number:,}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def recipe(console: Console, text: str) -> None:
    """The recipe as resolved, every default written out."""
    _section(console, "Recipe")
    console.print(text.rstrip())


def modules(
    console: Console,
    matches: Matches,
    shapes: Sequence[MatrixShape],
    base: int,
    head: int,
    covered: Coverage,
    recipe: Recipe,
) -> None:
    """What gets a chain and what does not, and how many parameters that trains, those of a `head` among
    them."""
    from linchain_cli.chain import parameter_count

    trained = head + parameter_count(shapes, recipe.adapter.rank, recipe.adapter.depth)
    _section(console, "Model")
    counts = [(pattern, _count(count)) for pattern, count in matches.per_pattern.items()]
    _print_table(console, ("pattern", "modules"), counts)
    console.print(
        f"{_count(trained)} trainable parameters in {_count(len(matches.paths))} modules"
        f"{f' and a head of {_count(head)}' if head else ''}, beside "
        f"{_count(base)} frozen ones ({_share(trained, base)})"
    )
    console.print(covered.describe(most=len(covered.without_chain)))


def learning_rate(console: Console, found: AutoRate | None) -> None:
    """What `auto` stands for."""
    if found is not None:
        console.print(found.describe())


def sources(console: Console, data: PreparedData) -> None:
    """Rows of each source: used, bad, and with nothing to learn."""
    _section(console, "Rows")
    reports = [data.report] + ([data.validation_report] if data.validation_report else [])
    table = [
        (
            source.name,
            source.template,
            *map(_count, (source.total, source.kept, source.bad, source.unsupervised, source.long)),
        )
        for report in reports
        for source in report.sources
    ]
    _print_table(
        console, ("source", "template", "rows", "used", "bad", "nothing supervised", "too long"), table
    )
    console.print(
        f"{_count(len(data.train))} rows to train on, {_count(len(data.validation or ()))} to validate on"
    )
    for report in reports:
        for example in report.bad_examples:
            console.print(f"  skipped {example}")
        for example in report.unsupervised_examples:
            console.print(f"  nothing supervised: {example}")
        notes(console, [*report.notes, *report.warnings])


def cache(console: Console, directory: str, bytes: int, days: float) -> None:
    """Where encoded rows are kept, how much is there, and for how long."""
    told = f"; what nobody reads for {days:g} days goes" if days < float("inf") else ""
    console.print(f"kept, encoded, in the cache {directory} ({bytes / 1e9:.2f} GB in all{told})")


def labels(console: Console, data: PreparedData, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How often each class occurs, the most frequent first, or how numbers lie; returns it, for `train` and
    `validation`."""
    from linchain_cli.data.labelled import label_counts

    found: dict[str, dict[str, Any]] = {}
    for name, verb, rows in (("train", "train", data.train), ("validation", "validate", data.validation)):
        if rows is None:
            continue
        if not classes:
            values = rows.targets
            found[name] = {
                "least": float(values.min()),
                "mean": float(values.mean()),
                "most": float(values.max()),
            }
            shown = ", ".join(f"{word} {value:g}" for word, value in found[name].items())
        else:
            counts = sorted(label_counts(rows, classes).items(), key=lambda item: -item[1])
            found[name] = dict(counts)
            each = [f"{label} {_count(count)}" for label, count in counts]
            shown = ", ".join(each if len(each) <= 12 else [*each[:8], "…", *each[-3:]])
        console.print(f"labels to {verb} on: {shown}")
    return found


def lengths(console: Console, data: PreparedData, max_length: int) -> None:
    """How long rows are, what was cut off, and what is supervised."""
    from linchain_cli.data.report import length_histogram

    report = data.report
    _section(console, "Lengths")
    bins = length_histogram(data.train.lengths, min(max_length, int(data.train.lengths.max())))
    most = max(count for *_, count in bins)
    table = [
        (f"{low:>5,} to {high:>5,}", _count(count), "█" * round(BAR * count / most) or ("▏" if count else ""))
        for low, high, count in bins
    ]
    _print_table(console, ("tokens", "rows", ""), table, bars=True)
    console.print(
        f"longest {_count(report.longest)}; cut off at {_count(max_length)}: {_count(report.truncated)} rows "
        f"({_share(report.truncated, report.kept)})"
    )
    if data.train.store.has_targets:
        return
    console.print(
        f"supervised: {_count(report.supervised_tokens)} of {_count(report.tokens)} tokens "
        f"({_share(report.supervised_tokens, report.tokens)}); tokens that straddle prompt and answer: "
        f"{_count(report.straddling_tokens)} in {_count(report.straddling_rows)} rows"
    )


def epoch(console: Console, plan: EpochPlan, total_steps: int, recipe: Recipe, device: str) -> None:
    """Steps, tokens, and the padding that the recipe's batches leave."""
    training = recipe.training
    at_once = training.rows_at_once(device) or "as many"
    fits = "" if isinstance(at_once, int) else " as fit"
    _section(console, f"One epoch in steps of {training.global_batch_size} rows, {at_once} at once{fits}")
    table = [
        ("steps", _count(plan.steps)),
        ("tokens", _count(plan.tokens)),
        *([("supervised tokens", _count(plan.supervised_tokens))] if recipe.task == "causal" else []),
        ("padding", f"{plan.padding:.1%}"),
        ("padding without sorting by length", f"{plan.padding_unsorted:.1%}"),
    ]
    _print_table(console, ("", ""), table)
    console.print(f"the run takes {_count(total_steps)} steps ({total_steps / plan.steps:.2f} epochs)")


def rows(
    console: Console,
    encoded: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str] | None = None,
) -> None:
    """The first row, one of median length and the longest, with what is supervised marked; or with their
    label, of which these are the `classes` (none: a number)."""
    import numpy as np
    from rich.text import Text

    from linchain_cli.data.labelled import label_name

    colour = console.is_terminal and not console.no_color
    key = "in green" if colour else "between ⟦ and ⟧"
    learned = " and their labels" if classes is not None else f"; what it learns to write {key}"
    _section(console, f"Three rows as the model sees them{learned}")
    by_length = np.argsort(encoded.lengths, kind="stable")
    for row in dict.fromkeys([0, int(by_length[len(by_length) // 2]), int(by_length[-1])]):
        ids, supervised = encoded[row]
        console.print()
        if classes is not None:
            label = label_name(float(encoded.targets[row]), classes)
            console.print(Text(f"row {row}: {len(ids)} tokens, label {label}", style="dim"))
            console.print(Text(_printable(tokenizer.decode(ids.tolist()))))
            continue
        console.print(Text(f"row {row}: {len(ids)} tokens, {int(supervised.sum())} supervised", style="dim"))
        text = Text()
        for part, learned in _runs(ids.tolist(), supervised.tolist(), tokenizer):
            if learned and not colour:
                part = f"⟦{part}⟧"
            text.append(part, style="bold green" if learned else "")
        console.print(text)


def _runs(
    ids: list[int], supervised: list[bool], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """The row's text in pieces that are supervised or not: each is what its tokens add to the text."""
    starts = [i for i in range(len(ids)) if i == 0 or supervised[i] != supervised[i - 1]]
    before = ""
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield _printable(text[len(before) :]), supervised[start]
        before = text


def _printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def tasks(console: Console, tasks: Mapping[str, tuple[int, str]], recipe: Recipe) -> None:
    """What will be evaluated when training is done: the rows of each, and where they are from."""
    if not tasks:
        return
    _section(console, f"Evaluated afterwards, by {recipe.evaluated_by}")
    table = [(name, _count(rows), source) for name, (rows, source) in tasks.items()]
    _print_table(console, ("task", "rows", "from"), table)


def cost(console: Console, forecast: Forecast) -> None:
    """Predicted memory by part, and time."""
    from dataclasses import asdict

    _section(console, f"Predicted cost on {forecast.device}, of one process")
    names = {
        "process": "Python and libraries",
        "base": "base weights",
        "adapters": "chains and their gradients",
        "optimizer": "optimizer state",
        "activations": "activations of the largest micro-batch",
        "logits": "logits",
        "allocator": "gaps that the allocator keeps",
    }
    sizes = {names[part]: size for part, size in asdict(forecast.memory).items() if size}
    sizes["at most, together"] = forecast.memory.total
    _print_table(
        console, ("memory", "MB"), [(name, _count(round(size / 1e6))) for name, size in sizes.items()]
    )
    if forecast.time is not None:
        console.print(
            f"time: {_duration(forecast.time.train_seconds)} for {_count(forecast.total_steps)} steps "
            f"({forecast.time.tokens_per_second:,.0f} tokens per second without padding), and "
            f"{_duration(forecast.time.validation_seconds)} for validation"
        )
    notes(console, forecast.notes)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
