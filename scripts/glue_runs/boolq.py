"""BoolQ (Clark et al., arXiv 1905.10044) by its questions alone, without the passages that answer them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from linchain_cli.data.sources import DATA_DIR_VARIABLE
from linchain_cli.recipe import SourceConfig
from linchain_cli.storage import write_atomic

_QUESTION = re.compile(r"question: (.*)\n\nAnswer format: true/false$", re.DOTALL)


def sources(out: Path, told: int) -> tuple[SourceConfig, SourceConfig]:
    """Training rows, and the first `told` of those that are reported: from LLM-Adapters' boolq/train.json and
    boolq/test.json below LINCHAIN_DATA_DIR, else from the hub.

    Their rows say of every question how to answer it, which a classifier has no use for; the questions by
    themselves are written to `out`.
    """
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, "")) / "boolq"
    if not (folder / "train.json").is_file():
        of_hub = {"path": "google/boolq", "columns": {"text": "question", "label": "answer"}}
        return SourceConfig(**of_hub), SourceConfig(**of_hub, split="validation", max_rows=told)
    files = []
    for name in ("train", "test"):
        file = out / f"boolq-{name}.jsonl"
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            rows = [_labelled(row) for row in json.loads((folder / f"{name}.json").read_bytes())]
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(file))
    return SourceConfig(path=files[0]), SourceConfig(path=files[1], max_rows=told)


def _labelled(row: dict[str, str]) -> dict[str, str]:
    return {"text": _QUESTION.search(row["instruction"])[1], "label": row["answer"]}
