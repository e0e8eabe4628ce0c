"""The optimizer over a model's chains, and its state as named tensors (so that checkpoints need no pickle)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linchain_cli.chain import ChainLinear
from linchain_cli.errors import InputError

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def trained_parameters(layers: Mapping[str, ChainLinear]) -> dict[str, nn.Parameter]:
    """A, links and B of every layer by the names the adapter file uses; empty links (depth 0) are left out."""
    named = {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in ("A", "links", "B")}
    return {name: parameter for name, parameter in named.items() if parameter.numel()}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, multipliers: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW with one parameter group per kind of tensor (A, links, B); `rate_scale` holds the kind's multiplier."""
    groups = []
    for kind in ("A", "links", "B"):
        members = [parameter for name, parameter in parameters.items() if name.endswith("." + kind)]
        if members:
            groups.append({"params": members, "rate_scale": multipliers.get(kind, 1.0)})
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to `rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>/<state name>` tensors on the CPU (numbers become 0-d tensors)."""
    state = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` gave.

    Raises:
        InputError: the state belongs to other parameters.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in state.items():
        name, _, entry = key.rpartition("/")
        if name not in by_parameter:
            raise InputError(f"the checkpoint's optimizer state names '{name}', which this run does not train")
        by_parameter[name][entry] = tensor
    for name, parameter in parameters.items():
        entries = by_parameter[name]
        if not entries:
            raise InputError(f"the checkpoint holds no optimizer state for '{name}'")
        # AdamW's `step` is a scalar tensor that its fused form wants on the parameter's device.
        optimizer.state[parameter] = {entry: tensor.to(parameter.device, copy=True) for entry, tensor in entries.items()}
