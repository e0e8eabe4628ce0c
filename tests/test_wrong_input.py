"""What people give by mistake: every command answers with one message that names it, and exit code 2.

Directories where files belong, files that hold something else, pipes, links that lead nowhere, numbers beyond
all bounds. Nothing may hang, end in a traceback, or be called unexpected.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .command_line import linchain

LONG = "x" * 300  # longer than a file name can be


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama_dir: Path) -> Path:
    """A directory with one of each, and a recipe that is right."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").touch()
    (root / "binary").write_bytes(bytes(range(256)) * 4)
    (root / "dir").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    for name, content in {"text": "hello", "list": "[1, 2]", "number": "3", "null": "null"}.items():
        (root / f"{name}.json").write_text(content)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(20)]
    (root / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "name": "run",
        "model": {"path": str(tiny_llama_dir)},
        "adapter": {"rank": 2},
        "data": {"train": "rows.json", "validation": 4},
        "training": {"max_steps": 1},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    runs = {"broken": "{", "list": "[]", "null": "null", "empty": "", "other": '{"status": 3}'}
    for name, content in runs.items():
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "run.json").write_text(content)
    (root / "runs" / "directory" / "run.json").mkdir(parents=True)
    for name, content in {"broken": "{", "list": "[]", "other": '{"format": 99}'}.items():
        (root / "comparisons" / name).mkdir(parents=True)
        (root / "comparisons" / name / "comparison.json").write_text(content)
    parts = {"recipe": {}, "runs": [], "tables": {}, "notes": [], "name": "x", "hashes": {}}
    for name, content in {"empty": parts, "list": dict.fromkeys(parts, [])}.items():
        (root / "comparisons" / f"results-{name}").mkdir()
        (root / "comparisons" / f"results-{name}" / "comparison.json").write_text("{}")
        (root / "comparisons" / f"results-{name}" / "results.json").write_text(json.dumps(content))
    return root


NAMES = ["nothing", "empty", "binary", "dir", "pipe", "loop", "dangling", "text.json", "", LONG, "/dev/null"]
OVERRIDES = [
    *("=", "a", "a=", "name=", "name=[", "name=a/b", "name=..", f"name={LONG}", "adapter=3", "data=[]"),
    *("seed=1e400", "seed=-1", "adapter.rank=1e9", "adapter.depth=1e99", "adapter.alpha=inf"),
    *("adapter.target_modules='('", "adapter.target_modules=[]", "adapter.target_modules=nothing"),
    *(f"data.train={name}" for name in (*NAMES[:-1], "list.json", "number.json", "null.json", "rows.txt")),
    *("data.validation=binary", "data.validation=1000000", "data.validation=dir", "data.template=dir"),
    *("data.template=3", "data.template={prompt: []}", "data.template={prompt: '{x'}"),
    *(f"model.path={name}" for name in ("dir", "binary", "empty", "pipe", "loop", "''", "x.gguf", "'a b'")),
    *("training=3", "training.trackers=[x]", "training.eval_every=0", "training.learning_rate=1e300"),
    *("evaluation.limit=0", "evaluation.protocol=x"),
]
SEEDS = ["", " ", "x", "-1", "1,", "99999999999", "²", "1e3"]
RUNS = [*NAMES, *(f"runs/{name}" for name in ("broken", "list", "null", "empty", "other", "directory"))]
COMPARISONS = [f"comparisons/{name}" for name in ("broken", "list", "other", "results-empty", "results-list")]
CASES = [
    *(["train", name] for name in (*NAMES, "list.json", "rows.json")),
    *(["check", name] for name in NAMES),
    *(["compare", name, "adapter.depth=0,1"] for name in NAMES),
    *(["check", "recipe.yaml", word] for word in OVERRIDES),
    *(["train", "recipe.yaml", f"evaluation.tasks=[{name}]"] for name in ("nothing", "dir", "binary", LONG)),
    *(["compare", "recipe.yaml", word] for word in ("adapter.depth=0,", ",", "adapter.depth=0,x")),
    *(["compare", "recipe.yaml", "adapter.depth=0,1", "--seeds", word] for word in SEEDS),
    *(["recipes", "copy", name] for name in ("", "nothing", "../x", "🙂")),
    *(["recipes", "copy", "figure2", "--out", name] for name in (LONG, "loop", "pipe", "dangling", "binary")),
    *(["report", name] for name in (*RUNS, *COMPARISONS)),
    *([command, name] for command in ("merge", "export", "inspect") for name in RUNS[11:]),
]


@pytest.fixture(autouse=True)
def _there(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path))


@pytest.mark.parametrize("words", CASES, ids=lambda words: " ".join(words)[:80])
def test_wrong_input_is_one_message_and_exit_code_2(words, capsys):
    code = linchain(*words)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said and "unexpected" not in said
    error = said[said.rindex("rror") :]
    assert 10 < len(error) < 1500 and error.count("\n") < 12, said
