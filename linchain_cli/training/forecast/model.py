"""The model and the batches that a forecast is made with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from linchain_cli.chain import ChainConfig, inject
from linchain_cli.data.report import EpochPlan, epoch_plan
from linchain_cli.data.store import EncodedRows
from linchain_cli.model.attention import GROUPED, may_group
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.config import empty_model, text_decoder_prefix
from linchain_cli.model.loading import resolve_attention, resolve_dtype
from linchain_cli.recipe import Recipe

# What a model's code raises that cannot run without values, or not in part.
UNSUPPORTED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, ImportError)


def forecast_model(recipe: Recipe, config: ChainConfig, directory: Path, device: torch.device) -> nn.Module:
    """The recipe's model with its chains on the meta device, in the types that `device` will hold."""
    model = empty_model(directory, Outputs.unknown(recipe.task))
    dtype = resolve_dtype(recipe.model.dtype, device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    inject(model, config, recipe.seed, text_decoder_prefix(model))
    return model


def recipe_epoch(recipe: Recipe, rows: EncodedRows, device: torch.device) -> EpochPlan:
    """The batches of one epoch. `micro_batch_size: auto` counts as the whole batch, the most it can be."""
    return epoch_plan(
        rows.lengths,
        rows.supervised_counts,
        seed=recipe.seed,
        global_batch=recipe.training.global_batch_size,
        micro_batch=micro_batch_size(recipe, device),
    )


def micro_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Rows that are in memory at once, at most."""
    return recipe.training.rows_at_once(device.type) or recipe.training.global_batch_size


def attention_of(recipe: Recipe, model: nn.Module, device: torch.device) -> str:
    """The implementation that `load_model` will choose, as far as that can be known without weights."""
    attention = resolve_attention(recipe.model.attention, device) or "sdpa"
    return "eager" if attention == GROUPED and not may_group(model) else attention
