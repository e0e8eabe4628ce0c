"""Model surgery: putting chains in, taking them out, folding them into the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from linchain_cli.chain.experts import ChainExperts, is_transposed
from linchain_cli.chain.init import SCHEMES, initialise
from linchain_cli.chain.layer import Chain, ChainLinear, chain_layers, is_quantised
from linchain_cli.chain.targets import ALL_LINEAR, match_modules, owners_of_weight, refuse_shared
from linchain_cli.errors import InputError, did_you_mean


@dataclass(frozen=True)
class ChainConfig:
    """What defines a chain adapter, apart from its values.

    `target_modules` is a sequence of module names (the end of a dotted path), a regular expression for whole
    dotted paths or ends of them, or "all-linear" (every linear module but the output head), which may stand
    in a sequence, too. Routed experts are met where they are named: `experts.down_proj`.
    """

    rank: int = 16
    depth: int = 3
    alpha: float = 32.0
    dropout: float = 0.0
    init: str = "orthogonal"
    target_modules: str | Sequence[str] = ALL_LINEAR

    @property
    def scaling(self) -> float:
        """α/r, what the product B·Wn…W1·A is multiplied by."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 1 or self.depth < 0:
            raise InputError(
                f"a chain needs rank ≥ 1 and depth ≥ 0, got rank {self.rank} and depth {self.depth}"
            )
        if self.init not in SCHEMES:
            raise InputError(
                f"adapter.init: '{self.init}' is unknown, expected one of {', '.join(SCHEMES)}."
                + did_you_mean(self.init, SCHEMES)
            )


def adapter_kind(depth: int) -> str:
    """What people call an adapter of that depth: a LoRA, a MoSLoRA, a chain of 3 links."""
    return {0: "a LoRA", 1: "a MoSLoRA"}.get(depth, f"a chain of {depth} links")


def inject(model: nn.Module, config: ChainConfig, seed: int = 0, prefix: str = "") -> dict[str, Chain]:
    """Replaces every matched linear module by a freshly initialised chain layer around it, in place, and
    routed experts by ones with chains on the matched matrices.

    All other parameters of the model are frozen. With B = 0 the model's output is what it was: bit for bit
    with ordinary layers in float32 or without bias, to a rounding with a bias in half precision, quantised,
    or with experts.

    Returns:
        The new layers by module path.

    Raises:
        InputError: a pattern matches nothing or a weight that another module shares, or the model carries
            chains already (`detach` it first).
    """
    refuse_second_adapter(model)
    paths = match_modules(model, config.target_modules, prefix).paths
    refuse_shared(model, paths)
    return inject_at(model, paths, config, seed)


def refuse_second_adapter(model: nn.Module) -> None:
    """Raises InputError when the model carries chains: they do not stack."""
    if chain_layers(model):
        raise InputError("this model carries a chain adapter already; take it out with detach(model) first")


def inject_at(model: nn.Module, paths: Sequence[str], config: ChainConfig, seed: int) -> dict[str, Chain]:
    """`inject` at modules and matrices of experts that are known, in a model without chains; see there."""
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    layers = {}
    for path in paths:
        settings = config.rank, config.depth, config.alpha, config.dropout
        if path in modules:
            layer: Chain = ChainLinear(modules[path], *settings)
            layer.train(modules[path].training)
            model.set_submodule(path, layer)
        else:
            layer = _experts_at(model, path.rpartition(".")[0]).adapt(path.rpartition(".")[2], *settings)
        if layer.A.device.type != "meta":
            initialise(layer, path, config.init, seed)
        layers[path] = layer
    return layers


def _experts_at(model: nn.Module, path: str) -> ChainExperts:
    """The experts at `path`, ready to take chains."""
    experts = model.get_submodule(path)
    if not isinstance(experts, ChainExperts):
        experts = ChainExperts(experts)
        model.set_submodule(path, experts)
    return experts


def detach(model: nn.Module) -> None:
    """Takes every chain out and puts the untouched base modules back."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (ChainLinear, ChainExperts)):
            model.set_submodule(path, module.base)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all chains on or off; switched off, the model computes exactly what its base does."""
    for layer in chain_layers(model).values():
        layer.enabled = enabled


def drops(model: nn.Module) -> bool:
    """Whether a chain of the model would apply dropout now, so that equal inputs have different outputs."""
    return any(layer.drops for layer in chain_layers(model).values())


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's behaviour for the length of the block."""
    before = {path: layer.enabled for path, layer in chain_layers(model).items()}
    set_enabled(model, False)
    try:
        yield
    finally:
        for path, layer in chain_layers(model).items():
            layer.enabled = before[path]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every ΔW to its base weight (summed in float32, rounded once to the weight's type) and takes the
    chains out.

    Raises:
        InputError: a base weight is quantised (merge into the original weights instead, `linchain merge`
            does), or shared with another module, which the sum would corrupt. Nothing is changed then.
    """
    layers = chain_layers(model)
    owners = owners_of_weight(model)
    weights = {}
    for path, layer in layers.items():
        holder = layer if isinstance(layer, ChainLinear) else model.get_submodule(path.rpartition(".")[0])
        name = "weight" if isinstance(layer, ChainLinear) else path.rpartition(".")[2]
        weight = getattr(holder.base, name)
        if is_quantised(holder.base):
            raise InputError(
                f"{path} is a quantised {type(holder.base).__name__}: merge into the full-precision weights"
            )
        if len(owners[weight]) > 1:
            raise InputError(
                f"{path} shares its weight with another module, which merging would change as well"
            )
        transposed = isinstance(holder.base, Conv1D) or is_transposed(holder.base)
        weights[path] = weight.mT if transposed else weight
    for path, layer in layers.items():
        weights[path].copy_(weights[path].float() + layer.delta_weight())
    detach(model)
