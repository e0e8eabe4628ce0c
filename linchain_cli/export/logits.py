"""How far the logits of two models lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linchain_cli.errors import LinchainError


@dataclass(frozen=True)
class LogitProof:
    """How far the logits of two models lie apart, over `positions` rows of logits read from `prompts`
    prompts.

    top1_agreement: on how many positions the largest logit is the same one; None of a regression's one number
    adapter_effect and adapter_effect_mean are the differences that switching the adapter off makes: what
    there was to lose. adapter_lost: whether more than half of it was lost, as rounding of a small ΔW can.
    """

    prompts: int
    positions: int
    dtype: str
    largest_difference: float
    mean_difference: float
    top1_agreement: float | None
    adapter_effect: float
    adapter_effect_mean: float
    adapter_lost: bool

    def __str__(self) -> str:
        share = self.top1_agreement
        same = "" if share is None else f", top-1 agreement {100 * share:.1f} %"
        return f"largest difference {self.largest_difference:.3g}{same} over {self.positions} positions"


def compare_logits(
    adapted: Sequence[Tensor], merged: Sequence[Tensor], base: Sequence[Tensor], dtype: str
) -> LogitProof:
    """Compares logits prompt by prompt.

    Raises:
        LinchainError: the merged model gives no finite number where the adapted one does.
    """
    differences, effects, agreements = [], [], []
    for ours, theirs, bare in zip(adapted, merged, base, strict=True):
        differences.append((ours - theirs).abs())
        effects.append((ours - bare).abs())
        agreements.append(ours.argmax(-1) == theirs.argmax(-1))
        if not torch.isfinite(differences[-1]).all():
            raise LinchainError("the logits of the merged model are not finite where the adapted model's are")
    difference, effect, agreement = torch.cat(differences), torch.cat(effects), torch.cat(agreements)
    return LogitProof(
        prompts=len(differences),
        positions=len(agreement),
        dtype=dtype,
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agreement.double().mean()) if adapted[0].shape[-1] > 1 else None,
        adapter_effect=float(effect.max()),
        adapter_effect_mean=float(effect.mean()),
        adapter_lost=bool(difference.mean() > effect.mean() / 2),
    )
