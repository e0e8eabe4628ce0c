"""One training run from a recipe to a finished run directory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils import deterministic

from linchain_cli import run as runs
from linchain_cli import storage
from linchain_cli.chain import load_adapter, named_tensors, save_adapter
from linchain_cli.console import note, warn
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.machine import SharedCpus, limit_threads
from linchain_cli.recipe import Recipe, load_recipe
from linchain_cli.run import KeptAdapter, RunDirectory, Timings
from linchain_cli.training import job as jobs
from linchain_cli.training import state as states
from linchain_cli.training.base import Base
from linchain_cli.training.display import Display
from linchain_cli.training.job import Job
from linchain_cli.training.loop import train
from linchain_cli.training.memory import explained, find_tokens, run_heaviest
from linchain_cli.training.metrics import reset_peak_memory
from linchain_cli.training.processes import (
    answering_soon,
    connect,
    from_main,
    lost_connection,
    on_main,
    raise_on_all,
    together,
)
from linchain_cli.training.signals import stop_requests
from linchain_cli.training.threads import LoadedCpus
from linchain_cli.training.trackers import check_trackers, tracking


def run_training(
    recipe: Recipe,
    *,
    resume: bool = False,
    fresh: bool = False,
    base: Base | None = None,
    labels: dict[str, Any] | None = None,
    brief: bool = False,
    ready: Callable[[Job], None] | None = None,
) -> Job | None:
    """Trains what `recipe` describes into its run directory.

    Args:
        resume: continue a stopped run. fresh: replace an existing one.
        base: a loaded base model to use; its chains are taken out again at the end only by the caller.
        labels: fields to add to run.json (a comparison marks its arms so).
        brief: show less of it where there is no terminal, as one of many runs.
        ready: looks at the job on every process before anything is spent or written; what it raises ends the
            run.

    Returns:
        The finished job, its model carrying what adapter/ holds; None when the run had finished before and
        the recipe asks for no more.

    Raises:
        InputError: the recipe, what it names, or the run directory does not allow it.
        Stopped: a signal ended it after a checkpoint. LinchainError: it failed.
        SystemExit: on one of several processes, when another one tells the error.
    """
    _refuse_place_without_text()
    check_trackers(recipe)
    limit_threads()
    cpus = SharedCpus(torch.get_num_threads())
    run = RunDirectory(recipe.run_path)
    with contextlib.ExitStack() as held:
        held.callback(torch.set_num_threads, cpus.limit)
        stop = held.enter_context(stop_requests("stopped before the first step: nothing was written"))
        held.enter_context(_deterministic(recipe.training.deterministic))
        held.enter_context(_whole_sums())
        accelerator = connect(recipe.training.trackers, run.path / "trackers")
        say = note if accelerator.is_main_process else (lambda message: None)
        began = time.perf_counter()
        found, taken = from_main(accelerator, lambda: _claim(run, recipe, resume, fresh, held))
        job = None if found == FINISHED else jobs.prepare(recipe, run, accelerator, base, resume=found != NEW)
        if job is None or found == LONGER and job.total_steps <= taken:
            say(f"{run.path} is finished already; nothing to resume")
            return None
        if found != NEW:
            stop.message = f"stopped before the next step: {run.path} is as it was"
        if ready is not None:
            together(accelerator, lambda: ready(job))
        say(jobs.chain_coverage(job).describe())
        if job.auto_rate is not None:
            say(job.auto_rate.describe())
        for told in job.data.report.notes:
            say(told)
        for warning in jobs.warnings(job):
            if accelerator.is_main_process:
                warn(warning)
        if resume:
            jobs.resume(job, say, found == LONGER)
        with explained(job.recipe, job.device), _plainly(job):
            settle_micro_batch(job, say)
            together(accelerator, lambda: run_heaviest(job))
        seconds = round(time.perf_counter() - began, 3)
        on_main(accelerator, lambda: _open(job, found, labels or {}, seconds))
        with _told_in_status(job):
            quiet = not accelerator.is_main_process
            display = Display(job.total_steps, job.state.step, quiet, brief)
            reset_peak_memory(job.device)  # loading and trying sizes may have held more than training does
            with tracking(job), display, answering_soon():
                train(job, display, stop, LoadedCpus(job, cpus, display.note))
            _finish(job)
        if signum := from_main(accelerator, lambda: stop.signum):  # it came too late to stop a step
            raise_on_all(accelerator, Stopped(f"{run.path} is finished; nothing was done after that", signum))
    return job


def _refuse_place_without_text() -> None:
    """Raises InputError where the name of the current directory, which run.json tells, is in an encoding of
    its own. Names that a recipe gives are text."""
    place = os.getcwd()
    try:
        place.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(place).decode(errors="backslashreplace")
        raise InputError(f"{shown}: this directory's name is not UTF-8: train in another one") from None


def finished_job(run: RunDirectory) -> Job:
    """The job of a run that has finished, its model carrying what adapter/ holds: for what follows training.

    Raises:
        InputError: what the run's recipe names is gone, or its adapter is missing or damaged.
    """
    limit_threads()
    accelerator = connect()
    recipe = from_main(accelerator, lambda: load_recipe(run.recipe_path))
    adapter = from_main(accelerator, lambda: load_adapter(run.adapter_dir))
    job = jobs.prepare(recipe, run, accelerator, resume=True)
    states.restore(job.parameters, named_tensors(adapter))
    return job


NEW, CONTINUE, FINISHED, LONGER = "new", "continue", "finished", "longer"


def _claim(
    run: RunDirectory, recipe: Recipe, resume: bool, fresh: bool, held: contextlib.ExitStack
) -> tuple[str, int]:
    """Locks the run for this process, and says what is there and how many steps a finished run took.

    LONGER is a finished run of which the recipe now says otherwise how long it is: it may have to go on.
    """
    held.enter_context(run.lock())
    if not (resume and run.exists()):
        run.check_free(replace=fresh)
        return NEW, 0
    status = run.read_status()
    if not status.finished:
        return CONTINUE, 0
    before, now = load_recipe(run.recipe_path).training, recipe.training
    same = all(getattr(before, key) == getattr(now, key) for key in ("epochs", "max_steps", "early_stopping"))
    return FINISHED if same else LONGER, status.step or 0


def settle_micro_batch(job: Job, say: Callable[[str], None]) -> None:
    """A resumed run keeps the size it had, also where `auto` found it."""
    state = job.state
    if state.micro_batch_size is None and state.micro_batch_tokens is None:
        state.micro_batch_size = job.recipe.training.rows_at_once(job.device.type)
        if state.micro_batch_size is None:
            state.micro_batch_tokens = find_tokens(job, say)


def _open(job: Job, found: str, labels: dict[str, Any], prepare_seconds: float) -> None:
    """Writes (or cuts back) the run's files to where the job stands."""
    run, step = job.run, job.state.step
    if found != NEW:
        storage.write_atomic(run.recipe_path, job.recipe.to_yaml())
        storage.remove_staging(run.path)
        storage.remove_staging(run.checkpoints_dir)
        job.store.drop_after(step)
        for path in (run.metrics_path, run.rows_path):
            runs.cut_jsonl(path, step)
    else:
        run.create(job.recipe.to_yaml(), replace=True)
    run.update_status(
        status="running",
        reason=None,
        started_at=runs.now(),
        finished_at=None,
        resumed_from=step if found != NEW else None,
        timings=Timings(prepare_seconds=prepare_seconds),
        **jobs.description(job),
        **labels,
    )


