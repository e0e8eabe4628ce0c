"""Folding: the links leave the forward pass.

Inside `with folded(model):` every chain layer runs exactly LoRA's two products. The products Wn…W1 of all
layers are computed once, in one batch per shape, and A' = (α/r)·Wn…W1·A is installed in each layer as an
autograd leaf. All micro-batches of one optimizer step run forward and backward inside the block; at its end
one batched backward carries the gradients of the A' into A and links. (B needs no folding: its gradient
arrives directly.) Layers that read the same input, if `find_siblings` has found them, have their A' in one
leaf and are computed together.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from linchain_cli.chain.fused import Siblings
from linchain_cli.chain.layer import ChainLinear, collapse, fold_into_a


def fold_all(layers: Sequence[ChainLinear]) -> list[Tensor]:
    """A' (r, d_in) of each layer, differentiable with respect to its A and links.

    Layers whose links have the same shape and device share their products: n − 1 for a whole model of one
    rank.
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
        for index, product in zip(members, products.unbind(), strict=True):
            folded[index] = (layers[index].scaling * product) @ layers[index].A
    return folded


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Folds every chain layer of `model` for the length of the block; see the module's docstring.

    With gradients enabled, the block ends by adding to `.grad` of A and links what the block's backward
    passes left in the folded factors. Changing A or links inside the block has no effect until it ends. If
    the block raises, no gradient is carried.
    """
    layers = [module for module in model.modules() if isinstance(module, ChainLinear)]
    if any(layer.folded_a is not None for layer in layers):
        raise RuntimeError("folded() does not nest: this model is folded already")
    groups = _groups(layers)
    folded_as = dict(zip(layers, fold_all(layers), strict=True))
    products = [_stack([folded_as[layer] for layer in group]) for group in groups]
    leaves = [product.detach().requires_grad_(product.requires_grad) for product in products]
    for group, leaf in zip(groups, leaves, strict=True):
        if len(group) == 1:
            group[0].folded_a = leaf
            continue
        group[0].siblings.folded_a = leaf
        for layer, part in zip(group, leaf.split([layer.rank for layer in group]), strict=True):
            layer.folded_a = part
    try:
        yield
    finally:
        for layer in layers:
            layer.folded_a = None
            if layer.siblings is not None:
                layer.siblings.folded_a = None
                layer.siblings.forget()
    reached = [
        (product, leaf.grad) for product, leaf in zip(products, leaves, strict=True) if leaf.grad is not None
    ]
    if reached:
        torch.autograd.backward([product for product, _ in reached], [grad for _, grad in reached])


def _stack(products: Sequence[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(list(products))


def _groups(layers: Sequence[ChainLinear]) -> list[list[ChainLinear]]:
    """The layers with their siblings, each in one group; a layer without (all of) them is alone."""
    present, groups = set(layers), []
    for layer in layers:
        members = layer.siblings.layers if layer.siblings is not None else (layer,)
        if not present.issuperset(members):
            members = (layer,)
        if members[0] is layer:
            groups.append(list(members))
    return groups


def find_siblings(model: nn.Module, forward: Callable[[], object]) -> list[list[str]]:
    """Finds the chain layers of `model` that read the same input, so that `folded` computes them together.

    Args:
        forward: runs the model on any input; which layers of one parent module are called with the same
        tensor is what
            counts.

    Returns:
        The module paths of each group of two and more.
    """
    calls: dict[tuple[str, int], list[str]] = defaultdict(list)
    inputs = []  # kept, so that no two have the same identity
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ChainLinear)}

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
        layer.siblings = None
    for group in groups:
        siblings = Siblings([layers[path] for path in group])
        for layer in siblings.layers:
            layer.siblings = siblings
    return groups
