"""What a chain learned, in numbers: the singular values of ΔW and what follows from them.

ΔW = (α/r)·B·M·A has rank r at most and is never formed. With B = Q_B·R_B and Aᵀ = Q_A·R_A, the r × r core
(α/r)·R_B·M·R_Aᵀ has the same singular values, because Q_B and Q_A have orthonormal columns: O((d_in +
d_out)·r²) instead of O(d_in·d_out·min(d_in, d_out)). Everything is computed in float64.

Letters behind a name are a tensor's dimensions: n links, r rank, D d_in, O d_out, q and p the smaller of r
and D, and of r and O.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linchain_cli.chain.layer import collapse


def spectrum(A_rD: Tensor, links_nrr: Tensor, B_Or: Tensor, scaling: float) -> Tensor:
    """The singular values of ΔW, largest first: (min(p, q),) in float64; all further ones are zero.

    `scaling` is α/r.
    """
    A_rD, links_nrr, B_Or = (tensor.detach().double() for tensor in (A_rD, links_nrr, B_Or))
    R_A_qr = torch.linalg.qr(A_rD.T, mode="r").R
    R_B_pr = torch.linalg.qr(B_Or, mode="r").R
    middle_pr = R_B_pr @ collapse(links_nrr) if len(links_nrr) else R_B_pr
    return torch.linalg.svdvals(scaling * middle_pr @ R_A_qr.T)


def entropy_rank(singular_values: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ/Σσ: how many directions share the spectrum, between 1 and r; 0 where all σ
    are 0."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def stable_rank(singular_values: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂², between 1 and r; 0 where all σ are 0."""
    largest = singular_values.max()
    return 0.0 if largest == 0 else float((singular_values / largest).square().sum())


def top_energy(singular_values: Tensor) -> float:
    """σ₁² / Σσ²: the share of the squared Frobenius norm that the first direction holds; 0 where all σ are
    0."""
    rank = stable_rank(singular_values)
    return 0.0 if rank == 0 else 1.0 / rank


def condition_numbers(links: Tensor) -> Tensor:
    """σ_max/σ_min of each link: (n, r, r) → (n,) in float64; infinite where a link is singular."""
    if links.shape[0] == 0:
        return torch.empty(0, dtype=torch.float64)
    values = torch.linalg.svdvals(links.detach().double())
    return values[:, 0] / values[:, -1]
