"""Time, measured on a few of the model's blocks and on a part of its head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.chain import find_siblings, folded
from linchain_cli.data.batches import collate, micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.report import EpochPlan
from linchain_cli.data.store import EncodedRows
from linchain_cli.model.attention import GROUPED
from linchain_cli.model.classifier import is_classifier
from linchain_cli.model.config import text_decoder
from linchain_cli.model.flat_rows import FlatRows
from linchain_cli.model.head import decoder_blocks
from linchain_cli.recipe import Recipe
from linchain_cli.training.forecast.model import UNSUPPORTED, attention_of, micro_batch_size, recipe_epoch
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.schedule import validations

_SAMPLED_STEPS = 8
_TIMED_BLOCKS = 4
_TIMED_BLOCK_WEIGHTS = 50_000_000  # larger blocks are timed alone
_TIMING_SECONDS = 0.6  # for each of three measurements


@dataclass(frozen=True)
class TimeForecast:
    """Seconds, and tokens per second without padding."""

    train_seconds: float
    validation_seconds: float
    tokens_per_second: float


def forecast_time(
    recipe: Recipe,
    model: nn.Module,
    rows: EncodedRows,
    validation: EncodedRows | None,
    steps: int,
    device: torch.device,
    notes: list[str],
) -> TimeForecast | None:
    """Times a run of `steps` steps; takes `model`, which is on the meta device, apart for it.

    Returns None, and says so in `notes`, where the model's code does not run in part.
    """
    try:
        found = _time(recipe, model, rows, validation, steps, device)
    except UNSUPPORTED as error:
        notes.append(f"the time is not predicted ({type(error).__name__} when a few blocks ran apart)")
        return None
    if recipe.model.quantization != "none":
        notes.append("the time is without that of restoring quantised weights")
    return found


def _time(
    recipe: Recipe,
    model: nn.Module,
    rows: EncodedRows,
    validation: EncodedRows | None,
    steps: int,
    device: torch.device,
) -> TimeForecast:
    epoch = recipe_epoch(recipe, rows, device)
    batch = min(micro_batch_size(recipe, device), epoch.rows)
    length = max(1, round(epoch.computed / epoch.rows))
    labels = max(1, round(batch * epoch.supervised_tokens / epoch.rows))
    both, forward = position_seconds(recipe, model, batch, length, device)
    each_label = label_seconds(model, labels, device)
    if recipe.training.gradient_checkpointing:
        both += forward
    # With grouped attention only that sees the padding, which is little beside the rest.
    flat = attention_of(recipe, model, device) == GROUPED and not is_classifier(model)

    def positions(rows: EncodedRows, epoch: EpochPlan, drops: bool) -> float:
        if not flat:
            return epoch.computed
        return epoch.tokens * (1.0 if drops else computed_share(recipe, rows, device))

    blocks = both * positions(rows, epoch, recipe.adapter.dropout > 0)
    epoch_seconds = blocks + 2 * each_label * epoch.supervised_tokens
    train = epoch_seconds * steps / epoch.steps
    validate = 0.0
    if validation is not None:
        held_out = recipe_epoch(recipe, validation, device)
        times = validations(recipe.training, steps, len(rows))
        blocks = forward * positions(validation, held_out, False)
        validate = times * (blocks + each_label * held_out.supervised_tokens)
    return TimeForecast(round(train, 2), round(validate, 2), round(epoch.tokens / epoch_seconds, 2))


def computed_share(recipe: Recipe, rows: EncodedRows, device: torch.device) -> float:
    """The share of the rows' tokens that a model computes if it reads them without padding and what the rows
    of a micro-batch begin with once; of the first steps, since any are as good."""
    size = recipe.training.global_batch_size
    tokens = computed = 0
    for step in range(min(_SAMPLED_STEPS, steps_per_epoch(len(rows), size))):
        chosen = step_rows(len(rows), recipe.seed, size, step, rows.starts)
        for part in micro_batches(chosen, rows.lengths, micro_batch_size(recipe, device), starts=rows.starts):
            batch = collate(rows, part, 0)
            tokens += int(batch.attention_mask.sum())
            flat = FlatRows.of(batch.input_ids, batch.attention_mask)
            computed += flat.input_ids.shape[1]
    return computed / tokens


def position_seconds(
    recipe: Recipe, model: nn.Module, batch: int, length: int, device: torch.device
) -> tuple[float, float]:
    """Seconds per position of all blocks, run on (batch, length): (both passes, the forward alone).

    Takes `model` apart: its first blocks are put on `device` with random weights, and run there.
    """
    decoder = text_decoder(model)
    decoder = getattr(decoder, decoder.base_model_prefix, decoder)  # without the head
    blocks = decoder_blocks(model)
    weights = sum(p.numel() for p in blocks[0].parameters())
    path, own = next(
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and blocks[0] in list(module)
    )
    taken = own[: _TIMED_BLOCKS if weights <= _TIMED_BLOCK_WEIGHTS else 1]
    decoder.set_submodule(path, taken)
    decoder.config.num_hidden_layers = len(taken)
    width = decoder.get_input_embeddings().weight.shape[1]
    dtype = decoder.get_input_embeddings().weight.dtype
    decoder.set_input_embeddings(nn.Embedding(1, width, device="meta"))
    decoder.set_attn_implementation(attention_of(recipe, decoder, device))
    make_norms_lean(decoder)
    _fill(decoder, device)
    inputs = torch.randn(batch, length, width, device=device, dtype=dtype, generator=_generator(device))

    def forward() -> Tensor:
        return decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    def with_backward() -> None:
        output = forward()
        output.backward(torch.ones_like(output))

    decoder.train()
    find_siblings(decoder, forward)
    with folded(decoder):
        scale = len(blocks) / len(taken) / (batch * length)
        return scale * _seconds(with_backward, device), scale * _seconds(without_gradient, device)


def _fill(module: nn.Module, device: torch.device) -> None:
    """Puts a module from the meta device on `device`, with small random weights."""
    module.to_empty(device=device)
    generator = _generator(device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02, generator=generator)
            else:
                tensor.zero_()


def _generator(device: torch.device) -> torch.Generator:
    """Random numbers of its own: a forecast leaves everybody else's as they were."""
    return torch.Generator(device).manual_seed(0)


def label_seconds(model: nn.Module, labelled: int, device: torch.device) -> float:
    """Seconds per labelled position of the head's forward pass, measured on `labelled` positions at once."""
    if is_classifier(model):
        return 0.0
    weight = model.get_output_embeddings().weight
    rows = min(weight.shape[0], 16384)
    like = {"device": device, "dtype": weight.dtype, "generator": _generator(device)}
    head = torch.randn(rows, weight.shape[1], **like)
    hidden = torch.randn(labelled, weight.shape[1], **like)
    return (
        _seconds(lambda: torch.log_softmax((hidden @ head.T).float(), -1), device)
        * weight.shape[0]
        / rows
        / labelled
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call, over as many as fit into a moment, the first apart."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first = once()
    times = [once()]
    while first + sum(times) < _TIMING_SECONDS and len(times) < 20:
        times.append(once())
    return statistics.median(times)
