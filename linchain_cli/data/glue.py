"""GLUE's eight tasks (Wang et al., arXiv 1804.07461; WNLI apart): on the hub, and as .tsv files as they were
distributed.

A task is asked for as `glue/rte`. Files are looked for as `RTE/train.tsv` and `RTE/dev.tsv`; the directory
itself, or a file of it, may be named as well. Hub and files have other columns, and the same classes in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.data.files import DataFile, FoundFiles
from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.storage import expand

HUB_ID = "nyu-mll/glue"
PREFIX = "glue/"
_COLA_HEADER = ("source", "label", "mark", "sentence")


@dataclass(frozen=True)
class GlueTask:
    """One task.

    directory: what its files' directory is called
    columns, local_columns: `text`, `text_pair` and `label` on the hub, and in the files where they differ
    classes: in the order of the hub's numbers; none for a regression
    metric: what its leaderboard goes by, of those in recipe/schema.py's METRICS
    validation: the split that runs are judged on, on the hub and as a file
    header: the files' columns, where they have no header line
    """

    directory: str
    columns: Mapping[str, str]
    local_columns: Mapping[str, str]
    classes: tuple[str, ...]
    metric: str
    validation: tuple[str, str] = ("validation", "dev.tsv")
    header: tuple[str, ...] | None = None


def _columns(label: str, text: str, text_pair: str | None = None) -> dict[str, str]:
    pair = {"text_pair": text_pair} if text_pair else {}
    return {"text": text, **pair, "label": label}


_PAIR = _columns("label", "sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        "CoLA",
        _columns("label", "sentence"),
        _columns("label", "sentence"),
        ("unacceptable", "acceptable"),
        "matthews",
        header=_COLA_HEADER,
    ),
    "sst2": GlueTask(
        "SST-2",
        _columns("label", "sentence"),
        _columns("label", "sentence"),
        ("negative", "positive"),
        "accuracy",
    ),
    "mrpc": GlueTask(
        "MRPC",
        _PAIR,
        _columns("Quality", "#1 String", "#2 String"),
        ("not_equivalent", "equivalent"),
        "f1",
    ),
    "qqp": GlueTask(
        "QQP",
        _columns("label", "question1", "question2"),
        _columns("is_duplicate", "question1", "question2"),
        ("not_duplicate", "duplicate"),
        "f1",
    ),
    "stsb": GlueTask("STS-B", _PAIR, _columns("score", "sentence1", "sentence2"), (), "spearman"),
    "mnli": GlueTask(
        "MNLI",
        _columns("label", "premise", "hypothesis"),
        _columns("gold_label", "sentence1", "sentence2"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        validation=("validation_matched", "dev_matched.tsv"),
    ),
    "qnli": GlueTask(
        "QNLI",
        _columns("label", "question", "sentence"),
        _columns("label", "question", "sentence"),
        ("entailment", "not_entailment"),
        "accuracy",
    ),
    "rte": GlueTask("RTE", _PAIR, _PAIR, ("entailment", "not_entailment"), "accuracy"),
}
_OF_DIRECTORY = {task.directory: name for name, task in TASKS.items()}


@dataclass(frozen=True)
class GlueSource:
    """A task with its files; None where it is the hub's."""

    name: str
    files: FoundFiles | None

    @property
    def task(self) -> GlueTask:
        return TASKS[self.name]


def find_glue(path: str, folders: Iterable[Path]) -> GlueSource | None:
    """The task that a source's path means: `glue/rte`, a directory `RTE` of its files, or one of them. None
    for anything else.

    Args:
        folders: where files of a task that is asked for by name may lie, themselves or in a folder `glue`.

    Raises:
        InputError: `glue/` with no task behind it, or WNLI.
    """
    here = expand(path)
    if here.suffix == ".tsv" and here.parent.name in _OF_DIRECTORY and here.is_file():
        name = _OF_DIRECTORY[here.parent.name]
        return GlueSource(name, _one_file(here, TASKS[name]))
    if here.name in _OF_DIRECTORY and here.is_dir():
        name = _OF_DIRECTORY[here.name]
        files = _files(here, TASKS[name])
        return GlueSource(name, files) if files else None
    if not path.startswith(PREFIX) or here.exists():
        return None
    name = path.removeprefix(PREFIX).lower().replace("-", "").replace("_", "")
    if name not in TASKS:
        known = [PREFIX + each for each in TASKS]
        raise InputError(f"data: GLUE has no task '{path}'.{did_you_mean(path, known)} {', '.join(known)}.")
    for folder in folders:
        for place in (folder, folder / "glue", folder / "GLUE"):
            if files := _files(place / TASKS[name].directory, TASKS[name]):
                return GlueSource(name, files)
    return GlueSource(name, None)


def _files(directory: Path, task: GlueTask) -> FoundFiles | None:
    _, dev = task.validation
    found = {"train": directory / "train.tsv", "validation": directory / dev}
    if task.directory == "MNLI":
        found["validation_mismatched"] = directory / "dev_mismatched.tsv"
    splits = {
        split: (DataFile(file, str(file), task.header),) for split, file in found.items() if file.is_file()
    }
    return FoundFiles(str(directory), splits, named=True) if splits else None


def _one_file(file: Path, task: GlueTask) -> FoundFiles:
    return FoundFiles(str(file), {"train": (DataFile(file, str(file), task.header),)})
