"""Tasks in the format of lm-evaluation-harness, on rows that are made here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = [
    {
        "q": f"Where is horse {number}?",
        "options": ["in the kitchen", "at the harbour by the station"],
        "gold": number % 2,
    }
    for number in range(9)
]


def write_task(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, name: str = "places") -> str:
    """The file of a multiple-choice task, linchain_test_<name>."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: linchain_test_{name}\ndataset_path: json\n"
        f'dataset_kwargs: {{data_files: {{test: "{folder}/{name}.jsonl"}}}}\n'
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}} A:"\n'
        "doc_to_choice: \"{{options}}\"\ndoc_to_target: gold\ntarget_delimiter: ' '\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return str(folder / f"{name}.yaml")
