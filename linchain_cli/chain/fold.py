"""Folding: the links leave the forward pass.

Inside `with folded(model):` every chain layer runs exactly LoRA's two products. The products Wn…W1 of all
layers are computed once, in one batch per shape, and A' = (α/r)·Wn…W1·A is installed in each layer as an
autograd leaf. All micro-batches of one optimizer step run forward and backward inside the block; at its end
one batched backward carries the gradients of the A' into A and links. (B needs no folding: its gradient
arrives directly.) Layers that read the same input are one group, if `find_siblings` has found them, have
their A' in one leaf and are computed together; any other layer is a group of its own.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from linchain_cli.chain.fused import Group
from linchain_cli.chain.layer import ChainLinear, chain_layers, collapse, fold_into_a


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Folds every chain layer of `model` for the length of the block; see the module's docstring.

    With gradients enabled, the block ends by adding to `.grad` of A and links what the block's backward
    passes left in the folded factors. Changing A or links inside the block has no effect until it ends. If
    the block raises, no gradient is carried.
    """
    groups = list(dict.fromkeys(layer.group for layer in chain_layers(model).values()))
    if any(group.folded_a is not None for group in groups):
        raise RuntimeError("folded() does not nest: this model is folded already")
    single = iter(_fold([layer for group in groups for layer in group.layers]))
    products = [_stack([next(single) for _ in group.layers]) for group in groups]
    leaves = [product.detach().requires_grad_(product.requires_grad) for product in products]
    for group, leaf in zip(groups, leaves, strict=True):
        group.install(leaf)
    try:
        yield
    finally:
        for group in groups:
            group.install(None)
    reached = [
        (product, leaf.grad) for product, leaf in zip(products, leaves, strict=True) if leaf.grad is not None
    ]
    if reached:
        torch.autograd.backward([product for product, _ in reached], [grad for _, grad in reached])


def _fold(layers: Sequence[ChainLinear]) -> list[Tensor]:
    """A' (r, d_in) of each layer, differentiable with respect to its A and links.

    Layers whose links have the same shape and device share their products: n − 1 for a whole model of one
    rank.
    """
    links = {layer: layer.links for layer in layers}
    alike: dict[tuple, list[ChainLinear]] = defaultdict(list)
    for layer in layers:
        if layer.depth > 1:
            alike[layer.links.shape, layer.links.device].append(layer)
    for members in alike.values():
        products = collapse(torch.stack([layer.links for layer in members]))
        links |= zip(members, products.unsqueeze(1).unbind(), strict=True)
    return [fold_into_a(layer.A, links[layer], layer.scaling) for layer in layers]


def _stack(products: Sequence[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(list(products))


def find_siblings(model: nn.Module, forward: Callable[[], object]) -> list[list[str]]:
    """Finds the chain layers of `model` that read the same input, so that `folded` computes them together.

    Args:
        forward: runs the model on any input; which layers of one parent module are called with the same
            tensor is what counts.

    Returns:
        The module paths of each group of two and more.
    """
    calls: dict[tuple[str, int], list[str]] = defaultdict(list)
    inputs = []  # kept, so that no two have the same identity
    layers = chain_layers(model)

    def note(path: str) -> Callable:
        def hook(_module: nn.Module, arguments: tuple) -> None:
            if arguments:
                inputs.append(arguments[0])
                calls[path.rpartition(".")[0], id(arguments[0])].append(path)

        return hook

    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    groups = [list(dict.fromkeys(paths)) for paths in calls.values()]
    counts = Counter(path for group in groups for path in group)
    # A layer that is called with several inputs has no siblings for good.
    groups = [group for group in groups if len(group) > 1 and all(counts[path] == 1 for path in group)]
    for layer in layers.values():
        layer.group = Group([layer])
    for group in groups:
        together = Group([layers[path] for path in group])
        for layer in together.layers:
            layer.group = together
    return groups
