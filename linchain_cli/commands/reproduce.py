"""linchain reproduce"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linchain_cli import console
from linchain_cli.commands.named_run import NamedRun
from linchain_cli.commands.options import Base, Json
from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.recipe import Recipe
    from linchain_cli.run import RunDirectory, RunStatus
    from linchain_cli.training.job import Job
    from linchain_cli.training.reproduction import Reproduction

DIFFERENT = 1  # the exit code where another adapter comes out


def run(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    base: Base = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="In which directory RUN-reproduced goes; left out, in that of RUN.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run of an earlier reproduction.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a run again beside it, and say whether it is the same.

    The second run is RUN-reproduced. Exit code 0: the adapters are bitwise the same; 1: they are not.
    """
    from linchain_cli.recipe import load_recipe
    from linchain_cli.run import Opened, find_run
    from linchain_cli.storage import expand
    from linchain_cli.training.launch import end_with_launcher, launched, run_processes
    from linchain_cli.training.reproduction import changed_surroundings, check_recipe, recipe_again

    first = find_run(run_path)
    status, recipe = first.read_status(), load_recipe(first.recipe_path)
    check_recipe(first, recipe, status)
    named = NamedRun(Opened(first, status, first.adapter_dir), recipe)
    place = first.path.parent if output_dir is None else expand(output_dir)
    again = recipe_again(recipe, status, first, named.base_directory(base), place)
    second = _free(again.run_path, overwrite)
    surroundings = changed_surroundings(status)  # it sets the number of threads, of processes to come as well
    processes = status.machine.processes or 1
    if not launched() and processes > 1:
        raise typer.Exit(run_processes(sys.argv[1:], processes))
    end_with_launcher()
    if is_first_process():
        for name, (before, now) in surroundings.items():
            console.warn(f"{name} is {now} here and was {before}: the last bits may differ for it")
        console.note(f"training {second.path}")
    _train(again, status, first)
    if is_first_process():
        _tell(first, second, surroundings, json)


def _free(path: Path, overwrite: bool) -> RunDirectory:
    """Where the second run goes. Only what `reproduce` itself wrote there is replaced."""
    from linchain_cli.run import RunDirectory

    second = RunDirectory(path)
    if second.exists():
        ours = second.read_status().reproduces is not None
        if not ours or not overwrite:
            way = "replace it with --overwrite, or move it away" if ours else "move it away"
            raise InputError(f"{path} exists and is left as it is: {way}")
    second.check_free(replace=overwrite)
    return second


def _train(again: Recipe, status: RunStatus, first: RunDirectory) -> None:
    from linchain_cli.training.processes import disconnect
    from linchain_cli.training.reproduction import check_job
    from linchain_cli.training.runner import run_training

    def check(job: Job) -> None:
        check_job(job, status, first)
        job.state.micro_batch_tokens = status.micro_batch_tokens  # what `auto` came to, not measured again

    run_training(again, fresh=True, ready=check, labels={"reproduces": first.path.resolve().name})
    disconnect()


def _tell(first: RunDirectory, second: RunDirectory, surroundings: Any, json: bool) -> None:
    from linchain_cli.training.reproduction import compare_runs

    found = compare_runs(first, second, surroundings)
    if json:
        about = {"run": str(first.path), "reproduced": str(second.path)}
        console.print_json(about | asdict(found))
    else:
        print("\n".join(_lines(first, second, found)))
    if not found.same:
        raise typer.Exit(DIFFERENT)


def _lines(first: RunDirectory, second: RunDirectory, found: Reproduction) -> list[str]:
    if found.same:
        lines = [f"the same: every tensor of {second.path} is bit for bit that of {first.path}"]
    else:
        count, total, largest = found.tensors
        lines = [
            f"different: {count} of {total} tensors of {second.path} are not those of {first.path}, by at"
            f" most {largest:.3g}"
        ]
    if found.rows_from is not None:
        lines.append(f"  other rows were read from step {found.rows_from} on")
    if found.first is not None:
        one = found.first
        lines.append(f"  from step {one.step} on: {one.what} was {one.before} and is {one.now}")
    else:
        lines.append(f"  all {found.logged} logged values are the same")
    return lines
