"""Memory at the moment of most in training, by part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from linchain_cli.chain import chain_layers, folded
from linchain_cli.data.store import EncodedRows
from linchain_cli.machine import resident_bytes
from linchain_cli.model.attention import GROUPED
from linchain_cli.model.classifier import head_names, is_classifier
from linchain_cli.model.head import decoder_blocks
from linchain_cli.recipe import Recipe
from linchain_cli.training.forecast.model import UNSUPPORTED, attention_of, micro_batch_size, recipe_epoch
from linchain_cli.training.loss import positions_at_once
from linchain_cli.training.norms import make_norms_lean

# Bytes per weight in bitsandbytes' formats: 4 bits and 8 bits, with their scales (nf4's are quantised again).
QUANTISED = {"nf4": 0.5 + 0.127 / 8, "int8": 1.0}
# On CPUs freed memory stays in the process, in gaps that other sizes do not fit: with rows of many lengths
# the resident set grew by 1.2 to 1.5 times the activations (SmolLM2-135M, glibc, eager attention).
_CPU_GAPS = 0.4


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes at the moment of most memory in training, on each process."""

    process: int  # Python and its libraries; 0 where a device's own memory is counted
    base: int
    adapters: int  # with their gradients
    optimizer: int
    activations: int | None  # None where the model does not run on the meta device
    logits: int
    allocator: int  # freed memory that a CPU's allocator keeps between tensors of other sizes

    @property
    def total(self) -> int:
        return sum(size or 0 for size in asdict(self).values())


def forecast_memory(
    recipe: Recipe,
    model: nn.Module,
    rows: EncodedRows,
    device: torch.device,
    notes: list[str],
    processes: int = 1,
) -> MemoryForecast:
    """Counts the parts for a model on the meta device; what cannot be counted is told in `notes`."""
    epoch = recipe_epoch(recipe, rows, device)
    batch = min(micro_batch_size(recipe, device), epoch.rows)
    length = math.ceil(epoch.longest_micro_batch / batch)
    labelled = batch * int(rows.supervised_counts.max())
    return count_memory(recipe, model, batch, length, labelled, device, notes, processes)


def count_memory(
    recipe: Recipe,
    model: nn.Module,
    batch: int,
    length: int,
    labelled: int,
    device: torch.device,
    notes: list[str],
    processes: int = 1,
) -> MemoryForecast:
    """`forecast_memory` for a largest micro-batch of `batch` rows of `length` tokens, of which `labelled` in
    all have a label. `processes` share the base where the recipe spreads it.
    """
    process = resident_bytes() if device.type == "cpu" else 0
    activations = None
    try:
        activations = _activations(recipe, model, batch, length, device)
    except UNSUPPORTED as error:
        notes.append(f"activations are not counted ({type(error).__name__} on the meta device)")
    _, trained = _parameters(model)
    folded_factors = sum(layer.A.numel() for layer in chain_layers(model).values())  # A' of each layer
    return MemoryForecast(
        process=process,
        base=base_bytes(recipe, model, processes),
        adapters=2 * 4 * (sum(p.numel() for p in trained) + folded_factors),
        optimizer=2 * 4 * sum(p.numel() for p in trained),  # AdamW's two moments
        activations=activations,
        logits=_logits(model, labelled, device),
        allocator=int(_CPU_GAPS * (activations or 0)) if device.type == "cpu" else 0,
    )


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(the base's, what is trained: chains, and a classifier's head), shared ones once."""
    trained = [p for layer in chain_layers(model).values() for p in (layer.A, layer.links, layer.B)]
    if is_classifier(model):
        trained += [model.get_parameter(name) for name in head_names(model)]
    ours = {id(p) for p in trained}
    return [p for p in model.parameters() if id(p) not in ours], trained


def base_bytes(recipe: Recipe, model: nn.Module, processes: int = 1) -> int:
    """The base on each of `processes`, as the recipe rounds and spreads it."""
    base, _ = _parameters(model)
    rounded = _rounded_weights(model) if recipe.model.quantization != "none" else set()
    small = QUANTISED.get(recipe.model.quantization)

    def size(parameter: Tensor) -> float:
        return parameter.numel() * (small if id(parameter) in rounded else parameter.element_size())

    whole = sum(map(size, base))
    if recipe.training.parallel not in ("shard", "hybrid") or processes == 1:
        return round(whole)
    frozen = {id(parameter) for parameter in base}
    blocks = [
        sum(size(parameter) for parameter in block.parameters() if id(parameter) in frozen)
        for block in decoder_blocks(model)
    ]
    share = 0 if recipe.training.offload_base else sum(blocks) / processes
    # The block that computes and the one that is fetched ahead are there whole.
    return round(whole - sum(blocks) + share + 2 * max(blocks))


def _rounded_weights(model: nn.Module) -> set[int]:
    """The weights that bitsandbytes rounds: those of linear modules, but the head's."""
    head = model.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}


def _logits(model: nn.Module, labelled: int, device: torch.device) -> int:
    """The logits of the largest piece, in the model's type and in float32, and their gradients."""
    if is_classifier(model):
        return 0  # a few numbers
    weight = model.get_output_embeddings().weight
    rows = min(labelled, positions_at_once(weight.shape[0], device))
    return 2 * (4 + weight.element_size()) * rows * weight.shape[0]


def _activations(recipe: Recipe, model: nn.Module, batch: int, length: int, device: torch.device) -> int:
    """What autograd keeps between the forward and the backward pass, and one block's gradients."""
    # These two keep attention's weights as tensors of their own, which makes them countable.
    attention = attention_of(recipe, model, device)
    countable = attention in ("eager", GROUPED)
    model.set_attn_implementation(attention if countable else "eager")
    make_norms_lean(model)
    kept = saved_bytes(model, batch, length)
    if not countable:
        # Fused attention keeps no (length x length) weights: the part that grows with the length's square.
        square = max(0.0, (saved_bytes(model, batch, 2 * length) - 2 * kept) / 2)
        kept = int(kept - square)
    blocks = len(decoder_blocks(model))
    if recipe.training.gradient_checkpointing:
        hidden = batch * length * model.get_input_embeddings().weight.shape[1] * _element_size(model)
        held = 1 if recipe.training.offload_activations and device.type == "cuda" else blocks
        return held * hidden + 2 * kept // blocks
    return kept + kept // blocks


def _element_size(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.element_size()


def saved_bytes(model: nn.Module, batch: int, length: int) -> int:
    """Bytes of the tensors, but parameters, that autograd saves in a forward pass over (batch, length).

    `model` is on the meta device, so nothing is computed or allocated.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its address
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    # transformers makes no mask of one that has four dimensions, for which it would look into the (absent)
    # values: a decoder's without any for packed sequences, an encoder's for padding.
    mask = torch.zeros(batch, 1, 1, length, dtype=model.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), folded(model):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
