"""What is done to a model's blocks as units: recompute and compile them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from linchain_cli.model.fast import record, replace_forward
from linchain_cli.model.head import decoder_blocks

_UNDO = "blocks"  # undoes the last `set_up_blocks`, in the model's record


def set_up_blocks(model: nn.Module, *, recompute: bool, compiled: bool, offload: bool = False) -> None:
    """Makes the blocks compute their activations again in the backward pass, and compiles them, as asked for.

    With `offload` the hidden states that each block computes again from are kept in main memory. The base
    stays in eval mode, which transformers' own recomputation does not allow for. Calling it again replaces
    what an earlier call did.
    """
    undo = record(model).setdefault(_UNDO, contextlib.ExitStack())
    undo.close()
    if not (recompute or compiled):
        return
    if compiled:
        undo.callback(_allow_all_shapes())
    for block in decoder_blocks(model):
        forward = block.forward
        if compiled:
            # Rows have all lengths: one program with a symbolic length instead of one for each.
            forward = torch.compile(forward, dynamic=True)
        forward = _recomputed(forward, offload) if recompute else _unbound(forward)
        undo.callback(replace_forward(block, forward))


def _allow_all_shapes() -> Callable[[], None]:
    """Sets torch.compile up for blocks on rows of all lengths; returns what sets it back."""
    from torch._dynamo import config as dynamo
    from torch.fx.experimental import _config as symbolic_shapes

    before = dynamo.recompile_limit, symbolic_shapes.use_duck_shape
    # All blocks share one code object, of which a program is made per case: with and without gradients, for
    # one row and for several. Beyond the limit torch would run it uncompiled, and only warn.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    # Or two sizes that happen to be equal in the first batch would be taken for one, and the program made
    # again when they differ.
    symbolic_shapes.use_duck_shape = False

    def undo() -> None:
        dynamo.recompile_limit, symbolic_shapes.use_duck_shape = before

    return undo


def _unbound(forward: Callable) -> Callable:
    return lambda _block, *args, **kwargs: forward(*args, **kwargs)


def _recomputed(forward: Callable, offload: bool) -> Callable:
    def run(_block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not (offload and args):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        # What else a block is given (masks, rotary angles) is the same for all of them, and stays.
        hidden, *others = args
        with save_on_cpu(pin_memory=hidden.is_cuda):
            return checkpoint(lambda x: forward(x, *others, **kwargs), hidden, use_reentrant=False)

    return run
