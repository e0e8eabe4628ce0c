"""Which run is meant, and which adapter of it: a run directory, one of its checkpoints, or none named at
all."""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.run.directory import ComparisonDirectory, RunDirectory, in_use
from linchain_cli.run.status import RunStatus
from linchain_cli.storage import expand

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
_ADAPTER_FILE = "chain.json"


@dataclass(frozen=True)
class Opened:
    """A run and one adapter of it. `step` is that of a checkpoint, None where it is what the run kept in the
    end; `note` says why it is that one, where nobody asked for it."""

    run: RunDirectory
    status: RunStatus
    adapter_dir: Path
    step: int | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The path to name it by."""
        return str(self.run.path if self.step is None else self.adapter_dir)

    def place(self, name: str) -> Path:
        """Where something that is made of this adapter goes by default: another place for a checkpoint."""
        return self.run.path / (name if self.step is None else f"{name}-{self.adapter_dir.name}")


def newest_finished_run(root: Path | str = "runs") -> RunDirectory:
    """The run below `root` that finished last; arms of a comparison and repetitions do not count.

    Raises:
        InputError: there is none.
    """
    root = Path(root)
    candidates = []
    # What is hidden is a run on its way in or out.
    for path in sorted(root.glob("[!.]*")) if root.is_dir() else ():
        run = RunDirectory(path)
        if not run.exists():
            continue
        try:
            status = run.read_status()
        except InputError as error:
            logger.warning("passed over: %s", error)
            continue
        if status.finished and not status.comparison and not status.reproduces:
            candidates.append((status.finished_at or status.created_at or "", path.name, run))
    if not candidates:
        raise InputError(
            f"no finished run below {root}/: name a run directory, or train one with 'linchain train RECIPE'"
        )
    return max(candidates)[2]


def find_run(path: Path | str | None) -> RunDirectory:
    """The run at `path`, however it stands, or the newest finished one when `path` is None.

    Raises:
        InputError: there is none there.
    """
    if path is None:
        return newest_finished_run()
    run = RunDirectory(path := expand(path))
    if run.exists():
        return run
    if (comparison := ComparisonDirectory(path)).exists():
        raise InputError(f"{path} is a comparison: name one of its runs, which lie in {comparison.arms_dir}/")
    parent, below = run.path.parent, Path("runs")
    near = did_you_mean(run.path.name, [each.name for each in runs_below(parent)])
    if not near and parent == Path("."):
        near = did_you_mean(str(below / run.path.name), [str(each) for each in runs_below(below)])
    raise InputError(f"{path} is not a run directory: it has no run.json.{near}")


def find_adapter(path: Path | str | None) -> Opened:
    """The adapter that a RUN argument means: what a finished run kept, a checkpoint that is named, or the
    newest checkpoint of a run that has not finished.

    Raises:
        InputError: there is no such run, or it has no adapter yet.
    """
    if path is not None and (found := _named_part(expand(path))):
        return found
    run = find_run(path)
    status = run.read_status()
    if status.finished:
        if not is_adapter(run.adapter_dir):
            raise InputError(f"{run.path} is finished, but its adapter is gone: {run.adapter_dir} is missing")
        return Opened(run, status, run.adapter_dir)
    going_on = status.status == "running" and in_use(run.path)
    state = "is going on" if going_on else "was killed" if status.status == "running" else status.ended
    steps = _checkpoints(run)
    if not steps:
        again = f"continue it with 'linchain train {shlex.quote(str(run.recipe_path))} --resume'"
        way = "wait for one" if going_on else again
        raise InputError(f"{run.path} {state} and has no checkpoint yet: {way}")
    step = max(steps)
    note = f"{run.path} {state}: taking its newest checkpoint, {steps[step].name}"
    return Opened(run, status, steps[step], step, note)


def is_adapter(path: Path | str) -> bool:
    """Whether `path` is an adapter's directory, such as a checkpoint of a run."""
    return (Path(path) / _ADAPTER_FILE).is_file()


def _named_part(path: Path) -> Opened | None:
    """A checkpoint or adapter/ of a run, named by its own path."""
    if not is_adapter(path):
        return None
    place = path.resolve()
    match = CHECKPOINT_NAME.fullmatch(place.name)
    below = place.parents[1] if match and place.parent.name == "checkpoints" else place.parent
    try:
        # As it was written, where that can be: messages then name what the user typed.
        written = path.parents[len(place.relative_to(below).parts) - 1]
        run = RunDirectory(written if written.resolve() == below else below)
    except IndexError:
        run = RunDirectory(below)
    if not run.exists():
        raise InputError(
            f"{path} is an adapter apart from its run: keep it in the run's directory, whose recipe.yaml and"
            " run.json name its base and template"
        )
    if match:
        return Opened(run, run.read_status(), path, int(match[1]))
    return Opened(run, run.read_status(), path)


def _checkpoints(run: RunDirectory) -> dict[int, Path]:
    matches = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in run.checkpoints_dir.glob("step-*")}
    return {int(match[1]): path for path, match in matches.items() if match and is_adapter(path)}


def runs_below(directory: Path) -> list[Path]:
    """The runs that lie directly in a directory."""
    try:
        return [path for path in directory.iterdir() if RunDirectory(path).exists()]
    except OSError:
        return []
