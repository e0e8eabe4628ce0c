"""A decoder's blocks, and the feed-forward layer of the last one at those positions alone whose next token is
asked for.

What it computes anywhere else, nobody reads: only attention looks at other positions, and none follows it. In
a model of thirty blocks of which a tenth of the tokens is labelled, that is some two per cent of a step.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.errors import InputError
from linchain_cli.model.attention import alike
from linchain_cli.model.head import hidden_states
from linchain_cli.model.loading import text_decoder

_TRIMMED = "_linchain_trimmed"  # on a model that was tried: the module whose forward is ours, or None
_READ = "_linchain_read"  # on that module: the positions that are read, None for all


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The text decoder's repeated blocks, in order.

    They are the outermost modules that transformers marks as units of recomputation; where it marks none, the
    members of the decoder's longest list of modules.

    Raises:
        InputError: the model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = text_decoder(model)
    marked = [
        path for path, module in decoder.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    outermost = [path for path in marked if not any(path.startswith(other + ".") for other in marked)]
    if outermost:
        return [decoder.get_submodule(path) for path in outermost]
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} is not made of blocks, which training.gradient_checkpointing,"
            " training.compile and training.parallel=shard need: switch them off."
        )
    return list(max(lists, key=len))


@contextlib.contextmanager
def reading_only(model: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """Inside, the model's hidden states are right at these positions (n,) of the flattened tokens, or at all
    for None, and may be anything elsewhere. A backward pass belongs inside, too: it may compute the block
    again.
    """
    module = getattr(model, _TRIMMED, None)
    # A quantised product of no rows is nothing that kernels expect.
    if module is None or positions is None or not len(positions):
        yield
        return
    setattr(module, _READ, positions)
    try:
        yield
    finally:
        setattr(module, _READ, None)


@torch.no_grad()
def trim_last_block(model: nn.Module) -> bool:
    """Prepares the model for `reading_only`, if a trial shows that its last block allows for it."""
    if hasattr(model, _TRIMMED):  # tried before
        return getattr(model, _TRIMMED) is not None
    embeddings = model.get_input_embeddings().weight
    ids = (torch.arange(1, 9, device=embeddings.device) % embeddings.shape[0])[None]
    read = torch.tensor([2, 3, 6], device=embeddings.device)
    try:
        block = decoder_blocks(model)[-1]
        expected = hidden_states(model, ids)[0, read].float()
    except (InputError, AttributeError, TypeError, ValueError, RuntimeError):
        object.__setattr__(model, _TRIMMED, None)
        return False
    # Mostly the feed-forward layer is the last part that is made of several; attention fails the trial.
    for part in reversed([part for part in block.children() if any(True for _ in part.children())]):
        part.forward = types.MethodType(_forward, part)
        # As a plain attribute: a module must not be one of the model's parts twice.
        object.__setattr__(model, _TRIMMED, part)
        try:
            with reading_only(model, read):
                trimmed = hidden_states(model, ids)[0].float()
            if alike(trimmed[read], expected, model.dtype):
                return True
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            pass
        untrim_last_block(model)
    object.__setattr__(model, _TRIMMED, None)
    return False


def untrim_last_block(model: nn.Module) -> None:
    """Undoes `trim_last_block`."""
    part = vars(model).pop(_TRIMMED, None)
    if part is not None:
        del part.forward


def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(batch, length, d) → the same; zeros where nobody reads."""
    own, read = type(self).forward.__get__(self), getattr(self, _READ, None)
    if read is None:
        return own(x, *args, **kwargs)
    rows = x.flatten(0, 1)
    output = own(rows.index_select(0, read)[None], *args, **kwargs)[0]
    return output.new_zeros(len(rows), output.shape[-1]).index_copy(0, read, output).view(*x.shape[:2], -1)
