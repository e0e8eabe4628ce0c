"""The training loss: cross-entropy at labelled positions only, the vocabulary's logits a bounded piece at a
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.model.attention import FlatRows
from linchain_cli.model.head import flat_hidden_states, head_logits, hidden_states, reads_flat
from linchain_cli.model.last_block import reading_only

# Logits held at once: 2**25 float32 values are 128 MiB.
LOGITS_BUDGET = 2**25


@contextlib.contextmanager
def _labelled(model: nn.Module, batch: Batch, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states (n, d) of the positions whose next token is labelled, and those n labels. A backward pass
    through the hidden states belongs inside.

    Which positions these are is worked out where the batch lies, on the CPU: a GPU would have to be waited
    for.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    positions = (targets != IGNORED).nonzero()[:, 0]
    labels = targets[positions].to(device, non_blocking=True)
    flat, tokens = reads_flat(model, batch.input_ids.shape[1]), batch.attention_mask.flatten()
    if flat:
        positions = (tokens.cumsum(0) - 1)[positions]
    # Where most positions are read, picking them out saves less than it costs.
    few = 2 * len(positions) < int(tokens.sum())
    positions = positions.to(device, non_blocking=True)
    with reading_only(model, positions if few else None):
        if flat:
            dtype = model.get_input_embeddings().weight.dtype
            rows = FlatRows.of(batch.input_ids, batch.attention_mask, dtype)
            hidden = flat_hidden_states(model, rows.to(device))
        else:
            hidden = hidden_states(model, batch.input_ids.to(device, non_blocking=True)).flatten(0, 1)
        yield hidden.index_select(0, positions), labels


def _pieces(model: nn.Module, count: int) -> list[slice]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, LOGITS_BUDGET // vocabulary)
    return [slice(start, start + size) for start in range(0, count, size)]


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
    with _labelled(model, batch, device) as (hidden, targets):
        leaf = hidden.detach().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        for piece in _pieces(model, len(targets)):
            logits = head_logits(model, leaf[piece])
            loss = scale * F.cross_entropy(_widened(logits), targets[piece], reduction="sum")
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
    with _labelled(model, batch, device) as (hidden, targets):
        for piece in _pieces(model, len(targets)):
            logits = _widened(head_logits(model, hidden[piece]))
            total += F.cross_entropy(logits, targets[piece], reduction="sum")
    return total
