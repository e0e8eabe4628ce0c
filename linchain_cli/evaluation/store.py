"""Where results go: tasks of one setting into one file, another setting beside it, nothing over anything.

Several processes may evaluate one model at once: whoever is done adds its tasks under a lock, reading again
what the others have added in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from linchain_cli.chain.files import adapter_hash
from linchain_cli.directories import refuse_unwritable
from linchain_cli.errors import InputError
from linchain_cli.evaluation.results import Results, predictions_path, read_results
from linchain_cli.locks import locked
from linchain_cli.recipe import EvaluationConfig
from linchain_cli.result_files import Evaluation, Found, describe, find_evaluations, first_of, read_evaluation
from linchain_cli.run import RunDirectory
from linchain_cli.storage import expand, make_directory

LOCK_SECONDS = 60.0


class ResultStore:
    """The results at `out`: a directory, whose files it names itself, or one .json file.

    Raises:
        InputError: nothing can be written there, or the file is taken by something else.
    """

    def __init__(self, out: Path, setting: Evaluation):
        self._setting = setting
        out = expand(out)
        self.directory = results_directory(out)
        self._file = out if self.directory != out else None
        if self._file is not None:
            self._refuse_taken(self._file)

    def _refuse_taken(self, file: Path) -> None:
        """A file that was named is not quietly replaced by one beside it."""
        if not file.exists():
            if (rows := predictions_path(file)).exists():
                raise InputError(f"--out {file}: {rows} is there already: name another file")
            return
        there = read_evaluation(file)
        if there.setting != self._setting.setting:
            raise InputError(
                f"--out {file} holds another result ({there.model}: {describe(there)}): name another file, or"
                " a directory, where each setting gets a file of its own"
            )

    def measured(self, fingerprints: Mapping[str, str]) -> Results | None:
        """The tasks, by name and fingerprint, that were measured already; None without any."""
        found: Results | None = None
        for one in self._of_setting():
            names = [
                name
                for name, score in one.evaluation.tasks.items()
                if score.fingerprint is not None and score.fingerprint == fingerprints.get(name)
            ]
            if names:
                there = read_results(one.path).of_tasks(names)
                found = found.with_tasks_of(there) if found else there
        return found

    def _of_setting(self) -> list[Found]:
        """What is there already of this setting."""
        if self._file is None:
            found, _ = find_evaluations(self.directory)
        else:
            found = [Found(self._file, read_evaluation(self._file))] if self._file.exists() else []
        return [one for one in found if one.evaluation.setting == self._setting.setting]

    def add(self, results: Results) -> Results:
        """Writes the results into the file of their setting; what it held stays.

        Returns all that the file holds now, with its path.
        """
        make_directory(self.directory)
        with locked(self.directory / "results", LOCK_SECONDS):
            for path in self._names():
                merged = self._merged(path, results)
                if merged is not None:
                    merged.write(path)
                    return replace(merged, path=path)
        raise AssertionError("there is always another name")

    def _names(self) -> Iterator[Path]:
        """The file that was named, or `<protocol>.json`; a name that says what is different; numbers."""
        first = self._file or self.directory / f"{self._setting.protocol}.json"
        yield first
        stem = first.stem
        if self._file is None and first.exists():
            try:
                stem = "-".join([stem, *_differences(self._setting, read_evaluation(first))])
            except InputError:
                stem = first.stem
            if stem != first.stem:
                yield first.with_name(f"{stem}.json")
        yield from (first.with_name(f"{stem}-{number}.json") for number in count(2))

    def _merged(self, path: Path, results: Results) -> Results | None:
        """What the file at `path` would hold with these results; None if they do not belong there."""
        if not path.exists():
            return None if predictions_path(path).exists() else results
        try:
            there = read_results(path)
        except InputError:
            return None
        if there.summary.setting != self._setting.setting:
            return None
        tasks = results.summary.tasks
        for name, score in there.summary.tasks.items():
            if name in tasks and tasks[name].fingerprint != score.fingerprint:
                return None
        return there.with_tasks_of(results)


def add_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Keeps a comparison in the result file at `path`, in place of one of the same two models and tasks."""
    with locked(path.parent / "results", LOCK_SECONDS):
        results = read_results(path)
        others = [one for one in results.summary.against if _pair(one) != _pair(comparison)]
        summary = results.summary.model_copy(update={"against": [*others, dict(comparison)]})
        replace(results, summary=summary).write(path)


def stored_result(
    directory: Path,
    adapter_sha256: str | None,
    section: EvaluationConfig,
    tasks: Iterable[str] = (),
    protocol: str | None = None,
) -> Found | None:
    """The result, of those in a directory, that `section` asked for: of that adapter, or of a model without
    one. `protocol` stands in for the section's, of models that predict labels."""
    found, _ = find_evaluations(directory)
    return first_of(
        found, protocol or section.protocol, limit=section.limit, adapter_sha256=adapter_sha256, tasks=tasks
    )


def run_result(
    run: RunDirectory, section: EvaluationConfig, tasks: Iterable[str] = (), protocol: str | None = None
) -> Evaluation | None:
    """`stored_result` of those below the run's eval/: of its adapter as it is now."""
    found = stored_result(run.eval_dir, adapter_hash(run.adapter_dir), section, tasks, protocol)
    return found and found.evaluation


def results_directory(out: Path) -> Path:
    """Where the result for `out`, a .json file or a directory, goes.

    Raises:
        InputError: `out` is neither, or nothing can be written there.
    """
    out = expand(out)
    if out.suffix != ".json" and out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: expected a .json file or a directory for the results")
    directory = out.parent if out.suffix == ".json" and not out.is_dir() else out
    refuse_unwritable(directory, "name another place for the results, such as --out results")
    return directory


def _pair(comparison: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which model, in which respects evaluated otherwise, on which tasks."""
    keys = ("model", "adapter_sha256", "base_sha256", "differences_in_settings")
    return (*(comparison.get(key) for key in keys), list(comparison["tasks"]))


def _differences(setting: Evaluation, first: Evaluation) -> list[str]:
    """What a file's name says of its setting, where it is not that of the first one."""
    words = []
    if setting.template != first.template and setting.template:
        words.append(setting.template)
    if setting.dtype != first.dtype and setting.dtype:
        words.append(setting.dtype)
    if setting.beams != first.beams and setting.beams:
        words.append(f"beams{setting.beams}")
    if setting.normalise != first.normalise and setting.normalise:
        words.append(f"per-{setting.normalise.removesuffix('s')}" if setting.normalise != "none" else "sum")
    if setting.limit != first.limit:
        words.append(f"limit{setting.limit}" if setting.limit else "all")
    return words
