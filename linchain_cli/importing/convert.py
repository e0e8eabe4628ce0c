"""Other tools' adapters as chains: a LoRA has depth 0, a MoSLoRA depth 1, a checkpoint of the LinChain
authors depth n.

A chain adapter has one rank, one depth and one α/r. Where a checkpoint's modules differ (`rank_pattern`,
`alpha_pattern`), smaller ranks are filled with zeros, shorter chains with identity links, and other scalings
go into B; ΔW stays the same. Biases between or behind the links have no place in ΔW: they are measured, and
dropped only when asked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linchain_cli.chain import Adapter, ChainConfig, ChainTensors, delta_weight
from linchain_cli.chain.head import Head
from linchain_cli.errors import InputError
from linchain_cli.importing.foreign import ForeignAdapter, ForeignModule


@dataclass(frozen=True)
class BiasLoss:
    """What dropping the biases of one module loses: the constant vector c that it adds to the module's
    output.

    norm is ‖c‖; share is ‖c‖ / ‖ΔW‖_F, its size beside what the module adds to an input of independent unit
    values.
    """

    path: str
    norm: float
    share: float


@dataclass(frozen=True)
class Imported:
    """A foreign adapter as a chain, and what was done to it: modules of smaller rank, of another scaling,
    biases dropped."""

    adapter: Adapter
    padded: tuple[str, ...]
    rescaled: tuple[str, ...]
    losses: tuple[BiasLoss, ...]


def import_adapter(
    foreign: ForeignAdapter,
    *,
    drop_bias: bool,
    base: Mapping[str, Any],
    names: Mapping[str, str],
    head: Head | None = None,
) -> Imported:
    """Turns a foreign adapter into a chain.

    Args:
        drop_bias: whether biases may be dropped.
        base: what the adapter's file says of its base ("path", "hash").
        names: module path in the checkpoint -> module path in the model, where they differ.
        head: a classifier's.

    Raises:
        InputError: there are biases and `drop_bias` is not given; the message says in numbers what they do.
    """
    scalings = {
        path: _scaling(foreign.config, path, module.A.shape[0]) for path, module in foreign.modules.items()
    }
    losses = _bias_losses(foreign, scalings)
    if losses and not drop_bias:
        raise InputError(f"{foreign.directory}: {describe_losses(losses)} Import without them: --drop-bias.")
    rank = max(module.A.shape[0] for module in foreign.modules.values())
    depth = max(len(module.mixers) for module in foreign.modules.values())
    scaling = Counter(scalings.values()).most_common(1)[0][0]
    tensors = {
        names.get(path, path): _chain(module, rank, depth, scalings[path] / scaling)
        for path, module in foreign.modules.items()
    }
    config = ChainConfig(
        rank=rank, depth=depth, alpha=_alpha(scaling, rank), init="kaiming", target_modules=sorted(tensors)
    )
    return Imported(
        Adapter(config, tensors, dict(base), head),
        padded=tuple(path for path, module in foreign.modules.items() if module.A.shape[0] != rank),
        rescaled=tuple(path for path, own in scalings.items() if own != scaling),
        losses=losses,
    )


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """α/r of a module, or α/√r with rsLoRA; `alpha_pattern` maps regular expressions for the end of a path to
    its α."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(scaling: float, rank: int) -> float:
    """The α for which α/rank is `scaling`, whole where it is whole."""
    alpha = scaling * rank
    return float(round(alpha)) if round(alpha) / rank == scaling else alpha


def _chain(module: ForeignModule, rank: int, depth: int, factor: float) -> ChainTensors:
    """The module's matrices at the adapter's rank and depth, B multiplied by `factor`."""
    own = module.A.shape[0]
    A = torch.zeros(rank, module.A.shape[1])
    B = torch.zeros(module.B.shape[0], rank)
    links = torch.eye(rank).repeat(depth, 1, 1)
    A[:own], B[:, :own] = module.A, module.B if factor == 1 else factor * module.B
    for place, mixer in module.mixers.items():
        links[place, :own, :own] = mixer
    return ChainTensors(A, links, B)


def _bias_losses(foreign: ForeignAdapter, scalings: Mapping[str, float]) -> tuple[BiasLoss, ...]:
    """The modules on which dropping biases changes anything, the largest loss first."""
    losses = []
    for path, module in foreign.modules.items():
        constant = _constant(module, scalings[path])
        if float(constant.norm()) > 0:
            chain = _chain(module, module.A.shape[0], len(module.mixers), 1.0)
            size = float(delta_weight(*chain, scalings[path], torch.float64).norm())
            norm = float(constant.norm())
            losses.append(BiasLoss(path, norm, norm / size if size else math.inf))
    for path, bias in foreign.module_biases.items():
        losses.append(BiasLoss(f"{path} (the base's own bias, trained along)", float(bias.norm()), math.nan))
    return tuple(sorted(losses, key=lambda loss: -loss.norm))


def _constant(module: ForeignModule, scaling: float) -> Tensor:
    """c = (α/r)·(B·(Wn·(… W2·b1 + b2 …) + bn) + b_B): what the module adds to its output at x = 0, in
    float64."""
    inner = torch.zeros(module.A.shape[0], dtype=torch.float64)
    for place in sorted(module.mixers):
        inner = module.mixers[place].double() @ inner
        if place in module.mixer_biases:
            inner = inner + module.mixer_biases[place].double()
    constant = module.B.double() @ inner
    if module.output_bias is not None:
        constant = constant + module.output_bias.double()
    return scaling * constant


def describe_losses(losses: tuple[BiasLoss, ...]) -> str:
    """The losses in a sentence or two."""
    worst = losses[0]
    shares = sorted(loss.share for loss in losses if math.isfinite(loss.share))
    middle = (
        f" The median is {shares[len(shares) // 2]:.2g} of what the module's ΔW adds to an input of unit"
        " values."
        if shares
        else ""
    )
    return (
        f"{len(losses)} modules carry trained biases, which no weight can hold. Without them each loses a"
        f" constant from its output; the largest has norm {worst.norm:.3g} ({worst.path}).{middle}"
    )
