"""What can carry a chain in a model, by its path: linear modules, and the matrices of routed experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from linchain_cli.chain.experts import ChainExperts, expert_matrices
from linchain_cli.chain.layer import ChainLinear, linear_shape
from linchain_cli.errors import did_you_mean


class MatrixShape(NamedTuple):
    """The shape of what a chain adapts: d_in → d_out, and how many experts have such a matrix (None of a
    linear module's one)."""

    d_in: int
    d_out: int
    experts: int | None = None

    def __str__(self) -> str:
        return f"{self.d_in} → {self.d_out}" + (f" of {self.experts} experts" if self.experts else "")


def parameter_count(shapes: Iterable[tuple[int, ...]], rank: int, depth: int) -> int:
    """Trained parameters of chains around matrices of these shapes: Σ r·(d_in + d_out) + n·r², for each
    expert."""
    return sum(
        (shape.experts or 1) * (rank * (shape.d_in + shape.d_out) + depth * rank * rank)
        for shape in (MatrixShape(*shape) for shape in shapes)
    )


def carriers(modules: Mapping[str, nn.Module]) -> dict[str, MatrixShape]:
    """All that can carry a chain and carries none yet, by its path; `modules` are a model's, as
    `named_modules` gives them, and so is the order."""
    carried = {m.base for m in modules.values() if isinstance(m, (ChainLinear, ChainExperts))}
    found: dict[str, MatrixShape] = {}
    for path, module in modules.items():
        if module not in carried:
            if shape := linear_shape(module):
                found[path] = MatrixShape(*shape)
            found |= {f"{path}.{name}": MatrixShape(*s) for name, s in expert_matrices(module).items()}
    return found


def parameter_name(modules: Mapping[str, nn.Module], path: str) -> str:
    """The name of the parameter that a chain at `path` adapts: a linear module's weight, or the matrices of
    experts themselves."""
    return f"{path}.weight" if path in modules else path


def shape_of(A: Tensor, B: Tensor) -> MatrixShape:
    """The shape of what a chain with this A (..., r, d_in) and B (..., d_out, r) adapts."""
    return MatrixShape(A.shape[-1], B.shape[-2], A.shape[0] if A.dim() == 3 else None)


def misfit(modules: Mapping[str, nn.Module], path: str, A: Tensor, B: Tensor) -> str | None:
    """Why a chain with this A (..., r, d_in) and B (..., d_out, r) cannot go to `path`, as the end of a
    message; None where it can. `modules` are a model's, as `named_modules` gives them."""
    wanted = shape_of(A, B)
    parent, _, name = path.rpartition(".")
    module, shape = modules.get(path), linear_shape(modules.get(path))
    found = MatrixShape(*shape) if shape else None
    if module is None and (matrices := expert_matrices(modules.get(parent))):
        found = MatrixShape(*matrices[name]) if name in matrices else None
    if found == wanted:
        return None
    if found is not None:
        there = f"has {found} there."
    elif module is None:
        there = f"has no such module.{did_you_mean(path, modules)}"
    else:
        there = f"has a {type(module).__name__} there, which is not a linear layer."
    return f"it adapts '{path}' ({wanted}), and {type(modules['']).__name__} {there}"
