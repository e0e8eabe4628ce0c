"""Model surgery: which modules get a chain, putting it in, taking it out, folding it into the weights."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from linchain_cli.chain.init import SCHEMES, initialise
from linchain_cli.chain.layer import ChainLinear, linear_shape
from linchain_cli.errors import InputError, did_you_mean

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class ChainConfig:
    """What defines a chain adapter, apart from its values.

    `target_modules` is a sequence of module names (the end of a dotted path), a regular expression for whole
    dotted paths or ends of them, or "all-linear" (every linear module but the output head).
    """

    rank: int = 16
    depth: int = 3
    alpha: float = 32.0
    dropout: float = 0.0
    init: str = "orthogonal"
    target_modules: str | Sequence[str] = ALL_LINEAR

    def __post_init__(self):
        if self.rank < 1 or self.depth < 0:
            raise InputError(
                f"a chain needs rank ≥ 1 and depth ≥ 0, got rank {self.rank} and depth {self.depth}"
            )
        if self.init not in SCHEMES:
            raise InputError(
                f"adapter.init: '{self.init}' is unknown, expected one of {', '.join(SCHEMES)}."
                + did_you_mean(self.init, SCHEMES)
            )


@dataclass(frozen=True)
class Matches:
    """The modules a target specification selects: `paths` in model order, and how many each pattern met."""

    paths: tuple[str, ...]
    per_pattern: dict[str, int]


def match_modules(model: nn.Module, target_modules: str | Sequence[str], prefix: str = "") -> Matches:
    """Finds the linear modules that `target_modules` names, below the dotted `prefix` only (the text
    decoder's).

    Raises:
        InputError: a pattern meets nothing; the message says what could be matched.
    """
    scope = {path: module for path, module in model.named_modules() if _below(path, prefix)}
    linear = {path: module for path, module in scope.items() if linear_shape(module) and ".base" not in path}
    if target_modules == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        tests = {ALL_LINEAR: lambda path: path in linear and linear[path] is not head}
    elif isinstance(target_modules, str):
        try:
            expression = re.compile(rf"(?:.*\.)?(?:{target_modules})")
        except re.error as error:
            raise InputError(
                f"adapter.target_modules: '{target_modules}' is no regular expression: {error}"
            ) from error
        tests = {target_modules: lambda path: expression.fullmatch(path) is not None}
    else:
        tests = {
            name: (lambda path, name=name: path == name or path.endswith("." + name))
            for name in target_modules
        }

    met = {pattern: [path for path in linear if test(path)] for pattern, test in tests.items()}
    for pattern, paths in met.items():
        if not paths:
            raise InputError(_nothing_matched(pattern, tests[pattern], model, scope, linear, prefix))
    chosen = {path for paths in met.values() for path in paths}
    return Matches(
        tuple(path for path in linear if path in chosen),
        {pattern: len(paths) for pattern, paths in met.items()},
    )


def _below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _nothing_matched(pattern, test, model, scope, linear, prefix) -> str:
    message = f"adapter.target_modules: '{pattern}' matches no linear module"
    message += f" of the text decoder ('{prefix}')." if prefix else "."
    outside = [
        path
        for path, module in model.named_modules()
        if path not in scope and linear_shape(module) and test(path)
    ]
    if outside:
        message += f" It does match {len(outside)} outside the text decoder, which get no adapter"
        message += f" (e.g. {outside[0]})."
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and (test(name) or test(name.rpartition(".")[0]))
    ]
    if experts:
        message += f" It only meets 3-D expert parameters (e.g. {experts[0]}), which a chain cannot adapt."
    kinds = [
        type(module).__name__ for path, module in scope.items() if path and path not in linear and test(path)
    ]
    if kinds:
        message += f" It does name {len(kinds)} modules of type {kinds[0]}, which are not linear."
    names = Counter(path.rpartition(".")[2] for path in linear)
    listing = ", ".join(f"{name} ({count})" for name, count in names.items())
    return message + did_you_mean(pattern, names) + f" This model's linear modules: {listing or 'none'}."


def chain_layers(model: nn.Module) -> dict[str, ChainLinear]:
    """A model's chain layers by module path (the path of the module each one replaces), in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ChainLinear)}


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def inject(model: nn.Module, config: ChainConfig, seed: int = 0, prefix: str = "") -> dict[str, ChainLinear]:
    """Replaces every matched linear module by a freshly initialised chain layer around it, in place.

    All other parameters of the model are frozen. With B = 0 the model's output is what it was: bit for bit
    with ordinary layers in float32 or without bias, to a rounding with a bias in half precision or quantised.

    Returns:
        The new layers by module path.

    Raises:
        InputError: a pattern matches nothing, or the model carries chains already (`detach` it first).
    """
    refuse_second_adapter(model)
    return inject_at(model, match_modules(model, config.target_modules, prefix).paths, config, seed)


def refuse_second_adapter(model: nn.Module) -> None:
    """Raises InputError when the model carries chains: they do not stack."""
    if chain_layers(model):
        raise InputError("this model carries a chain adapter already; take it out with detach(model) first")


def inject_at(
    model: nn.Module, paths: Sequence[str], config: ChainConfig, seed: int
) -> dict[str, ChainLinear]:
    """`inject` at modules that are known; see there."""
    refuse_second_adapter(model)
    model.requires_grad_(False)
    layers = {}
    for path in paths:
        base = model.get_submodule(path)
        layer = ChainLinear(base, config.rank, config.depth, config.alpha, config.dropout)
        if layer.A.device.type != "meta":
            initialise(layer, path, config.init, seed)
        layer.train(base.training)
        _set_module(model, path, layer)
        layers[path] = layer
    return layers


def detach(model: nn.Module) -> None:
    """Takes every chain layer out and puts the untouched base modules back."""
    for path, layer in chain_layers(model).items():
        _set_module(model, path, layer.base)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all chains on or off; switched off, the model computes exactly what its base does."""
    for layer in chain_layers(model).values():
        layer.enabled = enabled


def drops(model: nn.Module) -> bool:
    """Whether a chain of the model would apply dropout now, so that equal inputs have different outputs."""
    return any(layer.drops for layer in model.modules() if isinstance(layer, ChainLinear))


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
        does), or
            shared with another module, which the sum would corrupt. Nothing is changed then.
    """
    layers = chain_layers(model)
    owners = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, layer in layers.items():
        if type(layer.base) not in (nn.Linear, Conv1D):
            raise InputError(
                f"{path} is a quantised {type(layer.base).__name__}: merge into the full-precision weights"
            )
        if owners[layer.base.weight.data_ptr()] > 1:
            raise InputError(
                f"{path} shares its weight with another module, which merging would change as well"
            )
    for layer in layers.values():
        delta = layer.delta_weight()
        weight = layer.base.weight
        weight.copy_(weight.float() + (delta.T if isinstance(layer.base, Conv1D) else delta))
    detach(model)
