"""Everything a training run needs, put together once: model, chains, data, optimizer, state."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from linchain_cli import __version__, storage
from linchain_cli.chain import (
    Adapter,
    Chain,
    Coverage,
    adapter_files,
    adapter_of,
    coverage,
    find_siblings,
)
from linchain_cli.chain.files import TENSORS_FILE
from linchain_cli.chain.head import head_of
from linchain_cli.data.batches import micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.dataset import PreparedData, prepare_data
from linchain_cli.data.fingerprint import tokenizer_hash
from linchain_cli.data.store import EncodedRows
from linchain_cli.errors import InputError
from linchain_cli.machine import cpu_info
from linchain_cli.model.computed import changed_values
from linchain_cli.model.config import text_decoder_prefix
from linchain_cli.model.head import hidden_states
from linchain_cli.model.limits import limits
from linchain_cli.model.rope import length_classes
from linchain_cli.recipe import Recipe
from linchain_cli.run import Machine, RunBase, RunDirectory
from linchain_cli.training import schedule
from linchain_cli.training import state as states
from linchain_cli.training.base import Base, load_base
from linchain_cli.training.blocks import set_up_blocks
from linchain_cli.training.chains import chain_config, put_in_chains, put_on_head, start_adapter
from linchain_cli.training.checkpoints import CheckpointStore
from linchain_cli.training.display import counting_rows
from linchain_cli.training.fingerprints import MICRO_BATCH, compare, fingerprints
from linchain_cli.training.marks import untrained_marks
from linchain_cli.training.objective import Objective, objective_of
from linchain_cli.training.optimizer import FlatAdamW, trained_parameters
from linchain_cli.training.processes import from_main, on_main, raise_on_all, together
from linchain_cli.training.rate import AutoRate, with_rate
from linchain_cli.training.state import TrainingState


@dataclass
class Job:
    """One run, ready to train. `parameters` are the trained tensors by the adapter file's names, those of a
    classifier's `head` among them; `auto_rate` says how the learning rate was found where the recipe left it
    to be found."""

    recipe: Recipe
    run: RunDirectory
    accelerator: Accelerator
    base: Base
    layers: dict[str, Chain]
    data: PreparedData
    parameters: dict[str, nn.Parameter]
    optimizer: FlatAdamW
    store: CheckpointStore
    fingerprints: dict[str, Any]
    objective: Objective
    head: tuple[str, ...] = ()
    auto_rate: AutoRate | None = None
    state: TrainingState = field(default_factory=TrainingState)
    best: dict[str, Tensor] | None = None

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data.train), self.recipe.training.global_batch_size)

    @property
    def total_steps(self) -> int:
        return schedule.total_steps(self.recipe.training, len(self.data.train))

    def next_rows(self) -> np.ndarray:
        """Indices of the training rows of the step that comes next, over all processes."""
        data, recipe = self.data.train, self.recipe
        return step_rows(
            len(data), recipe.seed, recipe.training.global_batch_size, self.state.step, data.starts
        )

    @contextlib.contextmanager
    def dropping_out(self) -> Iterator[None]:
        """Training mode for the chains alone: whatever dropout the base was made with stays off."""
        for layer in self.layers.values():
            layer.training = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.training = False

    def micro_batches(self, rows: np.ndarray, data: EncodedRows) -> list[np.ndarray]:
        """This process's share of those rows of `data`, in the parts that are in memory at once."""
        state, processes = self.state, self.accelerator
        rank, world = processes.process_index, processes.num_processes
        return micro_batches(
            rows,
            data.lengths,
            state.micro_batch_size,
            rank,
            world,
            tokens=state.micro_batch_tokens,
            starts=data.starts,
        )

    def adapter(self) -> Adapter:
        """The adapter as it stands."""
        model = self.recipe.model
        base = {"path": model.path, "revision": model.revision, "hash": self.base.hash}
        outputs = self.base.outputs
        head = head_of(self.model, self.head, outputs.classes) if outputs else None
        return adapter_of(self.model, chain_config(self.recipe), base, head)

    def checkpoint_files(self, budgets: Sequence[int | None]) -> dict[str, bytes]:
        """The files of a checkpoint of this moment; `budgets` are the `micro_batch_tokens` of every process,
        which differ where memory ran out on one of them."""
        files = adapter_files(self.adapter())
        files[states.OPTIMIZER_FILE] = storage.tensor_bytes(self.optimizer.named_state())
        if self.best is not None and self.state.best_step != self.state.step:
            files[states.BEST_FILE] = storage.tensor_bytes(self.best)
        about = {
            "fingerprints": self.fingerprints,
            "config": self.base.config,
            "total_steps": self.total_steps,
            "versions": versions(),
            "micro_batch_tokens": list(budgets),
        }
        files[states.STATE_FILE] = states.state_bytes(self.state, about)
        return files

    def load_checkpoint(self, step: int, files: dict[str, bytes]) -> dict[str, Any]:
        """Continues from the files of the checkpoint of `step`, and returns what state.json tells beside the
        state, with `notes` on what is not as it was.

        Raises:
            InputError: they belong to another run.
        """
        from safetensors.torch import load

        state, about = states.read_state(files[states.STATE_FILE])
        before = about["fingerprints"]
        places = {"base": str(self.base.directory), "data": self.data.report.names}
        config = changed_values(about.get("config"), self.base.config)
        about["notes"] = compare(before, self.fingerprints, self.store.path(step), places, config)
        if budgets := about.get("micro_batch_tokens"):
            state.micro_batch_tokens = budgets[self.accelerator.process_index]
        if before["recipe"][MICRO_BATCH] != self.fingerprints["recipe"][MICRO_BATCH]:
            state.micro_batch_size = state.micro_batch_tokens = None  # to be settled anew
            if self.recipe.adapter.dropout:
                about["notes"].append("with other micro-batches dropout draws other masks from here on")
        self.state = state
        states.restore(self.parameters, load(files[TENSORS_FILE]))
        self.optimizer.load_named_state(load(files[states.OPTIMIZER_FILE]))
        if self.recipe.training.keep == "best" and state.best_step is not None:
            best = files.get(states.BEST_FILE)
            self.best = load(best) if best else states.snapshot(self.parameters)
        return about


