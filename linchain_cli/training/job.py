"""Everything a training run needs, put together once: model, chains, data, optimizer, state."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from linchain_cli import __version__
from linchain_cli.chain import Adapter, ChainConfig, ChainLinear, adapter_files, adapter_of, attach, inject, load_adapter
from linchain_cli.data.batches import steps_per_epoch
from linchain_cli.data.dataset import PreparedData, prepare_data
from linchain_cli.errors import InputError
from linchain_cli.head import check_split
from linchain_cli.model import base_hash, load_model, load_tokenizer, locate, text_decoder_prefix
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory
from linchain_cli.training import optimizer as optimizers
from linchain_cli.training import state as states
from linchain_cli.training.checkpoints import CheckpointStore
from linchain_cli.training.processes import on_main
from linchain_cli.training.state import TrainingState


@dataclass
class Base:
    """A frozen base model with its tokenizer; one may serve several runs after another."""

    directory: Path
    model: nn.Module
    tokenizer: Any
    hash: str

    @property
    def pad_id(self) -> int:
        """What fills short rows. No loss ever reads it, so any token does where a tokenizer has none for it."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)


def load_base(recipe: Recipe, device: torch.device) -> Base:
    """Finds and loads a recipe's base model and tokenizer. Raises InputError as `model.locate` and `load_model` do."""
    config = recipe.model
    directory = locate(config.path, config.revision)
    tokenizer = load_tokenizer(directory)
    model = load_model(
        directory, dtype=config.dtype, device=device, quantization=config.quantization, attention=config.attention
    )
    check_split(model)
    return Base(directory, model, tokenizer, base_hash(directory))


@dataclass
class Job:
    """One run, ready to train. `parameters` are the trained tensors by the adapter file's names."""

    recipe: Recipe
    run: RunDirectory
    accelerator: Accelerator
    base: Base
    layers: dict[str, ChainLinear]
    data: PreparedData
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    steps_per_epoch: int
    total_steps: int
    fingerprints: dict[str, Any]
    state: TrainingState = field(default_factory=TrainingState)
    best: dict[str, Tensor] | None = None

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def adapter(self) -> Adapter:
        """The adapter as it stands."""
        recipe = self.recipe
        base = {"path": recipe.model.path, "revision": recipe.model.revision, "hash": self.base.hash}
        return adapter_of(self.model, chain_config(recipe), base)

    def checkpoint_files(self) -> dict[str, bytes]:
        """The files of a checkpoint of this moment."""
        from linchain_cli import storage

        files = adapter_files(self.adapter())
        optimizer = optimizers.optimizer_state(self.optimizer, self.parameters)
        files[states.OPTIMIZER_FILE] = storage.tensor_bytes(optimizer)
        if self.best is not None and self.state.best_step != self.state.step:
            files[states.BEST_FILE] = storage.tensor_bytes(self.best)
        files[states.STATE_FILE] = states.state_bytes(self.state, self.fingerprints)
        return files

    def load_checkpoint(self, files: dict[str, bytes]) -> None:
        """Continues from a checkpoint's files. Raises InputError when they belong to another run."""
        from safetensors.torch import load

        from linchain_cli.chain.files import TENSORS_FILE

        self.state, saved = states.read_state(files[states.STATE_FILE])
        states.refuse_differences(saved, self.fingerprints)
        states.restore(self.parameters, load(files[TENSORS_FILE]))
        optimizers.load_optimizer_state(self.optimizer, self.parameters, load(files[states.OPTIMIZER_FILE]))
        if self.state.best_step is not None:
            best = files.get(states.BEST_FILE)
            self.best = load(best) if best else states.snapshot(self.parameters)


def chain_config(recipe: Recipe) -> ChainConfig:
    """The adapter section as the chain package takes it."""
    adapter = recipe.adapter
    return ChainConfig(
        rank=adapter.rank, depth=adapter.depth, alpha=adapter.alpha, dropout=adapter.dropout,
        init=adapter.init, target_modules=adapter.target_modules,
    )  # fmt: skip


