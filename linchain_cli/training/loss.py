"""The training loss: cross-entropy at labelled positions only, the vocabulary's logits a bounded piece at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linchain_cli.head import head_logits, hidden_states

IGNORED = -100
# Logits held at once: 2**25 float32 values are 128 MiB.
LOGITS_BUDGET = 2**25


def _labelled(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (n, d) of the positions whose next token is labelled, and those n labels."""
    targets = labels[:, 1:]
    mask = targets != IGNORED
    hidden = hidden_states(model, input_ids)
    return hidden[:, :-1][mask], targets[mask]


def _pieces(model: nn.Module, count: int) -> list[slice]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, LOGITS_BUDGET // vocabulary)
    return [slice(start, start + size) for start in range(0, count, size)]


def backward(model: nn.Module, input_ids: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Adds the gradient of `scale` · (summed cross-entropy of this micro-batch) to every trained tensor.

    The head runs forward and backward piece by piece, which leaves the gradient of the hidden states; that one then
    goes through the backbone. So logits of at most `LOGITS_BUDGET` values exist at a time, and none is computed twice.

    Args:
        input_ids: (batch, length), right-padded. labels: (batch, length), -100 where nothing is supervised;
            labels[:, t] is the token at t, predicted from the positions before it.
        scale: 1 / (supervised tokens of the whole optimizer step), so that the step's loss is the mean over its
            tokens however they are split into micro-batches and processes.

    Returns:
        The scaled loss, a float32 scalar on the model's device, detached.
    """
    hidden, targets = _labelled(model, input_ids, labels)
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for piece in _pieces(model, len(targets)):
        logits = head_logits(model, leaf[piece])
        loss = scale * F.cross_entropy(_widened(logits), targets[piece], reduction="sum")
        loss.backward()
        total += loss.detach()
    if leaf.grad is not None and hidden.requires_grad:
        hidden.backward(leaf.grad)
    return total


def _widened(logits: Tensor) -> Tensor:
    """At least float32: a log-softmax over a vocabulary in half precision loses the loss's digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def summed_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy over the labelled positions, without gradients: a float64 scalar."""
    hidden, targets = _labelled(model, input_ids, labels)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for piece in _pieces(model, len(targets)):
        total += F.cross_entropy(_widened(head_logits(model, hidden[piece])), targets[piece], reduction="sum")
    return total