def prepare(
    recipe: Recipe,
    run: RunDirectory,
    accelerator: Accelerator,
    base: Base | None = None,
    resume: bool = False,
) -> Job:
    """Loads what the recipe names and puts the job together. Nothing is written to the run directory.

    Args:
        base: a base model that is loaded already (without chains); None loads the recipe's.
        resume: whether the run goes on, on the base that it had.

    Raises:
        InputError: whatever is wrong with model, data or adapter.
    """
    base = base or load_base(recipe, accelerator, run if resume else None)
    readable = limits(base.model)
    rows = {"task": recipe.task, "classes": base.outputs and base.outputs.classes}
    # The first process encodes; the others find its cache.
    with counting_rows(quiet=not accelerator.is_main_process) as progress:
        data = on_main(
            accelerator,
            lambda: prepare_data(recipe.data, base.tokenizer, readable, progress=progress, **rows),
        )
    data = together(accelerator, lambda: data or prepare_data(recipe.data, base.tokenizer, readable, **rows))
    recipe, found_rate = with_rate(settled(recipe, data), base.model)
    if base.sharded:
        together(accelerator, lambda: _refuse_classes(base.model, data))
    head = together(accelerator, lambda: put_on_head(base, recipe)) if base.outputs else {}
    store = CheckpointStore(run.checkpoints_dir, recipe.training.keep_checkpoints)
    begun = from_main(accelerator, lambda: resume and bool(store.steps()))
    layers = together(accelerator, lambda: put_in_chains(base.model, _unstarted(recipe) if begun else recipe))
    # Funnel halves a row from block to block.
    any_rows = torch.zeros(1, 16, dtype=torch.long, device=accelerator.device)
    find_siblings(base.model, lambda: _any_forward(base, any_rows))
    training = recipe.training
    set_up_blocks(
        base.model,
        recompute=training.gradient_checkpointing,
        compiled=training.compile,
        offload=training.offload_activations,
    )
    for parameter in head.values():
        parameter.requires_grad_()  # which putting in chains has taken back
    parameters = trained_parameters(layers) | head
    optimizer = FlatAdamW(parameters, training.weight_decay, training.lr_multiplier.model_dump())
    marks = fingerprints(
        recipe,
        held_out=None if data.validation_report else len(data.validation or ()),
        data=("" if data.train.starts is None else "conversations ") + data.report.fingerprint,
        validation=data.validation_report.fingerprint if data.validation_report else None,
        base=base.hash,
        dtype=_name(base.model.dtype),
        device=accelerator.device.type,
        threads=torch.get_num_threads() if accelerator.device.type == "cpu" else None,  # a GPU has its own
        world_size=accelerator.num_processes,
        sharded=base.sharded,
    )
    objective, state = objective_of(recipe, data), states.first_state(base.model.dtype)
    return Job(
        recipe,
        run,
        accelerator,
        base,
        layers,
        data,
        parameters,
        optimizer,
        store,
        marks,
        objective,
        tuple(head),
        found_rate,
        state,
    )


def _unstarted(recipe: Recipe) -> Recipe:
    """For a run whose checkpoint holds all values: what it started from may be gone by now."""
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": None})})


def settled(recipe: Recipe, data: PreparedData) -> Recipe:
    """The recipe with what its rows decide written out."""
    training = recipe.training
    if recipe.task != "causal" and training.best_by == "auto":
        usual = "accuracy" if recipe.task == "classification" else "pearson"
        training = training.model_copy(update={"best_by": data.metric or usual})
    return recipe.model_copy(update={"data": data.config, "training": training})


