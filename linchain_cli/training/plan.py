"""What a run will cost, before anything is spent: memory by part, and time.

Memory is counted, not guessed: the recipe's model, chains and largest micro-batch run on the meta device,
which computes shapes only, and what autograd would keep for the backward pass is added up. Time is measured
on a few of the model's blocks with random weights on the device that will train, and scaled to all blocks
and to every padded position of the run.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.chain import ChainConfig, chain_layers, find_siblings, folded, inject
from linchain_cli.data.batches import collate, micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.report import EpochPlan, epoch_plan
from linchain_cli.data.store import EncodedRows
from linchain_cli.model.attention import GROUPED, may_group
from linchain_cli.model.flat_rows import FlatRows
from linchain_cli.model.loading import (
    empty_model,
    resolve_attention,
    resolve_dtype,
    text_decoder,
    text_decoder_prefix,
)
from linchain_cli.recipe import Recipe
from linchain_cli.training.loss import positions_at_once
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.schedule import total_steps

# Bytes per weight in bitsandbytes' formats: 4 bits and 8 bits, with their scales (nf4's are quantised again).
_QUANTISED = {"nf4": 0.5 + 0.127 / 8, "int8": 1.0}
_SMALL = 4096  # elements; smaller tensors keep their 8-bit optimizer's state in 32 bit
# On CPUs freed memory stays in the process, in gaps that other sizes do not fit: with rows of many lengths
# the resident set grew by 1.2 to 1.5 times the activations (SmolLM2-135M, glibc, eager attention).
_CPU_GAPS = 0.4
# What a model's code raises that cannot run without values, or not in part.
_UNSUPPORTED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, ImportError)
_SAMPLED_STEPS = 8
_TIMED_BLOCKS = 4
_TIMED_BLOCK_WEIGHTS = 50_000_000  # larger blocks are timed alone
_TIMING_SECONDS = 0.6  # for each of three measurements


@dataclass(frozen=True)
class MemoryPlan:
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


@dataclass(frozen=True)
class TimePlan:
    """Seconds, and tokens per second without padding."""

    train_seconds: float
    validation_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """The prediction for one process. `time` is None where blocks cannot be timed; `notes` say why."""

    device: str
    total_steps: int
    trainable_parameters: int
    base_parameters: int
    memory: MemoryPlan
    time: TimePlan | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for run.json."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "memory": memory, "notes": list(self.notes)}


def recipe_epoch(recipe: Recipe, rows: EncodedRows, world: int = 1) -> EpochPlan:
    """The batches of one epoch. `micro_batch_size: auto` counts as the whole batch, the most it can be."""
    training = recipe.training
    return epoch_plan(
        rows.lengths,
        rows.supervised_counts,
        seed=recipe.seed,
        global_batch=training.global_batch_size,
        micro_batch=_micro_batch(recipe),
        world=world,
    )


def _micro_batch(recipe: Recipe) -> int:
    size = recipe.training.micro_batch_size
    return size if isinstance(size, int) else recipe.training.global_batch_size


def predict(
    recipe: Recipe,
    config: ChainConfig,
    directory: Path,
    train: EncodedRows,
    validation: EncodedRows | None,
    device: torch.device,
    loaded: bool = False,
    world: int = 1,
) -> Plan:
    """Predicts memory and time of a recipe on `device`.

    Args:
        config: the recipe's chains.
        directory: the base model's checkpoint directory, of which only the configuration is read.
        train, validation: the encoded rows.
        loaded: whether this process holds the base already, which is then not counted as the process's.
        world: processes that share the rows, each with the whole base.
    """
    resident = resident_bytes()
    model = planned_model(recipe, config, directory, device)
    epoch = recipe_epoch(recipe, train, world)
    steps = total_steps(recipe.training, epoch.rows)
    base, trained = _parameters(model)
    notes: list[str] = []

    batch = min(_micro_batch(recipe), epoch.rows)
    activations = None
    try:
        activations = _activations(recipe, model, batch, math.ceil(epoch.longest_micro_batch / batch), device)
    except _UNSUPPORTED as error:
        notes.append(f"activations are not counted ({type(error).__name__} on the meta device)")
    folded_factors = sum(layer.A.numel() for layer in chain_layers(model).values())  # A' of each layer
    base_bytes = _base_bytes(recipe, model)
    process = max(0, resident - base_bytes if loaded else resident)
    memory = MemoryPlan(
        process=process if device.type == "cpu" else 0,
        base=base_bytes,
        adapters=2 * 4 * (sum(p.numel() for p in trained) + folded_factors),
        optimizer=sum(_optimizer_bytes(p, recipe.training.optimizer) for p in trained),
        activations=activations,
        logits=_logits(model, batch * int(train.supervised_counts.max()), device),
        allocator=int(_CPU_GAPS * (activations or 0)) if device.type == "cpu" else 0,
    )
    timed = None
    try:
        timed = _time(recipe, model, train, steps, validation, device, world)
        if recipe.model.quantization != "none":
            notes.append("the time is without that of restoring quantised weights")
    except _UNSUPPORTED as error:
        notes.append(f"the time is not predicted ({type(error).__name__} when a few blocks ran apart)")
    return Plan(
        device=str(device),
        total_steps=steps,
        trainable_parameters=sum(p.numel() for p in trained),
        base_parameters=sum(p.numel() for p in base),
        memory=memory,
        time=timed,
        notes=tuple(notes),
    )


def planned_model(recipe: Recipe, config: ChainConfig, directory: Path, device: torch.device) -> nn.Module:
    """The recipe's model with its chains on the meta device, in the types that `device` will hold."""
    model = empty_model(directory)
    dtype = resolve_dtype(recipe.model.dtype, device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    inject(model, config, recipe.seed, text_decoder_prefix(model))
    return model


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(the base's, the chains'), shared ones once."""
    trained = [p for layer in chain_layers(model).values() for p in (layer.A, layer.links, layer.B)]
    ours = {id(p) for p in trained}
    return [p for p in model.parameters() if id(p) not in ours], trained


def _base_bytes(recipe: Recipe, model: nn.Module) -> int:
    base, _ = _parameters(model)
    rounded = _rounded_weights(model) if recipe.model.quantization != "none" else set()
    small = _QUANTISED.get(recipe.model.quantization)
    return round(sum(p.numel() * (small if id(p) in rounded else p.element_size()) for p in base))


def _rounded_weights(model: nn.Module) -> set[int]:
    """The weights that bitsandbytes rounds: those of linear modules, but the head's."""
    head = model.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}


