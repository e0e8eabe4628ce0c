"""linchain eval"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from linchain_cli import console
from linchain_cli.commands.eval_labels import (
    LabelSettings,
    label_names,
    of_names,
    refuse_other_kind,
    refuse_settings,
)
from linchain_cli.commands.options import AllowOtherBase, Base, Json, ModelDtype, ModelName, PromptTemplate
from linchain_cli.commands.subject import (
    Subject,
    choose_template,
    find_subject,
    load_subject,
    locate_subject,
    predicts_labels,
    subject_tokenizer,
)
from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.evaluation.asked import AskedTask
    from linchain_cli.evaluation.results import Results


def run(
    model: ModelName = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names, such as boolq,piqa; the groups commonsense, arithmetic; a task's .yaml file; "
            "lm_eval:NAME for one of lm-evaluation-harness; for a classifier labelled rows, as data.train "
            "takes them (dev.tsv, glue/rte); left out, those of the run's recipe.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        Literal["likelihood", "generate"],
        typer.Option(help="likelihood compares the options' probabilities; generate lets the model write."),
    ] = "likelihood",
    beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beams of the generate protocol; 1 is greedy; left out, 4, as LLM-Adapters has it.",
            show_default=False,
        ),
    ] = None,
    normalise: Annotated[
        Literal["none", "bytes", "tokens"],
        typer.Option(
            help="What likelihood divides an option's log-probability by; none and bytes are what others "
            "call acc and acc_norm."
        ),
    ] = "none",
    template: PromptTemplate = None,
    dtype: ModelDtype = None,
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
    json: Json = False,
) -> None:
    """Measure a model's accuracy on benchmark tasks."""
    _refuse_unused(protocol, beams, normalise)
    subject = find_subject(model, base, allow_other_base)
    earlier = Path(against) if against is not None and against.endswith(".json") else None
    other = find_subject(against) if against is not None and earlier is None else None
    from linchain_cli.evaluation.asked import load_asked, own_tasks
    from linchain_cli.evaluation.results import read_results, refuse_other_rows
    from linchain_cli.evaluation.store import results_directory

    # Before rows are fetched and before the first evaluation, which may take long, it is known that both
    # models are there, and that their results can be written.
    for each in (subject, other):
        if each is not None:
            locate_subject(each)
    place = out if out is not None else subject.results_dir
    beside = results_directory(place)
    of_other = beside if other is None else _place_of_second(other, beside)
    second = read_results(earlier) if earlier is not None else None
    refuse_other_kind(subject, other)
    if data_dir is None and (section := subject.evaluation) and section.data_dir is not None:
        data_dir = Path(section.data_dir)
    if predicts_labels(subject):
        refuse_settings(protocol, normalise, template)
        labels = LabelSettings(label_names(tasks, subject), dtype, limit, data_dir, batch_tokens)
        if second is not None:
            second = of_names(second, labels.names, earlier)
        firsts = [labels.evaluate(subject, place, like=other)]
        seconds = [second]
        if other is not None:
            seconds = [labels.evaluate(other, of_other, like=subject)]
        _tell(firsts, seconds, json, references)
        return
    names = _task_names(tasks, subject)
    _refuse_with_harness(names, out, earlier)
    loaded_tasks = load_asked(names, data_dir, limit)
    if second is not None:
        refuse_other_rows(second, own_tasks(loaded_tasks), earlier)
        second = second.of_tasks(task.name for task in loaded_tasks)
    settings = _Settings(protocol, beams, normalise, template, dtype, limit, batch_tokens)
    firsts = settings.evaluate(subject, loaded_tasks, place)
    seconds = [second] * len(firsts)
    if other is not None:
        seconds = settings.evaluate(other, loaded_tasks, of_other, like=subject)
    _tell(firsts, seconds, json, references)


def _refuse_unused(protocol: str, beams: int | None, normalise: str) -> None:
    """Raises InputError for an option of the other protocol, which would change nothing."""
    if protocol == "likelihood" and beams is not None:
        raise InputError(
            f"--beams {beams} is about written answers: add --protocol generate, or leave it out"
        )
    if protocol == "generate" and normalise != "none":
        raise InputError(
            f"--normalise {normalise} is about likelihoods, and with --protocol generate the model writes:"
            " leave one of them out"
        )


