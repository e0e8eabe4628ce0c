"""Trains with chains that are rewritten every few steps without changing what the model computes.

    python scripts/try_refactoring.py links|balance EVERY RECIPE [key=value ...]

Every EVERY steps each chain B·Wn…W1·A is given other factors with the same product:

    links    every link becomes orthogonal again, its polar factor; A takes what they lose
    balance  links likewise, and B and A share the singular values of ΔW evenly, √σ each (at depth 0: LoRA's)

Adam's moments go with their tensors: first moments as gradients do under the change of basis, second moments
as if the gradient's entries were independent. Otherwise it is `linchain train`, and the run's directory is
like any other. It is an experiment, whose outcome is in docs/evidence.md; a run of it must not be continued
with `linchain train --resume`, which would leave the rewriting out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from linchain_cli.chain.layer import collapse
from linchain_cli.errors import LinchainError
from linchain_cli.recipe import load_recipe
from linchain_cli.training import loop
from linchain_cli.training.job import Job
from linchain_cli.training.runner import run_training

MODES = ("links", "balance")


def polar(links: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each link: U·Vᵀ of its singular value decomposition, (n, r, r)."""
    left, _, right = torch.linalg.svd(links)
    return left @ right


def product(links: Tensor, rank: int) -> Tensor:
    """Wn…W1, or the identity of a chain without links."""
    return collapse(links) if len(links) else torch.eye(rank, dtype=links.dtype, device=links.device)


def refactored(
    A: Tensor, links: Tensor, B: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Other factors of the same B·Wn…W1·A, in float64.

    Returns:
        A, links, B, and the (r, r) matrices T_a and T_b with A_new = T_a·A and B_new = B·T_b.
    """
    A, links, B = A.double(), links.double(), B.double()
    rank = A.shape[0]
    turned = polar(links)
    old, new = product(links, rank), product(turned, rank)
    if mode == "links":
        t_a, t_b = new.T @ old, torch.eye(rank, dtype=A.dtype, device=A.device)
    else:
        r_a, r_b = (torch.linalg.qr(matrix, mode="r").R for matrix in (A.T, B))
        left, sigma, right = torch.linalg.svd(r_b @ old @ r_a.T)
        root = sigma.sqrt()
        t_b = torch.linalg.solve(r_b, left * root)
        t_a = new.T @ (root[:, None] * right) @ torch.linalg.inv(r_a.T)
    return t_a @ A, turned, B @ t_b, t_a, t_b


@torch.no_grad()
def refactor(job: Job, path: str, mode: str) -> None:
    """Rewrites one layer and its optimizer's moments in place."""
    layer = job.layers[path]
    A, links, B, t_a, t_b = refactored(layer.A, layer.links, layer.B, mode)
    layer.A.copy_(A)
    layer.links.copy_(links)
    layer.B.copy_(B)
    # ΔW stays, so the chain rule gives the gradients of the new factors from those of the old.
    g_a, g_b = torch.linalg.inv(t_a).T.float(), torch.linalg.inv(t_b).T.float()
    state = job.optimizer.moments(f"{path}.A")
    state["exp_avg"].copy_(g_a @ state["exp_avg"])
    state["exp_avg_sq"].copy_(g_a.square() @ state["exp_avg_sq"])
    state = job.optimizer.moments(f"{path}.B")
    state["exp_avg"].copy_(state["exp_avg"] @ g_b)
    state["exp_avg_sq"].copy_(state["exp_avg_sq"] @ g_b.square())


def main(arguments: Sequence[str]) -> None:
    if (
        len(arguments) < 3
        or arguments[0] not in MODES
        or not arguments[1].isdecimal()
        or int(arguments[1]) < 1
    ):
        sys.exit(__doc__)
    mode, every, recipe, *overrides = arguments
    step = loop.optimizer_step

    def step_and_refactor(job: Job, *rest):
        result = step(job, *rest)
        if (job.state.step + 1) % int(every) == 0:
            for path in job.layers:
                refactor(job, path, mode)
        return result

    loop.optimizer_step = step_and_refactor
    try:
        run_training(load_recipe(recipe, overrides))
    except LinchainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
