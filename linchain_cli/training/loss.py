"""The training loss: cross-entropy at labelled positions only, the vocabulary's logits a bounded piece at a
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linchain_cli.chain import drops
from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.model.attention import TOKEN_STEP, FlatRows
from linchain_cli.model.head import (
    flat_hidden_states,
    head_logits,
    hidden_states,
    reads_flat,
    vocabulary_size,
)
from linchain_cli.model.last_block import reading_only

# Logits held at once: 2**25 float32 values are 128 MiB.
LOGITS_BUDGET = 2**25
# On a CPU fewer positions at a time stay in its caches: 160 take 0.75 to 0.9 of the time of 640 with
# vocabularies of 32,000 and 49,152, and 1.1 times that of 640 with 151,936, which the budget does not allow.
_POSITIONS_ON_CPU = 160
_LABELS = 2**32  # more than any vocabulary has


@contextlib.contextmanager
def _labelled(
    model: nn.Module, batch: Batch, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states (n, d) of the positions whose next token is labelled, those n labels, and how many times
    each counts: rows that begin alike share positions, and on a CPU the last one is repeated, counting
    nothing, until n is a multiple of `TOKEN_STEP`. A backward pass through the hidden states belongs inside.

    Which positions these are is worked out where the batch lies, on the CPU: a GPU would have to be waited
    for.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    rows, places = (targets != IGNORED).nonzero().T
    if reads_flat(model, targets.shape[1]):
        dtype = model.get_input_embeddings().weight.dtype
        flat = FlatRows.of(batch.input_ids, batch.attention_mask, dtype, share=not drops(model))
        positions, tokens = flat.padded_rows[rows, places], flat.input_ids.shape[1]
    else:
        flat, positions, tokens = None, rows * targets.shape[1] + places, int(batch.attention_mask.sum())
    pairs, counts = (positions * _LABELS + targets[rows, places]).unique(return_counts=True)
    positions, labels = pairs // _LABELS, pairs % _LABELS
    if device.type == "cpu":
        fill = -len(labels) % TOKEN_STEP
        positions, labels = (torch.cat([each, each[-1:].expand(fill)]) for each in (positions, labels))
        counts = F.pad(counts, (0, fill))
    read = positions.unique_consecutive().to(device, non_blocking=True)
    positions, labels, counts = (each.to(device, non_blocking=True) for each in (positions, labels, counts))
    # Where most positions are read, picking them out saves less than it costs.
    with reading_only(model, read if 2 * len(read) < tokens else None):
        if flat is not None:
            hidden = flat_hidden_states(model, flat.to(device))
        else:
            hidden = hidden_states(model, batch.input_ids.to(device, non_blocking=True)).flatten(0, 1)
        yield hidden.index_select(0, positions), labels, counts


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """How many positions have their logits computed together."""
    most = max(1, LOGITS_BUDGET // vocabulary)
    return min(most, _POSITIONS_ON_CPU) if device.type == "cpu" else most


def _pieces(model: nn.Module, hidden: Tensor) -> list[slice]:
    size = positions_at_once(vocabulary_size(model), hidden.device)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def backward(model: nn.Module, batch: Batch, scale: float, device: torch.device) -> Tensor:
    """Adds the gradient of `scale` · (summed cross-entropy of this micro-batch) to every trained tensor.

    The head runs forward and backward piece by piece, which leaves the gradient of the hidden states; that
    one then goes through the backbone. So logits of at most `LOGITS_BUDGET` values exist at a time, and none
    is computed twice.

    Args:
        batch: right-padded rows on the CPU; one without labels takes part, with a gradient of zero.
        scale: 1 / (supervised tokens of the whole optimizer step), so that the step's loss is the mean over
            its tokens however they are split into micro-batches and processes.
        device: the model's.

    Returns:
        The scaled loss, a float32 scalar on `device`, detached.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    with _labelled(model, batch, device) as (hidden, targets, counts):
        leaf = hidden.detach().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        for piece in _pieces(model, hidden):
            logits = head_logits(model, leaf[piece])
            losses = F.cross_entropy(_widened(logits), targets[piece], reduction="none")
            loss = scale * (losses * counts[piece]).sum()
            loss.backward()
            total += loss.detach()
        if hidden.requires_grad:
            # Also where there was no label: a sharded base expects every process in its backward pass.
            hidden.backward(leaf.grad)
    return total


def _widened(logits: Tensor) -> Tensor:
    """At least float32: a log-softmax over a vocabulary in half precision loses the loss's digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def summed_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Summed cross-entropy over the labelled positions, without gradients: a float64 scalar on `device`."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    with _labelled(model, batch, device) as (hidden, targets, counts):
        for piece in _pieces(model, hidden):
            logits = _widened(head_logits(model, hidden[piece]))
            total += (F.cross_entropy(logits, targets[piece], reduction="none") * counts[piece]).sum()
    return total
