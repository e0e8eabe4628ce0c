"""MODEL, as several commands take it: a run (adapter on base), a checkpoint, a hub id or a .gguf file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory, find_run, is_run

if TYPE_CHECKING:
    from linchain_cli.recipe import Recipe

DEFAULT_TEMPLATE = "alpaca"


@dataclass(frozen=True)
class Subject:
    """A model that is named but not loaded. `run` and `recipe` are None unless it is a run."""

    name: str
    run: RunDirectory | None = None
    recipe: Recipe | None = None

    @property
    def template(self) -> str | Mapping[str, Any]:
        """The template its prompts go through when none is asked for."""
        if self.recipe is None:
            return DEFAULT_TEMPLATE
        template = self.recipe.data.template
        return template if isinstance(template, str) else template.model_dump()

    def result_path(self, protocol: str) -> Path:
        """Where an evaluation of it goes by default."""
        if self.run is not None:
            return self.run.eval_dir / f"{protocol}.json"
        return Path(f"eval-{Path(self.name).name}.json")


@dataclass(frozen=True)
class LoadedModel:
    """A subject's model and tokenizer, and what tells it from others in a result."""

    model: Any
    tokenizer: Any
    identity: dict[str, Any]


def find_subject(name: str | None) -> Subject:
    """The run or checkpoint of that name; None is the newest finished run.

    Raises:
        InputError: a run that is not there or not finished. Other names are looked up when they are loaded.
    """
    if name is not None and not is_run(name):
        return Subject(name.rstrip("/") or name)
    run = find_run(name)
    from linchain_cli.recipe import load_recipe

    return Subject(str(run.path), run, load_recipe(run.recipe_path))


def locate_subject(subject: Subject) -> Path:
    """The checkpoint directory of its base, downloaded or converted first where need be.

    Raises:
        InputError: there is none.
    """
    from linchain_cli.model.loading import locate

    if subject.recipe is None:
        return locate(subject.name)
    return locate(subject.recipe.model.path, subject.recipe.model.revision)


def load_subject(subject: Subject, dtype: str | None) -> LoadedModel:
    """Loads it onto the GPU, or the CPU without one; a run's adapter is attached to its base.

    `dtype` None is float32 on a CPU and elsewhere the recipe's, or `auto`.

    Raises:
        InputError: the model cannot be found or read, or a run's base is not the one it was trained on.
    """
    from linchain_cli.chain import attach, load_adapter
    from linchain_cli.machine import limit_threads
    from linchain_cli.model.loading import base_hash, load_model, load_tokenizer

    limit_threads()
    config = subject.recipe.model if subject.recipe else None
    directory = locate_subject(subject)
    device = process_device()
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else (config.dtype if config else "auto")
    quantization = config.quantization if config else "none"
    options = {"quantization": quantization, "attention": config.attention if config else "auto"}
    weights = base_hash(directory)
    adapter = load_adapter(subject.run.adapter_dir) if subject.run else None
    if adapter is not None and adapter.base.get("hash") not in (None, weights):
        raise InputError(
            f"{subject.name} was trained on other weights than {directory} now holds (base hash"
            f" {str(adapter.base['hash'])[:12]}… and {weights[:12]}…). Put the original base back, or name it"
            f" in {subject.run.recipe_path}."
        )
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype=dtype, device=device, **options)
    if adapter is not None:
        attach(model, adapter)
    return LoadedModel(model, tokenizer, {"quantization": quantization, "base_sha256": weights})


def process_device():
    """This process's device: of several processes on a machine, each has a GPU of its own."""
    import os

    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        return PartialState(cpu=not torch.cuda.is_available()).device
    from linchain_cli.model.loading import default_device

    return default_device()