def _any_forward(base: Base, rows: Tensor) -> Tensor:
    if base.outputs is not None:
        return base.model.base_model(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state
    return hidden_states(base.model, rows)


def _refuse_classes(model: nn.Module, data: PreparedData) -> None:
    """Raises InputError for rows that a sharded base would have to read apart: all processes run it together,
    and each has other rows."""
    lengths = [rows.lengths for rows in (data.train, data.validation) if rows is not None]
    classes = length_classes(model, torch.from_numpy(np.concatenate(lengths).astype(np.int64)))
    if classes.any():
        raise InputError(
            f"training.parallel: {type(model).__name__}'s rotary frequencies follow how long a row is beyond"
            " what it was first trained at, and some rows are longer; a base spread over processes cannot"
            " do that. Set a smaller data.max_length, or training.parallel to replicate"
        )


def chain_coverage(job: Job) -> Coverage:
    """How much of the base's text decoder the chains adapt."""
    return coverage(job.model, tuple(job.layers), text_decoder_prefix(job.model))


def warnings(job: Job) -> list[str]:
    """What the user should know before the first step."""
    recipe = job.recipe
    found = list(job.data.report.warnings)
    found += schedule.unreachable(recipe.training, len(job.data.train), job.data.validation is not None)
    start = None
    with contextlib.suppress(InputError):  # a run that goes on does without it
        start = start_adapter(recipe)
    if start is not None:
        trained_on = start.base.get("hash")
        if trained_on and trained_on != job.base.hash:
            found.append(f"adapter.init_from: {recipe.adapter.init_from} was trained on another base model")
    if job.base.outputs is None and job.accelerator.is_main_process:
        base = job.base
        found += untrained_marks(base.model, base.directory, job.layers, job.data.train, base.tokenizer)
    if job.base.reads_padding:
        found.append(
            f"{type(job.model).__name__} reads padding like text: what it gives for a row depends somewhat on"
            " the longest row beside it. With training.micro_batch_size: 1 no row has padding"
        )
    return found


def resume(job: Job, note: Callable[[str], None], finished: bool = False) -> None:
    """Continues a job from its newest usable checkpoint, or from step 0 when there is none; says which.

    The first process reads it; the others may be on machines that do not see the run directory.

    Args:
        finished: the run has finished before, so that it is not to begin again.

    Raises:
        InputError: the checkpoint belongs to another run, or none is usable.
    """
    accelerator, run = job.accelerator, job.run
    found = from_main(accelerator, lambda: job.store.read_latest(note))
    if found is None and finished:
        raise_on_all(
            accelerator,
            InputError(
                f"{run.path} is finished and has no checkpoint to go on from. A run of another name can begin"
                f" with its adapter: name=NEW adapter.init_from={run.adapter_dir}"
            ),
        )
    if found is None:
        note(f"{run.path} has no checkpoint yet: starting at step 0")
        return
    step, files = found
    about = together(accelerator, lambda: job.load_checkpoint(step, files))
    for message in about["notes"]:
        note(message)
    if job.total_steps < step:
        raise_on_all(
            accelerator,
            InputError(f"the run has taken {step} steps already: it cannot end at step {job.total_steps}"),
        )
    if about["total_steps"] != job.total_steps:
        note(
            f"the run now ends at step {job.total_steps} instead of {about['total_steps']}:"
            " the learning rate follows the new length"
        )
    changed = {
        name: version for name, version in versions().items() if about["versions"].get(name) != version
    }
    if changed:
        listing = ", ".join(
            f"{name} {version} (was {about['versions'].get(name)})" for name, version in changed.items()
        )
        note(f"this is {listing}: the end may differ in its last bits")
    note(f"resuming {run.path} after step {step} of {job.total_steps}")


def versions() -> dict[str, str]:
    """The versions that decide what is computed."""
    import accelerate
    import transformers

    return {
        "linchain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def description(job: Job) -> dict[str, Any]:
    """What run.json tells about a job besides its status: fields of RunStatus."""
    data, parameters, recipe = job.data.report, job.parameters, job.recipe
    return {
        "started_in": os.getcwd(),
        "versions": versions(),
        "hashes": {
            "recipe": storage.sha256_bytes(recipe.to_yaml().encode()),
            "data": data.fingerprint,
            "base": job.base.hash,
            "tokenizer": tokenizer_hash(job.base.tokenizer),
        },
        "base": RunBase(
            path=recipe.model.path,
            revision=recipe.model.revision,
            commit=job.base.commit,
            source=job.base.source,
            directory=str(job.base.directory.resolve()),
            dtype=_name(job.model.dtype),
            config=job.base.config,
        ),
        "learning_rate": recipe.training.learning_rate,
        "auto_rate": job.auto_rate and job.auto_rate.reason,
        "seed": recipe.seed,
        "split_seed": recipe.data.split_seed,
        "machine": Machine(
            device=str(job.device),
            processor=_processor(job.device),
            threads=torch.get_num_threads(),
            processes=job.accelerator.num_processes,
            sharded=job.base.sharded,
        ),
        "total_steps": job.total_steps,
        "micro_batch_size": job.state.micro_batch_size,
        "micro_batch_tokens": job.state.micro_batch_tokens,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "adapted_modules": len(job.layers),
        "classes": list(job.base.outputs.classes) if job.base.outputs else None,
        "coverage": asdict(chain_coverage(job)),
        "rows": data.counts(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or platform.processor() or platform.machine()