def _optimizer_bytes(parameter: Tensor, name: str) -> int:
    """AdamW's two moments."""
    each = 1 if "8bit" in name and parameter.numel() >= _SMALL else 4
    return 2 * each * parameter.numel()


def resident_bytes() -> int:
    """The memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _logits(model: nn.Module, labelled: int, device: torch.device) -> int:
    """The logits of the largest piece, in the model's type and in float32, and their gradients."""
    weight = model.get_output_embeddings().weight
    rows = min(labelled, positions_at_once(weight.shape[0], device))
    return 2 * (4 + weight.element_size()) * rows * weight.shape[0]


def _activations(recipe: Recipe, model: nn.Module, batch: int, length: int, device: torch.device) -> int:
    """What autograd keeps between the forward and the backward pass, and one block's gradients."""
    # These two keep attention's weights as tensors of their own, which makes them countable.
    attention = _attention(recipe, model, device)
    countable = attention in ("eager", GROUPED)
    model.set_attn_implementation(attention if countable else "eager")
    make_norms_lean(model)
    kept = saved_bytes(model, batch, length)
    if not countable:
        # Fused attention keeps no (length x length) weights: the part that grows with the length's square.
        square = max(0.0, (saved_bytes(model, batch, 2 * length) - 2 * kept) / 2)
        kept = int(kept - square)
    blocks = len(_blocks(text_decoder(model))[1])
    if recipe.training.gradient_checkpointing:
        hidden = batch * length * model.get_input_embeddings().weight.shape[1] * _element_size(model)
        return blocks * hidden + 2 * kept // blocks
    return kept + kept // blocks


