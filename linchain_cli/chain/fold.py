"""Folding: the links leave the forward pass.

Inside `with folded(model):` every chain layer runs exactly LoRA's two products. The products Wn…W1 of all
layers are computed once, in one batch per shape, and A' = (α/r)·Wn…W1·A is installed in each layer as an
autograd leaf, beside A' and B in the type that the layer computes in. All micro-batches of one optimizer step
run forward and backward inside the block; at its end one batched backward carries the gradients of the A'
into A and links. (B needs no folding: its gradient arrives directly.) Layers that read the same input are one
group, if `find_siblings` has found them, and are computed together; any other layer is a group of its own.

Letters behind a name are a tensor's dimensions: M layers, n links, r rank, D d_in, O d_out.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from linchain_cli.chain.fused import Factors, Group
from linchain_cli.chain.layer import ChainLinear, chain_layers, fold_into_a


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Folds every chain layer of `model` for the length of the block; see the module's docstring.

    With gradients enabled, the block ends by adding to `.grad` of A and links what the block's backward
    passes left in the folded factors. Changing A, links or B inside the block has no effect until it ends. If
    the block raises, no gradient is carried.
    """
    groups = list(dict.fromkeys(layer.group for layer in chain_layers(model).values()))
    if any(group.factors is not None for group in groups):
        raise RuntimeError("folded() does not nest: this model is folded already")
    stacks = _stacks(groups)
    products = [_fold(stack) for stack in stacks]
    try:
        yield
    finally:
        leaves = [[leaf for group in stack for leaf in group.factors.as_rD] for stack in stacks]
        for group in groups:
            group.install(None)
    reached = [
        (product, torch.stack([_gradient(leaf) for leaf in of_stack]))
        for product, of_stack in zip(products, leaves, strict=True)
        if any(leaf.grad is not None for leaf in of_stack)
    ]
    if reached:
        torch.autograd.backward([product for product, _ in reached], [gradient for _, gradient in reached])


def _stacks(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups in as few parts as can be folded together: of layers with tensors of the same shapes."""
    alike: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        alike[_likeness(group.layers[0])].append(group)
    return list(alike.values())


def _likeness(layer: ChainLinear) -> tuple:
    """What layers have in common that are folded together."""
    return layer.A.shape, layer.links.shape, layer.A.dtype, layer.A.device, layer.scaling, layer.compute_dtype


def _fold(stack: Sequence[Group]) -> Tensor:
    """Folds the groups of a stack, with one batched product for each link.

    Returns:
        A' of all their M layers (M, r, D), differentiable with respect to each A and links.
    """
    layers = [layer for group in stack for layer in group.layers]
    links_Mnrr = torch.stack([layer.links for layer in layers])
    product_MrD = fold_into_a(torch.stack([layer.A for layer in layers]), links_Mnrr, layers[0].scaling)
    dtype = layers[0].compute_dtype or product_MrD.dtype
    ready_a_MrD = product_MrD.detach().to(dtype)
    ready_bs = iter(_cast([layer.B for layer in layers], dtype))
    leaves = iter([a.requires_grad_(product_MrD.requires_grad) for a in product_MrD.detach().unbind()])
    ready_as = iter(ready_a_MrD.split([len(group.layers) for group in stack]))
    for group in stack:
        mine = [[next(each) for _ in group.layers] for each in (leaves, ready_bs)]
        group.install(Factors(mine[0], next(ready_as).flatten(0, 1), mine[1]))
    return product_MrD


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another type, detached, by two operations however many they are."""
    if tensors[0].dtype == dtype:
        return [tensor.detach() for tensor in tensors]
    together = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(dtype)
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _gradient(leaf: Tensor) -> Tensor:
    """A leaf's gradient: zero if its layer had no part in the loss."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


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
    groups = [
        group
        for group in groups
        if len(group) > 1
        and all(counts[path] == 1 for path in group)
        and len({_likeness(layers[path]) for path in group}) == 1
    ]
    for layer in layers.values():
        layer.group = Group([layer])
    for group in groups:
        together = Group([layers[path] for path in group])
        for layer in together.layers:
            layer.group = together
    return groups
