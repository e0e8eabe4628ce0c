"""Folding: the links leave the forward pass.

Inside `with folded(model):` every chain layer runs exactly LoRA's two products. The products Wn…W1 of all layers are
computed once, in one batch per shape, and A' = (α/r)·Wn…W1·A is installed in each layer as an autograd leaf. All
micro-batches of one optimizer step run forward and backward inside the block; at its end one batched backward carries
the gradients of the A' into A and links. (B needs no folding: its gradient arrives directly.)
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from linchain_cli.chain.layer import ChainLinear, collapse, fold_into_a


def fold_all(layers: Sequence[ChainLinear]) -> list[Tensor]:
    """A' (r, d_in) of each layer, differentiable with respect to its A and links.

    Layers whose links have the same shape and device share their products: n − 1 for a whole model of one rank.
    """
    folded: list[Tensor | None] = [None] * len(layers)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        groups[(layer.links.shape, layer.links.device)].append(index)
    for (shape, _), members in groups.items():
        if shape[0] == 0:
            for index in members:
                folded[index] = fold_into_a(layers[index].A, layers[index].links, layers[index].scaling)
            continue
        products = collapse(torch.stack([layers[index].links for index in members]))
        for index, product in zip(members, products.unbind()):
            folded[index] = (layers[index].scaling * product) @ layers[index].A
    return folded


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Folds every chain layer of `model` for the length of the block; see the module's docstring.

    With gradients enabled, the block ends by adding to `.grad` of A and links what the block's backward passes left in
    the folded factors. Changing A or links inside the block has no effect until it ends. If the block raises, no
    gradient is carried.
    """
    layers = [module for module in model.modules() if isinstance(module, ChainLinear)]
    if any(layer.folded_a is not None for layer in layers):
        raise RuntimeError("folded() does not nest: this model is folded already")
    products = fold_all(layers)
    leaves = [product.detach().requires_grad_(product.requires_grad) for product in products]
    for layer, leaf in zip(layers, leaves):
        layer.folded_a = leaf
    try:
        yield
    finally:
        for layer in layers:
            layer.folded_a = None
    reached = [(product, leaf.grad) for product, leaf in zip(products, leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward([product for product, _ in reached], [grad for _, grad in reached])
