"""Numbers that others published, to stand beside ours: clearly apart, and with their source.

They are other people's runs, with their prompts, data order and decoding. Public re-runs of one such number
(LLaMA-7B, LoRA rank 16, published 77.5) gave 53.6 and 60.1, so a difference to them of a few points says
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from linchain_cli.evaluation.tasks import SPECS

COMMONSENSE = tuple(name for name, spec in SPECS.items() if spec.group == "commonsense")
DORA = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353"


@dataclass(frozen=True)
class Published:
    """One published row: an accuracy averaged over `tasks`, from 0 to 1."""

    model: str
    method: str
    average: float
    source: str
    tasks: tuple[str, ...] = COMMONSENSE
    protocol: str = "generate"


PUBLISHED = (
    Published("LLaMA-3-8B", "LoRA, rank 32", 0.808, DORA),
    Published("LLaMA-3-8B", "DoRA, rank 16", 0.850, DORA),
    Published("LLaMA-3-8B", "DoRA, rank 32", 0.852, DORA),
)


def published_beside(tasks: list[str]) -> list[Published]:
    """The published rows over exactly these tasks."""
    return [row for row in PUBLISHED if set(row.tasks) == set(tasks)]
