"""linchain eval"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from linchain_cli.commands.options import AllowOtherBase, Base, Dtype, ModelName
from linchain_cli.commands.origin import is_first_process
from linchain_cli.commands.subject import Subject, find_subject, load_subject, locate_subject
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.evaluation.results import Results
    from linchain_cli.evaluation.task import Task


def run(
    model: ModelName = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names, such as boolq,piqa; the groups commonsense, arithmetic; a task's .yaml file; "
            "left out, those of the run's recipe.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        Literal["likelihood", "generate"],
        typer.Option(help="likelihood compares the options' probabilities; generate lets the model write."),
    ] = "likelihood",
    beams: Annotated[int, typer.Option(min=1, help="Beams of the generate protocol; 1 is greedy.")] = 4,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt template; left out, the run's own, or alpaca.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Left out, float32 on a CPU and the recipe's elsewhere.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of each task.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="LINCHAIN_DATA_DIR",
            help="Local test files, DIR/<task>/test.json in the LLM-Adapters format.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Second model, evaluated on the same rows and compared; or the .json of its evaluation.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .json file, or a directory, for the result; left out, the run's eval/ or "
            "./eval-<organisation>-<model name>/.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of a batch; left out, what suits the device.", show_default=False
        ),
    ] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references", help="Also show published accuracies of the same tasks, with their source."
        ),
    ] = False,
) -> None:
    """Measure a model's accuracy on benchmark tasks."""
    subject = find_subject(model, base, allow_other_base)
    earlier = Path(against) if against is not None and against.endswith(".json") else None
    other = find_subject(against) if against is not None and earlier is None else None
    from linchain_cli.evaluation.results import read_results, refuse_other_rows
    from linchain_cli.evaluation.store import results_directory
    from linchain_cli.evaluation.tasks import load_tasks

    # Before rows are fetched and before the first evaluation, which may take long, it is known that both
    # models are there, and that their results can be written.
    for each in (subject, other):
        if each is not None:
            locate_subject(each)
    place = out if out is not None else subject.results_dir
    for target in (place, other.results_dir if other is not None else place):
        results_directory(target)
    second = read_results(earlier) if earlier is not None else None
    if data_dir is None and subject.recipe is not None and subject.recipe.evaluation.data_dir is not None:
        data_dir = Path(subject.recipe.evaluation.data_dir)
    loaded_tasks = load_tasks(_task_names(tasks, subject), data_dir, limit)
    if second is not None:
        refuse_other_rows(second, loaded_tasks, earlier)
        second = second.of_tasks(task.name for task in loaded_tasks)
    settings = _Settings(protocol, beams, dtype, limit, batch_tokens)
    first = settings.evaluate(subject, template or subject.template, loaded_tasks, place)
    if other is not None:
        # A second model that is no run has no template of its own: it gets the same prompts as the first.
        other_template = template or (other if other.recipe else subject).template
        second = settings.evaluate(other, other_template, loaded_tasks, other.results_dir)
    if is_first_process():
        _show(first, second, references)


def _task_names(tasks: str | None, subject: Subject) -> Sequence[str]:
    if tasks is not None:
        return [tasks]
    if subject.recipe is None or not subject.recipe.evaluation.tasks:
        raise InputError("--tasks is missing: name tasks, such as --tasks boolq,piqa or --tasks commonsense")
    return subject.recipe.evaluation.tasks


@dataclass(frozen=True)
class _Settings:
    protocol: Literal["likelihood", "generate"]
    beams: int
    dtype: str | None
    limit: int | None
    batch_tokens: int | None

    def evaluate(
        self, subject: Subject, template: str | Mapping[str, Any], tasks: Sequence[Task], out: Path
    ) -> Results:
        """Loads the subject, evaluates it, and lets go of it again."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from linchain_cli.data.templates import get_template
        from linchain_cli.evaluation.evaluate import evaluate

        loaded = load_subject(subject, self.dtype)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_stderr(), transient=True, disable=not is_first_process()) as bar:
            handle = bar.add_task(subject.name, total=sum(len(task.rows) for task in tasks))
            return evaluate(
                loaded.model,
                loaded.tokenizer,
                get_template(template, loaded.tokenizer, subject.chat),
                tasks,
                name=subject.name,
                protocol=self.protocol,
                beams=self.beams,
                limit=self.limit,
                batch_tokens=self.batch_tokens,
                base_sha256=loaded.base_sha256,
                quantization=loaded.quantization,
                out=out,
                on_progress=lambda task, done, _: bar.update(handle, description=task, completed=done),
            )


def _stderr():
    from rich.console import Console

    return Console(stderr=True)


def _show(first: Results, second: Results | None, references: bool) -> None:
    """Tables, the chart, and where everything lies."""
    from linchain_cli.evaluation.results import compare
    from linchain_cli.evaluation.show import print_comparison, print_published, print_results, write_chart
    from linchain_cli.evaluation.store import add_comparison
    from linchain_cli.evaluations import describe, find_evaluations

    for results in (first, second):
        if results is not None:
            if results.known:
                print(f"measured before: {', '.join(results.known)} (in {results.path})")
            print_results(results)
    if second is not None:
        comparison = compare(first, second)
        print_comparison(first, comparison)
        add_comparison(first.path, comparison)
    if references:
        print_published(first)
    chart = first.path.with_suffix(".png")
    drawn = write_chart([first] if second is None else [first, second], chart)
    places = [f"results: {first.path}"]
    places += [f"chart: {chart}"] if drawn else []
    places += [f"second model: {second.path}"] if second is not None else []
    print(", ".join(places))
    for one in find_evaluations(first.path.parent)[0]:
        if one.path != first.path and one.evaluation.base_sha256 == first.summary.base_sha256:
            print(f"beside it: {one.path.name} ({describe(one.evaluation)})")