def put_in_chains(model: nn.Module, recipe: Recipe) -> dict[str, ChainLinear]:
    """Injects the recipe's chains, with the values of `adapter.init_from` if it names an adapter."""
    config = chain_config(recipe)
    layers = inject(model, config, recipe.seed, text_decoder_prefix(model))
    if recipe.adapter.init_from is None:
        return layers
    adapter = load_adapter(Path(recipe.adapter.init_from))
    if (adapter.config.rank, adapter.config.depth, adapter.config.alpha) != (config.rank, config.depth, config.alpha):
        raise InputError(
            f"adapter.init_from: {recipe.adapter.init_from} has rank {adapter.config.rank}, depth {adapter.config.depth} and"
            f" alpha {adapter.config.alpha:g}; the recipe asks for {config.rank}, {config.depth} and {config.alpha:g}"
        )
    if set(adapter.tensors) != set(layers):
        other = sorted(set(adapter.tensors) ^ set(layers))
        raise InputError(f"adapter.init_from: {recipe.adapter.init_from} adapts other modules than the recipe (e.g. {other[0]})")
    from linchain_cli.chain import detach

    detach(model)
    return attach(model, adapter, config.dropout)


def prepare(recipe: Recipe, run: RunDirectory, accelerator: Accelerator, base: Base | None = None) -> Job:
    """Loads what the recipe names and puts the job together. Nothing is written to the run directory.

    Args:
        base: a base model that is loaded already (without chains); None loads the recipe's.

    Raises:
        InputError: whatever is wrong with model, data or adapter.
    """
    base = base or load_base(recipe, accelerator.device)
    # The first process encodes; the others find its cache.
    data = on_main(accelerator, lambda: prepare_data(recipe.data, base.tokenizer))
    data = data or prepare_data(recipe.data, base.tokenizer)
    layers = put_in_chains(base.model, recipe)
    parameters = optimizers.trained_parameters(layers)
    training = recipe.training
    optimizer = optimizers.build_optimizer(parameters, training.weight_decay, training.lr_multiplier.model_dump())
    per_epoch = steps_per_epoch(len(data.train), training.global_batch_size)
    total_steps = training.max_steps or int(np.ceil(training.epochs * per_epoch))
    fingerprints = {
        "recipe": states.flat_recipe(recipe.model_dump(mode="json")),
        "data": data.report.fingerprint,
        "base": base.hash,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
        "world_size": accelerator.num_processes,
    }
    store = CheckpointStore(run.checkpoints_dir, training.keep_checkpoints)
    return Job(
        recipe, run, accelerator, base, layers, data, parameters, optimizer, store, per_epoch, total_steps, fingerprints
    )


def resume(job: Job, note: Callable[[str], None]) -> None:
    """Continues a job from its newest usable checkpoint, or from step 0 when there is none; says which."""
    found = job.store.read_latest(note)
    if found is None:
        note(f"{job.run.path} has no checkpoint yet: starting at step 0")
        return
    step, files = found
    job.load_checkpoint(files)
    saved_steps = job.run.read_status().get("total_steps")
    if saved_steps not in (None, job.total_steps):
        note(f"the run now ends at step {job.total_steps} instead of {saved_steps}: the learning rate follows the new length")
    note(f"resuming {job.run.path} after step {step} of {job.total_steps}")


def description(job: Job) -> dict[str, Any]:
    """What run.json tells about a job besides its status."""
    import accelerate
    import transformers

    data, parameters = job.data.report, job.parameters
    return {
        "versions": {
            "linchain": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "accelerate": accelerate.__version__,
        },
        "hashes": {"data": data.fingerprint, "base": job.base.hash},
        "base": {"path": job.recipe.model.path, "directory": str(job.base.directory), "dtype": str(job.model.dtype).removeprefix("torch.")},
        "seed": job.recipe.seed,
        "machine": {
            "device": str(job.device), "processor": _processor(job.device), "threads": torch.get_num_threads(),
            "processes": job.accelerator.num_processes,
        },
        "total_steps": job.total_steps,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "adapted_modules": len(job.layers),
        "rows": data.counts(),
    }  # fmt: skip


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def elapsed(since: float) -> float:
    """Seconds since a `time.perf_counter()` reading, to the millisecond."""
    return round(time.perf_counter() - since, 3)