def _place_of_second(other: Subject, beside: Path) -> Path:
    """Where the second model's results go: to its others, or beside the first one's where that can only be
    read."""
    from linchain_cli.evaluation.store import results_directory

    try:
        return results_directory(other.results_dir)
    except InputError:
        return beside


def _tell(firsts: Sequence[Results], seconds: Sequence[Results | None], json: bool, references: bool) -> None:
    """Prints results, each with what it is compared with."""
    if is_first_process():
        pairs = list(zip(firsts, seconds, strict=True))
        if json:
            console.print_json([_as_json(*pair) for pair in pairs])
            return
        for one, against_it in pairs:
            _show(one, against_it, references)


def _task_names(tasks: str | None, subject: Subject) -> Sequence[str]:
    if tasks is not None:
        return [tasks]
    section = subject.evaluation
    if section is None or not section.tasks:
        raise InputError("--tasks is missing: name tasks, such as --tasks boolq,piqa or --tasks commonsense")
    return section.tasks


def _refuse_with_harness(names: Sequence[str], out: Path | None, earlier: Path | None) -> None:
    """What tasks of lm-evaluation-harness, whose result is one of its own, do not go with."""
    from linchain_cli.evaluation.harness import split_names

    own, theirs = split_names(names)
    if theirs and earlier is not None:
        raise InputError(f"--against {earlier}: name the second model itself where tasks are lm_eval's")
    if theirs and own and out is not None and out.suffix == ".json":
        raise InputError(f"--out {out}: lm_eval's tasks have a result of their own: name a directory")


@dataclass(frozen=True)
class _Settings:
    protocol: Literal["likelihood", "generate"]
    beams: int | None
    normalise: Literal["none", "bytes", "tokens"]
    template: str | None
    dtype: str | None
    limit: int | None
    batch_tokens: int | None

    def evaluate(
        self, subject: Subject, tasks: Sequence[AskedTask], out: Path, like: Subject | None = None
    ) -> list[Results]:
        """Loads the subject, evaluates it, and lets go of it again."""
        from linchain_cli.evaluation.asked import evaluate_asked
        from linchain_cli.evaluation.evaluate import BEAMS
        from linchain_cli.training.processes import told_when_lost
        from linchain_cli.training.signals import stop_requests

        tokenizer = subject_tokenizer(subject)
        asked = choose_template(subject, tokenizer, self.template, like)
        loaded = load_subject(subject, self.dtype, tokenizer)
        if is_first_process():
            console.note(f"{subject.name}: template {asked.template.name}, {asked.why}")
        stopped = "stopped: the rows that are done are kept, and the same command goes on from them"
        with told_when_lost(), stop_requests(stopped):
            return evaluate_asked(
                loaded.model,
                loaded.tokenizer,
                asked.template,
                tasks,
                name=subject.name,
                title=subject.name,
                system=asked.system,
                protocol=self.protocol,
                beams=self.beams or BEAMS,
                normalise=self.normalise,
                straddles=asked.straddles,
                limit=self.limit,
                batch_tokens=self.batch_tokens,
                base_sha256=loaded.base_sha256,
                quantization=loaded.quantization,
                out=out,
            )


def _compared(first: Results, second: Results | None) -> dict[str, Any] | None:
    """The comparison of both, kept in the first one's file; None where there is nothing to compare."""
    from linchain_cli.evaluation.results import compare, is_comparable
    from linchain_cli.evaluation.store import add_comparison

    if second is None or not any(map(is_comparable, first.summary.tasks.values())):
        return None
    comparison = compare(first, second)
    add_comparison(first.path, comparison)
    return comparison


def _as_json(first: Results, second: Results | None) -> dict[str, Any]:
    """A result as its file has it, and where that lies."""
    from linchain_cli.evaluation.show import write_chart

    comparison = _compared(first, second)
    write_chart([first] if second is None else [first, second], first.path.with_suffix(".png"))
    found = {"results": str(first.path), **first.summary.to_json()}
    return found | ({"against": [comparison]} if comparison is not None else {})


def _show(first: Results, second: Results | None, references: bool) -> None:
    """Tables, the chart, and where everything lies."""
    from linchain_cli.evaluation.show import print_comparison, print_published, print_results, write_chart
    from linchain_cli.result_files import describe, find_evaluations

    for results in (first, second):
        if results is not None:
            if results.known:
                print(f"measured before: {', '.join(results.known)} (in {results.path})")
            print_results(results)
    comparison = _compared(first, second)
    if comparison is not None:
        print_comparison(first, comparison)
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