def _attention(recipe: Recipe, model: nn.Module, device: torch.device) -> str:
    """The implementation that `load_model` will choose, as far as that can be known without weights."""
    attention = resolve_attention(recipe.model.attention, device) or "sdpa"
    return "eager" if attention == GROUPED and not may_group(model) else attention


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
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), folded(model):
        # With a mask transformers does not look into the (absent) values for packed sequences.
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a decoder's blocks: its longest list of modules."""
    lists = [(path, module) for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: len(found[1]))


# --- time -----------------------------------------------------------------------------------------


def _time(
    recipe: Recipe,
    model: nn.Module,
    rows: EncodedRows,
    steps: int,
    validation: EncodedRows | None,
    device: torch.device,
    world: int,
) -> TimePlan:
    epoch = recipe_epoch(recipe, rows, world)
    batch = min(_micro_batch(recipe), epoch.rows)
    length = max(1, round(epoch.computed / epoch.rows))
    labels = max(1, round(batch * epoch.supervised_tokens / epoch.rows))
    both, forward = position_seconds(recipe, model, batch, length, device)
    each_label = label_seconds(model, labels, device)
    if recipe.training.gradient_checkpointing:
        both += forward
    # With grouped attention only that sees the padding, which is little beside the rest.
    flat = _attention(recipe, model, device) == GROUPED

    def positions(rows: EncodedRows, epoch: EpochPlan, drops: bool) -> float:
        if not flat:
            return epoch.computed
        return epoch.tokens * (1.0 if drops else computed_share(recipe, rows, world))

    blocks = both * positions(rows, epoch, recipe.adapter.dropout > 0)
    epoch_seconds = (blocks + 2 * each_label * epoch.supervised_tokens) / world
    train = epoch_seconds * steps / epoch.steps
    validate = 0.0
    if validation is not None:
        held_out = recipe_epoch(recipe, validation, world)
        times = math.ceil(steps / recipe.training.eval_every)
        blocks = forward * positions(validation, held_out, False)
        validate = times * (blocks + each_label * held_out.supervised_tokens) / world
    return TimePlan(round(train, 2), round(validate, 2), round(epoch.tokens / epoch_seconds, 2))


def computed_share(recipe: Recipe, rows: EncodedRows, world: int = 1) -> float:
    """The share of the rows' tokens that a model computes if it reads them without padding and what the rows
    of a micro-batch begin with once; of the first steps, since any are as good."""
    size = recipe.training.global_batch_size
    tokens = computed = 0
    for step in range(min(_SAMPLED_STEPS, steps_per_epoch(len(rows), size))):
        chosen = step_rows(len(rows), recipe.seed, size, step)
        for part in micro_batches(chosen, rows.lengths, _micro_batch(recipe), 0, world):
            if not len(part):
                continue
            batch = collate(rows, part, 0)
            tokens += int(batch.attention_mask.sum())
            flat = FlatRows.of(batch.input_ids, batch.attention_mask, torch.float32)
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
    path, blocks = _blocks(decoder)
    count = len(blocks)
    weights = sum(p.numel() for p in blocks[0].parameters())
    taken = blocks[: _TIMED_BLOCKS if weights <= _TIMED_BLOCK_WEIGHTS else 1]
    decoder.set_submodule(path, taken)
    decoder.config.num_hidden_layers = len(taken)
    width = decoder.get_input_embeddings().weight.shape[1]
    dtype = decoder.get_input_embeddings().weight.dtype
    decoder.set_input_embeddings(nn.Embedding(1, width, device="meta"))
    decoder.set_attn_implementation(_attention(recipe, decoder, device))
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
        scale = count / len(taken) / (batch * length)
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
    """Random numbers of our own: a run that is planned must not differ from one that is not."""
    return torch.Generator(device).manual_seed(0)


def label_seconds(model: nn.Module, labelled: int, device: torch.device) -> float:
    """Seconds per labelled position of the head's forward pass, measured on `labelled` positions at once."""
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
