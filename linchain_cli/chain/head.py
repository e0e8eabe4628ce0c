"""A classifier's head beside chains: what turns hidden states into a score per class, or into one number.

It is small and often begins at random, so it is trained whole, in float32 like the chains, and kept with them
in the adapter's file, by its parameters' names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.chain.init import random_stream
from linchain_cli.errors import InputError


@dataclass(frozen=True)
class Head:
    """A trained head apart from any model.

    tensors: by parameter name, float32
    classes: their names, in the order of the outputs; none for a regression
    """

    tensors: dict[str, Tensor]
    classes: tuple[str, ...] = ()


def head_of(model: nn.Module, names: Sequence[str], classes: Sequence[str] = ()) -> Head:
    """The head that `model` carries in the parameters `names`, as copies on the CPU."""
    tensors = {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}
    return Head(tensors, tuple(classes))


@torch.no_grad()
def load_head(model: nn.Module, head: Head) -> None:
    """Puts a head's values into a model, which computes it in float32 from then on.

    Raises:
        InputError: the model lacks one of the parameters, or has it in another shape. Nothing is changed
        then.
    """
    own = dict(model.named_parameters())
    for name, tensor in head.tensors.items():
        shape = tuple(own[name].shape) if name in own else "nothing"
        if shape != tuple(tensor.shape):
            raise InputError(
                f"the adapter's head does not fit this model: '{name}' is {tuple(tensor.shape)}, and"
                f" {type(model).__name__} has {shape} there"
            )
    make_trainable(model, head.tensors)
    for name, tensor in head.tensors.items():
        model.get_parameter(name).copy_(tensor)
        model.get_parameter(name).requires_grad_(False)


@torch.no_grad()
def initialise_head(model: nn.Module, names: Collection[str], seed: int, deviation: float) -> None:
    """Sets these parameters of a head as transformers does: weights normal around zero with the standard
    deviation `deviation`, biases zero, gains of norms one. Each is drawn from a stream of its own, on the
    CPU."""
    for name in names:
        path, _, kind = name.rpartition(".")
        parameter = model.get_parameter(name)
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape).normal_(
                0, deviation, generator=random_stream(seed, path, kind)
            )
            parameter.copy_(drawn)
        else:
            parameter.fill_(1.0 if kind == "weight" else 0.0)


def make_trainable(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Turns parameters into float32, trained, and has their modules compute in it, whatever type the base
    has. Calling it again changes nothing.

    Returns:
        The parameters by name.
    """
    found = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, kind)
        if parameter.dtype != torch.float32:
            parameter = nn.Parameter(parameter.detach().float())
            setattr(module, kind, parameter)
        found[name] = parameter.requires_grad_()
        if _in_float32 not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_in_float32)
    return found


def _in_float32(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments
    )