def _finish(job: Job) -> None:
    """Puts what is kept into the model of every process; the first one writes adapter/ and the status.

    It is the first one's: processes on unlike devices round otherwise, and theirs may have other last digits.
    """
    if job.recipe.training.keep == "best":
        states.restore(job.parameters, job.best)
    if job.accelerator.num_processes > 1:
        kept = from_main(job.accelerator, lambda: states.snapshot(job.parameters))
        states.restore(job.parameters, kept)
    on_main(job.accelerator, lambda: _write_result(job))


def _write_result(job: Job) -> None:
    state, run, keep = job.state, job.run, job.recipe.training.keep
    run.check_there()
    save_adapter(job.adapter(), run.adapter_dir)
    timings = replace(run.read_status().timings, train_seconds=round(state.seconds, 3))
    run.update_status(
        status="finished",
        finished_at=runs.now(),
        step=state.step,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        tokens_per_second=round(state.tokens / state.seconds, 2) if state.seconds else None,
        validation_loss=state.best_loss,
        adapter=KeptAdapter(step=state.best_step if keep == "best" else state.step, kept=keep),
        timings=timings,
    )


@contextlib.contextmanager
def _told_in_status(job: Job) -> Iterator[None]:
    """Writes into run.json how the block ended if it raised, with the expected failures in plain words."""
    watched = job.run.watched() if job.accelerator.is_main_process else contextlib.nullcontext()
    with watched, _written_into_status(job), explained(job.recipe, job.device), _plainly(job):
        yield


@contextlib.contextmanager
def _written_into_status(job: Job) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if job.accelerator.is_main_process:
            with contextlib.suppress(OSError, LinchainError):
                job.run.check_there()
                status = "stopped" if isinstance(error, Stopped) else "failed"
                job.run.update_status(status=status, step=job.state.step, reason=_reason(error))
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "another process failed"
    return str(error) if isinstance(error, LinchainError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _plainly(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        job.run.check_there()
        raise LinchainError(
            f"{error.filename or job.run.path}: {error.strerror or error}."
            " The checkpoints up to here are kept; continue with --resume."
        ) from error
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            if stopped := _stop_behind(error):
                raise stopped from None
            reason = " ".join(str(error).split())[:200]
            raise LinchainError(
                f"training.compile: torch cannot compile the blocks here ({reason}); set it to false"
            ) from error
        if job.accelerator.num_processes > 1 and (told := lost_connection(error)):
            raise LinchainError(told) from error
        raise


def _stop_behind(error: BaseException | None) -> Stopped | None:
    """The stop that a signal asked for while torch was compiling, which wraps whatever is raised then."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Algorithms that give the same bits again on CUDA too; the CPU's do with a fixed number of threads."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Or each new tensor would be written twice, every weight that is restored from 4 bit among them.
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def _whole_sums() -> Iterator[None]:
    """Products in 16 bit keep their sums in float32 also where cuBLAS takes them in parts."""
    products = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    try:
        for name in names:
            setattr(products, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(products, name, value)
