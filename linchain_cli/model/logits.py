"""Logits only where somebody reads them.

Projecting to the vocabulary is a fifth of a small model's arithmetic and nearly all of its logits
memory, while a row is read at a few positions: those that carry a label, or those after which an
answer option begins.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linchain_cli.errors import LinchainError
from linchain_cli.model.fast import replace_forward
from linchain_cli.model.flat_rows import in_one_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY_BLOCK = 16384


@contextlib.contextmanager
def logits_at(model: PreTrainedModel, positions: torch.Tensor, *, float32: bool = False) -> Iterator[None]:
    """Inside the block, the model's forward returns logits at the True entries of `positions` alone.

    `positions` is boolean (batch, length), where length counts the tokens given to the forward (not
    those in a cache). It may lie on the CPU whatever the model's device, which then need not be waited for.
    `output.logits` becomes (1, n, vocabulary), its n rows in the order of
    `positions.nonzero()`. The hidden states are gathered in front of the output projection, so
    everything a model does behind it (scaling, soft-capping) still happens, and gradients flow as usual.

    With `float32` the projection of a model in half precision multiplies and returns in float32. A logit of
    20 in bfloat16 is a multiple of 0.125: on SmolLM2-135M every tenth row's two best answers tied.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise LinchainError(
            f"{type(model).__name__} has no output projection, so it cannot be read at single positions"
        )
    calls, places = 0, positions.flatten().nonzero().squeeze(-1)

    def gather(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        hidden = inputs[0]
        if hidden.shape[:2] != positions.shape:
            raise LinchainError(
                f"positions to read are {tuple(positions.shape)},"
                f" the output projection got {tuple(hidden.shape)}"
            )
        chosen = hidden.flatten(0, 1).index_select(0, in_one_copy(places, hidden.device))
        return (chosen.unsqueeze(0), *inputs[1:])

    linear = hasattr(head, "out_features")  # also one that carries a chain
    with contextlib.ExitStack() as undo:
        undo.callback(head.register_forward_pre_hook(gather).remove)
        if float32 and linear and head.weight.dtype in (torch.bfloat16, torch.float16):
            undo.callback(replace_forward(head, _project_in_float32))
        yield
    if calls == 0:
        raise LinchainError(
            f"{type(model).__name__} never called its output projection, so its logits were not gathered"
        )


def _project_in_float32(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The projection's logits in float32, its weight converted block by block."""
    hidden, weight, at = hidden.float(), head.weight, 0  # a chain computes its weight
    logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
    for block in weight.split(VOCABULARY_BLOCK):
        logits[..., at : at + len(block)] = hidden @ block.float().T
        at += len(block)
    return logits if head.bias is None else logits.add_(head.bias.float())


@functools.cache
def cache_name() -> str:
    """What transformers calls a model's cache, as an argument and in outputs: `past_key_values` before 5.24,
    which warns of that name."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument by which a model continues from a cache; none for None."""
    return {} if cache is None else {cache_name(): cache}


def last_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Any = None, **inputs: Any
) -> tuple[torch.Tensor, Any]:
    """Logits (batch, vocabulary) behind the last token of `input_ids` (batch, length), which continue what
    `cache` holds; and the cache."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    output = model(input_ids=input_ids, use_cache=True, **with_cache(cache), **inputs)
    return output.logits[:, -1], output.get(cache_name())
