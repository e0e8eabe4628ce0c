"""The frozen base model of a run, whole on every process or spread over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from linchain_cli.data.labelled import find_classes
from linchain_cli.errors import InputError
from linchain_cli.model.classifier import Outputs, is_classifier, padding, reads_padding
from linchain_cli.model.computed import computed_values
from linchain_cli.model.config import empty_model
from linchain_cli.model.fast import changing_nothing
from linchain_cli.model.files import FoundBase, find_base, read_config
from linchain_cli.model.flat_rows import allow_flat_rows, forbid_flat_rows
from linchain_cli.model.hashing import base_hash
from linchain_cli.model.head import check_split, decoder_blocks
from linchain_cli.model.loading import DTYPES, load_model, resolve_dtype
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import Recipe, TrainingConfig
from linchain_cli.run import RunDirectory, RunStatus
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.processes import from_main, together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The values of `training.parallel` that spread the base over processes.
SPREAD = ("shard", "hybrid")
# `parallel: auto` shards a base that takes more than this share of a GPU; the rest is for activations.
WHOLE_SHARE = 0.6


@dataclass
class Base:
    """A frozen base model with its tokenizer; one may serve several runs after another.

    `source` and `commit` are those of model.files.FoundBase; `outputs` are those of a classifier, None of a
    language model, and `reads_padding` is whether that one takes padding for text; `config` is what its
    config.json said of what it computes.
    """

    directory: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    hash: str
    sharded: bool = False
    source: str | None = None
    commit: str | None = None
    outputs: Outputs | None = None
    reads_padding: bool = False
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = computed_values(read_config(self.directory))

    @property
    def pad_id(self) -> int:
        """What fills short rows. No loss reads it, so any token does that the model has an embedding for, but
        a classifier's head looks for it."""
        if self.outputs is not None:
            return padding(self.model, self.tokenizer)
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None and 0 <= token < embeddings)


def load_base(recipe: Recipe, accelerator: Accelerator, run: RunDirectory | None = None) -> Base:
    """Finds and loads a recipe's base model and tokenizer: the same one that `run`, which goes on, had.

    Raises:
        InputError: as `model.find_base` and `load_model` do, or the model cannot be trained as the recipe
        wants.
    """
    config, device = recipe.model, accelerator.device

    def find() -> FoundBase:
        status = RunStatus(status="running") if run is None else run.read_status()
        return find_base(status.base_of(config.path, config.revision), near=run and run.path)

    # One process downloads or converts; the others find what it left, or do so on a machine of their own.
    found = from_main(accelerator, find)
    found = together(accelerator, lambda: found if found.directory.is_dir() else find())
    directory = found.directory
    # One GPU that is too small for all of it is enough.
    sharded = any(gather_object([together(accelerator, lambda: _shards(recipe, directory, accelerator))]))

    dtype = together(accelerator, lambda: common_dtype(config.dtype, accelerator))

    def load() -> Base:
        options = {"dtype": dtype, "quantization": config.quantization, "attention": config.attention}
        if sharded:
            from linchain_cli.training.sharded import load_sharded  # FSDP2 takes a while to import

            model = load_sharded(
                directory,
                accelerator,
                per_machine=recipe.training.parallel == "hybrid",
                offload=recipe.training.offload_base,
                **options,
            )
        else:
            model = load_model(directory, device=device, outputs=outputs, **options)
        tokenizer = load_tokenizer(directory)
        return Base(directory, model, tokenizer, weights, sharded, found.source, found.commit, outputs)

    weights = from_main(accelerator, lambda: base_hash(directory))
    outputs = from_main(accelerator, lambda: recipe_outputs(recipe))
    base = together(accelerator, load)
    together(accelerator, lambda: refuse_unfit(base.model, recipe.training))
    together(accelerator, lambda: suit_to_training(base.model))
    base.reads_padding = outputs is not None and reads_padding(base.model, base.pad_id)
    return base


def common_dtype(name: str, accelerator: Accelerator) -> str:
    """A recipe's dtype as all processes can compute in it: their devices may differ in what `auto` means, and
    gradients of a loss that float16 scales must not be added to others."""
    if accelerator.num_processes == 1:
        return name
    found = set(gather_object([resolve_dtype(name, accelerator.device)]))
    return next(each for each in ("float32", "float16", "bfloat16") if DTYPES[each] in found)


def recipe_outputs(recipe: Recipe) -> Outputs | None:
    """What a recipe's classifier tells, with the classes of its training rows; None of a language model.

    Raises:
        InputError: the rows are not there, or their labels are no classes.
    """
    if recipe.task == "causal":
        return None
    return Outputs(find_classes(recipe.data) if recipe.task == "classification" else ())


def refuse_unfit(model: nn.Module, training: TrainingConfig) -> None:
    """What a model's structure alone (on the meta device will do) speaks against.

    Raises:
        InputError: it has no output projection or no blocks, and the recipe needs them.
    """
    if not is_classifier(model) and model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} has no output projection, whose logits the loss is computed from; this"
            " architecture is not supported"
        )
    if training.gradient_checkpointing or training.compile or training.parallel in SPREAD:
        decoder_blocks(model)


def suit_to_training(model: nn.Module) -> Callable[[], None]:
    """Lets a loaded base train as fast as its architecture allows; what it computes stays the same.

    Returns:
        What takes it all back.

    Raises:
        InputError: it cannot be split into backbone and head, or changes its own weights.
    """
    undo = contextlib.ExitStack()
    with changing_nothing(model):
        if not is_classifier(model):
            check_split(model)
        undo.callback(make_norms_lean(model))
        if not is_classifier(model):
            allow_flat_rows(model)
            undo.callback(forbid_flat_rows, model)
    return undo.close


def _shards(recipe: Recipe, directory: Path, accelerator: Accelerator) -> bool:
    """Whether the base is to be spread over the processes, as far as this one's device has a say."""
    wanted, quantization = recipe.training.parallel, recipe.model.quantization
    spread = wanted in SPREAD
    if spread and accelerator.num_processes == 1:
        raise InputError(
            f"training.parallel: {wanted} needs several processes (--nproc); one alone cannot share the base"
        )
    if spread and quantization == "int8":
        raise InputError(
            f"training.parallel: {wanted} cannot spread a base in int8; set model.quantization to nf4 or"
            " none, or parallel to replicate, which holds the base whole on every process"
        )
    if recipe.training.offload_base and accelerator.device.type == "cpu":
        raise InputError(
            "training.offload_base: these processes compute on the CPU, whose memory holds the base anyway;"
            " set it to false"
        )
    if wanted != "auto":
        return spread
    if recipe.task != "causal":
        return False
    if accelerator.num_processes == 1 or quantization == "int8" or accelerator.device.type != "cuda":
        return False
    # Nearly all of a large model is in its blocks, which are what quantisation rounds.
    dtype = resolve_dtype(recipe.model.dtype, accelerator.device)
    value_bytes = 0.52 if quantization == "nf4" else dtype.itemsize
    size = sum(parameter.numel() for parameter in empty_model(directory).parameters()) * value_bytes
    return size > WHOLE_SHARE * torch.cuda.get_device_properties(accelerator.device).total_memory
