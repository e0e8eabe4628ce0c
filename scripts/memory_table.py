"""docs/memory.md's table of what fits where, predicted by the function that `linchain check` predicts with.

    python scripts/memory_table.py            writes the table into docs/memory.md
    python scripts/memory_table.py --check    says whether it is what would be written

No model is loaded: the shapes of published models run on the meta device. It takes a few minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from linchain_cli.recipe import Recipe
    from linchain_cli.training.forecast import MemoryForecast

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
GIB = 2**30
# (24 GB and 80 GB cards, as vendors count) times the share that training plans with.
CARDS = {"24 GB": 24e9, "80 GB": 80e9}

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
QWEN = {"num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 131072}


def _shape(
    hidden: int, feed_forward: int, layers: int, heads: int, head: int, tied: bool, family: dict
) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "head_dim": head, "tie_word_embeddings": tied, **family}


# The shapes of Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen2.5 14B and 32B, and Llama 3.1 70B.
MODELS = {
    "1 B": _shape(2048, 8192, 16, 32, 64, True, LLAMA),
    "3 B": _shape(3072, 8192, 28, 24, 128, True, LLAMA),
    "8 B": _shape(4096, 14336, 32, 32, 128, False, LLAMA),
    "14 B": _shape(5120, 13824, 48, 40, 128, False, QWEN),
    "32 B": _shape(5120, 27648, 64, 40, 128, False, QWEN),
    "70 B": _shape(8192, 28672, 80, 64, 128, False, LLAMA),
}
# Tokens of the one row in memory, and how its activations are kept.
COLUMNS = {
    "512, kept": (512, "kept"),
    "512": (512, "recomputed"),
    "2,048": (2048, "recomputed"),
    "8,192": (8192, "recomputed"),
    "32,768": (32768, "recomputed"),
    "32,768, offloaded": (32768, "offloaded"),
}


def predicted(model: str, quantization: str, gpus: int, length: int, activations: str) -> float:
    """Bytes on each GPU at the moment of most memory, as `linchain check` predicts them."""
    from linchain_cli.training.forecast.memory import base_bytes

    recipe = _recipe(quantization, gpus, activations)
    return replace(_counted(model, length, activations), base=base_bytes(recipe, _empty(model), gpus)).total


@cache
def _counted(model: str, length: int, activations: str) -> MemoryForecast:
    """All parts, of which only the base depends on its form and on the number of GPUs."""
    from linchain_cli.training.forecast.memory import count_memory

    notes: list[str] = []
    recipe = _recipe("none", 1, activations)
    found = count_memory(recipe, _empty(model), 1, length, length, torch.device("cuda"), notes)
    if notes:
        sys.exit(notes[0])
    return found


@cache
def _empty(model: str) -> torch.nn.Module:
    from transformers import LlamaConfig

    from linchain_cli.training.chains import chain_config
    from linchain_cli.training.forecast.model import forecast_model

    recipe = _recipe("none", 1, "kept")
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODELS[model]).save_pretrained(folder)
        return forecast_model(recipe, chain_config(recipe), Path(folder), torch.device("cuda"))


def _recipe(quantization: str, gpus: int, activations: str) -> Recipe:
    from linchain_cli.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "table",
            "model": {"path": "base", "dtype": "bfloat16", "quantization": quantization},
            "data": {"train": "rows"},
            "training": {
                "micro_batch_size": 1,
                "parallel": "shard" if gpus > 1 else "auto",
                "gradient_checkpointing": activations != "kept",
                "offload_activations": activations == "offloaded",
            },
        }
    )


def cell(size: float) -> str:
    """GiB, and the smallest card that it fits on."""
    from linchain_cli.training.memory import USABLE

    card = next((name for name, room in CARDS.items() if size <= USABLE * room), None)
    mark = {"24 GB": " ●", "80 GB": " ○", None: ""}[card]
    return f"{size / GIB:.1f}{mark}"


def table() -> Iterator[str]:
    yield f"| model | base | GPUs | {' | '.join(COLUMNS)} |"
    yield "| --- | --- | --: |" + " --: |" * len(COLUMNS)
    for model in MODELS:
        for quantization, name in (("none", "bfloat16"), ("nf4", "nf4")):
            for gpus in (1, 8):
                cells = (cell(predicted(model, quantization, gpus, *column)) for column in COLUMNS.values())
                yield f"| {model} | {name} | {gpus} | {' | '.join(cells)} |"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    written = before + BEGIN + "".join(f"{line}\n" for line in table()) + END + rest.partition(END)[2]
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if written == page else "docs/memory.md is not what scripts/memory_table.py writes")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
