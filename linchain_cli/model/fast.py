"""Other ways through a model than its own: how they are tried, and how forwards are replaced.

No list of architectures stays true. So whatever computes a model faster, or in parts, is tried on a few
tokens and kept only if the same comes out; what a model refuses with an exception of its own is no. A trial
leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.errors import InputError, LinchainError

# What a model's code raises that is asked for something it does not provide for.
REFUSALS = (
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# The largest error, beside how far values differ from token to token.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_PRECISION = 1e-2
# Gradients gather more of it: on SmolLM2-135M 2e-4 and 1e-2 where the hidden states have 4e-6 and 2e-3.
GRADIENT_SLACK = 10.0


def probe_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """Token ids (rows, length) to try a model with, on its device: all different as far as the vocabulary
    goes."""
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(1, 1 + rows * length, device=embeddings.device) % embeddings.shape[0]
    return ids.view(rows, length)


def alike(
    ours: Tensor, expected: Tensor, dtype: torch.dtype, *, whole: bool = False, slack: float = 1.0
) -> bool:
    """Whether two ways through a model of that type differ by rounding alone.

    The values are (..., d), one vector for each token. What all tokens have in common does not count: in
    trained models a few dimensions are large everywhere, and would hide what happens in the others. float64
    is held to float32's digits, because softmax and norms are in float32 whatever the model's type.

    Args:
        whole: the values are no states of many tokens (gradients, one token's logits) and count as they are.
        slack: how many times the usual error is allowed.
    """
    tolerance = _TOLERANCES.get(dtype, _HALF_PRECISION) * slack
    ours, expected = ours.detach().double(), expected.detach().double()
    spread = expected if whole else expected - expected.flatten(0, -2).mean(0)
    return bool((ours - expected).norm() <= tolerance * spread.norm())


def gradient_of(hidden: Tensor, embedded: Tensor) -> Tensor:
    """Of a sum of these hidden states, each through its sine; no trained tensor receives any."""
    return torch.autograd.grad(hidden.float().sin().sum(), embedded)[0]


@contextlib.contextmanager
def embeddings_apart(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list receives what the embeddings give in each forward, as leaves that take a gradient."""
    embedded: list[Tensor] = []

    def apart(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may change in place

    hook = model.get_input_embeddings().register_forward_hook(apart)
    try:
        yield embedded
    finally:
        hook.remove()


def record(model: nn.Module) -> dict[str, Any]:
    """What trials have found out about a model, by the trial's name; a copy of the model takes it along."""
    return model.__dict__.setdefault("_linchain", {})


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Has `forward(module, ...)` stand in for a module's own, which stays `type(module).forward`.

    It is bound to the module, so that a copy of the module computes with its own weights.

    Returns:
        What puts back the forward that was there before.
    """
    before = vars(module).get("forward")
    module.forward = types.MethodType(forward, module)

    def undo() -> None:
        if before is not None:
            module.forward = before
        else:
            vars(module).pop("forward", None)

    return undo


def is_replaced(module: nn.Module) -> bool:
    """Whether something else stands in for the module's own forward now."""
    return "forward" in vars(module)


def forget_failed_forward(model: nn.Module) -> None:
    """To be called after a forward that raised: in a model that is spread over processes (FSDP2) the block
    that it was in would stay whole, and the next forward would not begin anew.

    Raises:
        LinchainError: such a model, and a torch before 2.13, which cannot have it begin anew.
    """
    for module in model.modules():
        if hasattr(module, "reset_iter_state"):  # the outermost one has it do so for all
            module.reset_iter_state()
            return
        if hasattr(module, "reshard"):
            raise LinchainError(
                f"a trial of {type(model).__name__} failed, after which torch {torch.__version__} cannot go"
                " on with a base that is spread over processes; with torch 2.13 it can. Or set"
                " training.parallel to replicate, which holds the base whole on every process"
            )


@contextlib.contextmanager
def changing_nothing(model: nn.Module) -> Iterator[None]:
    """For trials: puts back buffers that a forward wrote to (caches of positions), and refuses a model that
    wrote to its weights.

    Raises:
        InputError: it did. A chain beside such weights would be another one than in the checkpoint.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    weights = {name: _digest(parameter) for name, parameter in model.named_parameters()}
    failure = None
    try:
        yield
    except InputError as error:  # of which changed weights may be the cause
        failure = error
    finally:
        for module, name, buffer, before in buffers:
            with torch.no_grad():
                buffer.copy_(before)
            module._buffers[name] = buffer
    for name, parameter in model.named_parameters():
        if _digest(parameter) != weights.get(name):
            raise InputError(
                f"{type(model).__name__} changes its own weights while it computes (first '{name}'); what is"
                " trained beside them would not fit the checkpoint. This architecture is not supported"
            ) from failure
    if failure is not None:
        raise failure


def _digest(tensor: Tensor) -> int:
    """The sum of a tensor's bytes in words of eight: equal for equal tensors, and rarely otherwise."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    data = local.detach().contiguous().flatten().view(torch.uint8)
    whole = len(data) // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
