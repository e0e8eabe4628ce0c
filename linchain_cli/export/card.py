"""The model card: a README.md beside every export that says what it is, where it comes from and how to load
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from linchain_cli import __version__
from linchain_cli.chain import Adapter
from linchain_cli.evaluations import Line, TaskScore
from linchain_cli.model.files import HUB_ID

_MERGED_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""

_PEFT_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```"""


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from, as far as it is known.

    recipe: the resolved recipe as YAML; None for an adapter that was imported
    data: the training sources by name
    results: the adapter's evaluations, a line per task and setting
    """

    name: str
    recipe: str | None = None
    data: tuple[str, ...] = ()
    results: tuple[Line, ...] = ()


def model_card(
    kind: Literal["merged", "peft"], adapter: Adapter, origin: Origin, base: str, facts: Mapping[str, str]
) -> str:
    """The card's Markdown. `base` is the base model as the run names it; `facts` are lines of the proof, by
    caption."""
    config = adapter.config
    chain = {0: "LoRA", 1: "MoSLoRA (a chain of one link)"}.get(
        config.depth, f"a linear chain of {config.depth} links"
    )
    what = {
        "merged": f"`{base}` with a trained adapter folded in. It loads and runs like the base.",
        "peft": f"An adapter for `{base}` as a plain LoRA of rank {config.rank} in PEFT's file format.",
    }[kind]
    parts = [
        _front_matter(kind, base),
        f"# {origin.name}",
        f"{what} The adapter was trained as {chain}, rank {config.rank}, alpha {config.alpha:g}, on"
        f" {len(adapter.tensors)}"
        f" linear modules. Every ΔW has rank {config.rank} at most.",
        "## Base",
        f"`{base}`"
        + (f", weights SHA-256 `{adapter.base['hash']}`" if adapter.base.get("hash") else "")
        + ". Its licence and its limits hold for this derivative too.",
        "## Data",
        "\n".join(f"- `{source}`" for source in origin.data) or "Not known: the adapter was imported.",
        "## Results",
        _results(origin.results),
        "## What was verified when it was written" if facts else "",
        "\n".join(f"- {caption}: {value}" for caption, value in facts.items()),
        "## How to load it",
        (_MERGED_USE if kind == "merged" else _PEFT_USE).format(base=base, place="path/of/this/directory"),
        "" if origin.recipe is None else f"## Recipe\n\n```yaml\n{origin.recipe.strip()}\n```",
        f"Written by linchain {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(kind: str, base: str) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if kind == "peft" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linchain"],
    }
    if HUB_ID.fullmatch(base) and base.count("/") == 1 and not base.endswith(".gguf"):
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---"


def _results(lines: Sequence[Line]) -> str:
    """One table of all tasks and settings; accuracies in per cent."""
    if not lines:
        return "Not evaluated."
    rows = [
        f"| {line.task} | {_percent(line.score.accuracy)} | {_percent(line.score.stderr)} |"
        f" {'–' if line.score.n is None else line.score.n} | {_others(line.score)} | {line.setting} |"
        for line in lines
    ]
    head = "| task | accuracy | standard error | rows | beside it | how |\n|---|---|---|---|---|---|\n"
    return "Accuracy in per cent:\n\n" + head + "\n".join(rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _others(score: TaskScore) -> str:
    return ", ".join(
        f"{name} {_percent(metric.value) if metric.is_share else f'{metric.value:.4g}'}"
        for name, metric in score.metrics.items()
    )
