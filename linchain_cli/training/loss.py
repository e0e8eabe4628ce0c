"""The training loss: cross-entropy at labelled positions only, the vocabulary's logits a bounded piece at a
time.

Letters behind a name are a tensor's dimensions: T tokens, n labelled positions, p those of one piece, d the
hidden state's width, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linchain_cli.chain import drops
from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.model.flat_rows import TOKEN_STEP, FlatRows, flat_hidden_states, in_one_copy, rows_for
from linchain_cli.model.head import head_logits, hidden_states, vocabulary_size
from linchain_cli.model.rope import forget_lengths, length_classes

# Logits held at once: 2**25 float32 values are 128 MiB.
LOGITS_BUDGET = 2**25
# On a CPU fewer positions at a time stay in its caches: 160 take 0.75 to 0.9 of the time of 640 with
# vocabularies of 32,000 and 49,152, and 1.1 times that of 640 with 151,936, which the budget does not allow.
_POSITIONS_ON_CPU = 160
# On a GPU products are computed in tiles of up to so many rows: a part of one takes as long as all of it.
_TILE = 256
_MORE_THAN_ANY_VOCABULARY = 2**32


@dataclass(frozen=True)
class Labels:
    """What a forward over a batch is asked for: the label behind each of n of its tokens, all (n,) int64.

    `positions` point into the tokens as they are computed one behind the other, in order. Rows that begin
    alike share tokens: each pair of position and label comes once, `counts` times in the batch.
    """

    positions: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def of(cls, batch: Batch, flat: FlatRows | None = None, step: int = 1) -> Labels:
        """Those of a batch with its padding, or of its flat rows.

        n becomes a multiple of `step` by repeating the last one, which counts nothing then. It is worked out
        where the batch lies, on the CPU: a GPU would have to be waited for.
        """
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        rows, places = (targets != IGNORED).nonzero().T
        positions = rows * targets.shape[1] + places if flat is None else flat.token_of[rows, places]
        pairs, counts = (positions * _MORE_THAN_ANY_VOCABULARY + targets[rows, places]).unique(
            return_counts=True
        )
        fill = -len(pairs) % step
        pairs = torch.cat([pairs, pairs[-1:].expand(fill)])
        positions, labels = pairs // _MORE_THAN_ANY_VOCABULARY, pairs % _MORE_THAN_ANY_VOCABULARY
        return cls(positions, labels, F.pad(counts, (0, fill)))

    def to(self, device: torch.device) -> Labels:
        return in_one_copy(self, device)


def _read(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Labels]:
    """Hidden states (n, d) of a batch's labelled tokens, and their n labels."""
    # What chains drop is to differ from row to row, also where rows begin alike.
    flat = rows_for(model, batch.input_ids, batch.attention_mask, share=not drops(model))
    # On a CPU each new shape of a product costs time, see `TOKEN_STEP`.
    labels = Labels.of(batch, flat, step=TOKEN_STEP if device.type == "cpu" else 1).to(device)
    if flat is not None:
        hidden_Td = flat_hidden_states(model, flat.to(device))
    else:
        hidden_Td = hidden_states(model, batch.input_ids.to(device, non_blocking=True)).flatten(0, 1)
    return hidden_Td.index_select(0, labels.positions), labels


def _parts(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The batch, in as many parts as it takes so that no row's values depend on the others' lengths."""
    lengths = batch.attention_mask.sum(1)
    classes = length_classes(model, lengths)
    for kind in classes.unique():
        rows = classes == kind
        longest = int(lengths[rows].max())
        forget_lengths(model)
        yield batch if rows.all() else Batch(*(each[rows, :longest] for each in vars(batch).values()))


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """How many positions have their logits computed together: on a GPU in whole tiles, one at least."""
    most = LOGITS_BUDGET // vocabulary
    if device.type == "cpu":
        return max(1, min(most, _POSITIONS_ON_CPU))
    return max(1, most // _TILE) * _TILE


def _pieces(model: nn.Module, hidden_nd: Tensor) -> list[slice]:
    size = positions_at_once(vocabulary_size(model), hidden_nd.device)
    return [slice(start, start + size) for start in range(0, len(hidden_nd), size)]


def add_gradients(model: nn.Module, batch: Batch, scale: float, device: torch.device) -> Tensor:
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
    for part in _parts(model, batch):
        hidden_nd, read = _read(model, part, device)
        gradient_nd = torch.empty_like(hidden_nd)
        for piece in _pieces(model, hidden_nd):
            leaf_pd = hidden_nd[piece].detach().requires_grad_()
            loss = scale * _summed(model, leaf_pd, read, piece)
            loss.backward()
            gradient_nd[piece] = leaf_pd.grad
            total += loss.detach()
        if hidden_nd.requires_grad:
            # Also where there was no label: a sharded base expects every process in its backward pass.
            hidden_nd.backward(gradient_nd)
    return total


@torch.no_grad()
def summed_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Summed cross-entropy over the labelled positions, without gradients: a float64 scalar on `device`."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in _parts(model, batch):
        hidden_nd, read = _read(model, part, device)
        for piece in _pieces(model, hidden_nd):
            total += _summed(model, hidden_nd[piece], read, piece)
    return total


def _summed(model: nn.Module, hidden_pd: Tensor, read: Labels, piece: slice) -> Tensor:
    """Summed cross-entropy of a piece of the labels, of whose tokens `hidden_pd` are the states.

    At least in float32: a log-softmax over a vocabulary in half precision loses the loss's digits.
    """
    logits_pV = head_logits(model, hidden_pd)
    logits_pV = logits_pV if logits_pV.dtype == torch.float64 else logits_pV.float()
    return (F.cross_entropy(logits_pV, read.labels[piece], reduction="none") * read.counts[piece]).sum()
