"""Folding: the links leave the forward pass.

Inside `with folded(model):` every chain layer runs exactly LoRA's two products. The products Wn…W1 of all
layers are computed once, in one batch per shape, and A' = (α/r)·Wn…W1·A is installed in each layer as an
autograd leaf, beside A' and B in the type that the layer computes in. All micro-batches of one optimizer step
run forward and backward inside the block; at its end one batched backward carries the gradients of the A'
into A and links. (B needs no folding: its gradient arrives directly.) Layers that read the same input are one
group, if `find_siblings` has found them, and are computed together; any other layer is a group of its own.

Letters behind a name are a tensor's dimensions: M layers, n links, r rank, D d_in, O d_out. Of experts, E of
them stand before the last ones: A_MErD, links_MEnrr.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from linchain_cli.chain.fused import Factors, Group
from linchain_cli.chain.layer import Chain, chain_layers, fold_into_a


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
    stacks = [_Stack(alike) for alike in _alike(groups)]
    try:
        yield
    finally:
        for group in groups:
            group.install(None)
    for stack in stacks:
        stack.carry_gradients()


def _alike(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups in as few parts as can be folded together: of layers with tensors of the same shapes."""
    found: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        found[_likeness(group.layers[0])].append(group)
    return list(found.values())


def _likeness(layer: Chain) -> tuple:
    """What layers have in common that are folded together."""
    return layer.A.shape, layer.links.shape, layer.A.dtype, layer.A.device, layer.scaling, layer.compute_dtype


class _Stack:
    """M layers of like shapes, folded together: one batched product for each link, however many there are."""

    def __init__(self, groups: Sequence[Group]):
        self.layers = [layer for group in groups for layer in group.layers]
        first = self.layers[0]
        self.A_MrD = _stacked([layer.A for layer in self.layers])
        self.links_Mnrr = _stacked([layer.links for layer in self.layers])
        self.product_MrD = fold_into_a(self.A_MrD, self.links_Mnrr, first.scaling)
        dtype = first.compute_dtype or self.product_MrD.dtype
        ready_a_MrD = self.product_MrD.detach().to(dtype)
        self.leaves_rD = self.product_MrD.detach().unbind()
        for leaf in self.leaves_rD:
            leaf.requires_grad_(self.product_MrD.requires_grad)
        bs_Or = _cast([layer.B for layer in self.layers], dtype)
        start = 0
        for group in groups:
            here = slice(start, start := start + len(group.layers))
            group.install(Factors(self.leaves_rD[here], ready_a_MrD[here].flatten(0, 1), bs_Or[here]))

    def carry_gradients(self) -> None:
        """Adds to `.grad` of A and links what the leaves have been given; zero from a leaf without any."""
        if all(leaf.grad is None for leaf in self.leaves_rD):
            return
        gradient_MrD = torch.stack(
            [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves_rD]
        )
        of_kind = [(self.A_MrD, [layer.A for layer in self.layers])]
        of_kind += [(self.links_Mnrr, [layer.links for layer in self.layers])]
        trained = [(stacked, each) for stacked, each in of_kind if stacked.requires_grad and stacked.numel()]
        gradients = torch.autograd.grad(self.product_MrD, [stacked for stacked, _ in trained], gradient_MrD)
        for (_, parameters), gradient in zip(trained, gradients, strict=True):
            _add_gradients(parameters, gradient.unbind())


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """(M, ...) copies of M parameters, a leaf that takes gradients if they do."""
    wanted = torch.is_grad_enabled() and all(parameter.requires_grad for parameter in parameters)
    return torch.stack([parameter.detach() for parameter in parameters]).requires_grad_(wanted)


def _add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    if all(parameter.grad is not None for parameter in parameters):
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another type, detached, by two operations however many they are."""
    if tensors[0].dtype == dtype:
        return [tensor.detach() for tensor in tensors]
    together = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(dtype)
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


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
