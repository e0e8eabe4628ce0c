"""The optimizer over a model's chains, and its state as named tensors, so that checkpoints need no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linchain_cli.chain import ChainLinear
from linchain_cli.errors import InputError

BETAS = (0.9, 0.999)
EPSILON = 1e-8
KINDS = ("A", "links", "B")
# The tables that 8-bit values are looked up in: constants, which all states of an optimizer share.
_TABLES = ("qmap1", "qmap2")


def trained_parameters(layers: Mapping[str, ChainLinear]) -> dict[str, nn.Parameter]:
    """A, links and B of every layer by the adapter file's names; empty links (depth 0) are left out."""
    named = {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in KINDS}
    return {name: parameter for name, parameter in named.items() if parameter.numel()}


def build_optimizer(
    name: str, parameters: Mapping[str, nn.Parameter], weight_decay: float, multipliers: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW with one parameter group per kind of tensor; the group's `rate_scale` holds the kind's
    multiplier.

    Args:
        name: adamw (state in 32 bit), adamw_8bit or paged_adamw_8bit (bitsandbytes: A's and B's state in 8
            bit from 4,096 elements on, the links' always in 32 bit; paged, the GPU may move it to main
            memory).
    """
    groups = []
    for kind in KINDS:
        members = [parameter for name, parameter in parameters.items() if name.endswith("." + kind)]
        if members:
            groups.append({"params": members, "kind": kind, "rate_scale": multipliers.get(kind, 1.0)})
    options = {"lr": 0.0, "betas": BETAS, "eps": EPSILON, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    device = next(iter(parameters.values())).device
    return _eight_bit_class()(
        groups, is_paged=name == "paged_adamw_8bit" and not is_unpaged(name, device), **options
    )


def _eight_bit_class() -> type[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    class AdamW8bitButLinks(AdamW8bit):
        """All links together are small beside A and B, and their errors multiply along the chain."""

        def get_config(self, gindex, pindex, group):
            config = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": 32} if group["kind"] == "links" else config

    return AdamW8bitButLinks


def is_unpaged(name: str, device: torch.device) -> bool:
    """Whether an optimizer is asked to be paged where it cannot be."""
    return name.startswith("paged_") and device.type != "cuda"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to `rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>/<state name>` tensors on the CPU (numbers become 0-d
    tensors).
    """
    return {
        f"{name}/{key}": value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key not in _TABLES
    }


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` gave.

    Raises:
        InputError: the state belongs to other parameters, or to another optimizer.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in state.items():
        name, _, entry = key.rpartition("/")
        if name not in by_parameter:
            raise InputError(
                f"the checkpoint's optimizer state names '{name}', which this run does not train"
            )
        by_parameter[name][entry] = tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            if not by_parameter[name]:
                raise InputError(f"the checkpoint holds no optimizer state for '{name}'")
            if isinstance(optimizer, torch.optim.AdamW):
                entries = {
                    entry: tensor.to(parameter.device, copy=True)
                    for entry, tensor in by_parameter[name].items()
                }
                optimizer.state[parameter] = entries
            else:
                optimizer.init_state(group, parameter, group_index, index)
                _fill(optimizer.state[parameter], by_parameter[name], name)


def _fill(fresh: dict, saved: Mapping[str, Tensor], name: str) -> None:
    """Copies saved values into a fresh state, whose tensors may lie in memory of their own kind (paged)."""
    if fresh.keys() - set(_TABLES) != saved.keys():
        raise InputError(f"the checkpoint's optimizer state for '{name}' is another optimizer's")
    for key in saved:
        value = fresh[key]
        if isinstance(value, Tensor):
            value.copy_(saved[key])
        else:
            fresh[key] = type(value)(saved[key].item())
