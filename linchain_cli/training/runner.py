"""One training run from a recipe to a finished run directory."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from accelerate import Accelerator

from linchain_cli import storage
from linchain_cli import run as runs
from linchain_cli.chain import Adapter, ChainTensors, save_adapter
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory
from linchain_cli.training import job as jobs
from linchain_cli.training.job import Base, Job, elapsed
from linchain_cli.training.loop import save, train
from linchain_cli.training.processes import on_main
from linchain_cli.training.progress import Display, note
from linchain_cli.training.signals import stop_requests


def run_training(
    recipe: Recipe,
    *,
    resume: bool = False,
    fresh: bool = False,
    base: Base | None = None,
    labels: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Job | None:
    """Trains what `recipe` describes into its run directory.

    Args:
        resume: continue a stopped run. fresh: replace an existing one.
        base: a loaded base model to use; its chains are taken out again at the end only by the caller.
        labels: fields to add to run.json (a comparison marks its arms so).
        quiet: show nothing but notes.

    Returns:
        The finished job, its model carrying the adapter that adapter/ holds; None when the run had finished before.

    Raises:
        InputError: the recipe, what it names, or the run directory does not allow it.
        Stopped: a signal ended it after a checkpoint. LinchainError: it failed.
    """
    accelerator = Accelerator()
    run = RunDirectory(recipe.run_path)
    with contextlib.ExitStack() as held, stop_requests() as stop:
        done = on_main(accelerator, lambda: _claim(run, resume, fresh, held))
        if _agree(accelerator, done):
            return None
        began = time.perf_counter()
        job = jobs.prepare(recipe, run, accelerator, base)
        say = note if accelerator.is_main_process else (lambda message: None)
        resuming = resume and run.exists()
        if resuming:
            jobs.resume(job, say)
        on_main(accelerator, lambda: _open(job, resuming, labels or {}, elapsed(began)))
        try:
            with Display(job.total_steps, job.state.step, quiet or not accelerator.is_main_process) as display:
                train(job, display, stop)
            on_main(accelerator, lambda: _finish(job))
        except BaseException as error:
            if accelerator.is_main_process:
                _close_unfinished(job, error)
            raise
    return job


def _agree(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def _claim(run: RunDirectory, resume: bool, fresh: bool, held: contextlib.ExitStack) -> bool:
    """Locks the run for this process; True when there is nothing left to do."""
    held.enter_context(run.lock())
    if resume and run.exists() and run.read_status()["status"] == "finished":
        note(f"{run.path} is finished already; nothing to resume")
        return True
    if not (resume and run.exists()):
        run.check_free(replace=fresh)
    return False


def _open(job: Job, resuming: bool, labels: dict[str, Any], prepare_seconds: float) -> None:
    """Writes (or cuts back) the run's files to where the job stands."""
    run = job.run
    if resuming:
        storage.write_atomic(run.recipe_path, job.recipe.to_yaml())
        storage.remove_staging(run.checkpoints_dir)
        job.store.drop_after(job.state.step)
        for path in (run.metrics_path, run.rows_path):
            runs.cut_jsonl(path, job.state.step)
    else:
        run.create(job.recipe.to_yaml(), replace=True)
    timings = {"prepare_seconds": prepare_seconds}
    run.update_status(status="running", started_at=runs.now(), timings=timings, **jobs.description(job), **labels)


def _finish(job: Job) -> None:
    """Writes adapter/, the plot and the final status; the model carries what adapter/ holds afterwards."""
    from linchain_cli.training import state as states

    state, run = job.state, job.run
    kept_step = state.step
    if job.recipe.training.keep == "best" and job.best is not None:
        states.restore(job.parameters, {**states.snapshot(job.parameters), **job.best})
        kept_step = state.best_step
    save_adapter(job.adapter(), run.adapter_dir)
    timings = run.read_status()["timings"] | {"train_seconds": round(state.seconds, 3)}
    run.update_status(
        status="finished",
        finished_at=runs.now(),
        step=state.step,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        tokens_per_second=round(state.tokens / state.seconds, 2) if state.seconds else None,
        validation_loss=state.best_loss,
        adapter={"step": kept_step, "kept": "best" if kept_step == state.best_step else "last"},
        timings=timings,
    )


def _close_unfinished(job: Job, error: BaseException) -> None:
    with contextlib.suppress(OSError, LinchainError):
        if isinstance(error, Stopped):
            job.run.update_status(status="stopped", step=job.state.step, reason=str(error))
        else:
            reason = str(error) if isinstance(error, LinchainError) else f"{type(error).__name__}: {error}"
            job.run.update_status(status="failed", step=job.state.step, reason=reason)
