"""`linchain check` on a real recipe and a tiny model: everything is shown before any weight is read."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from linchain_cli.commands import check_view
from linchain_cli.model.tokenizer import load_tokenizer

from ..command_line import linchain


@pytest.fixture
def recipe(tmp_path, tiny_llama_dir, commonsense_rows, monkeypatch):
    """A recipe whose model directory holds no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_llama_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = commonsense_rows(40)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "nonsense\n")
    content = {
        "name": "try",
        "model": {"path": "model", "dtype": "float32"},
        "adapter": {"rank": 4, "depth": 2, "target_modules": ["q_proj", "down_proj"]},
        "data": {"train": "train.jsonl", "validation": 4, "on_bad_row": "skip"},
        "training": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def lines_of(text: str, start: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith(start)]


def test_what_auto_comes_to_is_shown(recipe, capsys):
    words = (recipe, "training.learning_rate=auto", "adapter.alpha=16")
    assert linchain("check", *words) == 0
    assert "learning rate 0.002, by auto: 0.001 for" in capsys.readouterr().out
    assert linchain("check", *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["training"]["learning_rate"] == 2e-3 and "alpha" in found["auto_rate"]


def test_with_json_stdout_holds_one_value_of_what_is_shown(recipe, capfd):
    arguments = (recipe, "training.warmup_steps=100", "evaluation.tasks=[everyday]", "evaluation.limit=7")
    assert linchain("check", *arguments) == 0
    shown = capfd.readouterr().out
    assert linchain("check", *arguments, "--json") == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert "Recipe" not in printed.err and "note: " not in printed.err
    assert found["recipe"]["training"]["warmup_steps"] == 100 and found["max_length"] > 0
    assert found["modules"]["per_pattern"] == {"q_proj": 2, "down_proj": 2}
    assert found["modules"]["adapted"] == 4
    assert found["modules"]["trainable_parameters"] == 2 * (4 * 128 + 32) + 2 * (4 * 192 + 32)
    assert found["modules"]["coverage"]["share"] == pytest.approx(1 / 3)
    assert (found["rows"]["total"], found["rows"]["kept"], found["validation"]) == (41, 40, None)
    assert (found["train_rows"], found["validation_rows"]) == (36, 4)
    assert (found["epoch"]["steps"], found["total_steps"]) == (5, 10)
    assert found["tasks"] == {"everyday": 7}
    *parts, total = found["forecast"]["memory"].values()
    assert total == sum(part or 0 for part in parts) and found["forecast"]["memory"]["base"] > 0
    assert found["forecast"]["time"]["train_seconds"] > 0
    assert found["notes"] == [line[6:] for line in shown.splitlines() if line.startswith("note: ")]
    assert any("training.warmup_steps: the run has 10 steps" in note for note in found["notes"])


def test_with_json_an_error_leaves_stdout_empty(recipe, capfd):
    assert linchain("check", recipe, "--json", "adapter.target_modules=[q_prj]") == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "Did you mean 'q_proj'" in printed.err


def test_everything_is_shown(recipe, capsys):
    assert linchain("check", recipe) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no colours where no terminal is"
    assert "warmup_steps: 0.05" in out, "defaults are written out"
    assert lines_of(out, "q_proj") == [["q_proj", "2"]] and lines_of(out, "down_proj") == [["down_proj", "2"]]
    trained = 2 * (4 * (64 + 64) + 2 * 16) + 2 * (4 * (128 + 64) + 2 * 16)
    assert f"{trained:,} trainable parameters in 4 modules" in out
    assert "chains on 33.3% of the blocks' weights; without: mlp.gate_proj 22.2%" in out
    assert lines_of(out, "train.jsonl") == [["train.jsonl", "alpaca", "41", "40", "1", "0", "0"]]
    assert "36 rows to train on, 4 to validate on" in out
    assert "skipped train.jsonl:41 (row 41): not JSON" in out
    assert f"in the cache {recipe.parent / 'cache'} (0.00 GB in all; what nobody reads for 30 days" in out
    assert lines_of(out, "steps") == [["steps", "5"]] and "the run takes 10 steps (2.00 epochs)" in out
    assert len(lines_of(out, "padding")) == 2 and "straddle" in out
    assert out.count("⟦the correct answer is ") == 3 and out.count("<|im_end|>⟧") == 3
    for part in (
        "base weights",
        "chains and their gradients",
        "optimizer state",
        "activations",
        "logits",
        "at most",
    ):
        assert lines_of(out, part)
    assert "tokens per second without padding" in out
    assert sum(int(row[3].replace(",", "")) for row in lines_of(out, " ") if row[1:2] == ["to"]) == 36


def test_numbers_that_a_short_run_cannot_reach_are_told(recipe, capsys):
    assert linchain("check", recipe, "training.warmup_steps=100", "training.early_stopping=3") == 0
    out = capsys.readouterr().out
    assert "note: training.warmup_steps: the run has 10 steps, and warm-up takes 100" in out
    assert "note: training.early_stopping: 3 validations without a lower loss cannot come before" in out
    assert linchain("check", recipe) == 0
    assert "training.warmup_steps: the run" not in capsys.readouterr().out, "defaults fit any length"


def test_a_run_that_is_there_already_is_told(recipe, capsys, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "mine.txt").write_text("x")
    assert linchain("check", recipe, "name=run", f"output_dir={tmp_path / 'runs'}") == 0
    assert "runs/run exists and is not a run directory; it is left alone." in capsys.readouterr().out


def test_tasks_are_looked_at_too(recipe, capsys, tmp_path):
    assert linchain("check", recipe, "evaluation.tasks=[everyday]", "evaluation.limit=7") == 0
    out = capsys.readouterr().out
    assert "Evaluated afterwards, by likelihood" in out
    assert lines_of(out, "everyday") == [["everyday", "7", "everyday", "(test)"]]
    (tmp_path / "sums.jsonl").write_text('{"instruction": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "sums.yaml").write_text("path: sums.jsonl\nanswer: number\n")
    assert linchain("check", recipe, "evaluation.tasks=[sums.yaml]") == 2
    assert "sums has no options whose likelihood could be compared" in capsys.readouterr().err


def test_overrides_count(recipe, capsys):
    assert linchain("check", recipe, "adapter.depth=0", "training.epochs=1", "data.template=plain") == 0
    out = capsys.readouterr().out
    assert "the run takes 5 steps (1.00 epochs)" in out
    assert "Below is an instruction" not in out


@pytest.mark.parametrize(
    "override, said",
    [
        ("adapter.target_modules=[q_prj]", "Did you mean 'q_proj'"),
        ("data.train=trian.jsonl", "Did you mean 'train.jsonl'"),
        ("data.on_bad_row=error", "train.jsonl:41 (row 41): not JSON"),
        ("model.path=modl", "modl"),
        ("data.max_length=8", "have no supervised token"),
        ("data.validation=40", "cannot be held out"),
        ("adapter.init_from=runs", "adapter.init_from: runs holds no chain adapter"),
        ("training.trackers=[clearml]", "clearml cannot be used: its Python package is not installed"),
    ],
)
def test_what_is_wrong_is_one_message(recipe, capsys, override, said):
    assert linchain("check", recipe, override) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err


def test_what_train_would_refuse_is_refused(recipe, capsys):
    config = recipe.parent / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert linchain("check", recipe, "adapter.target_modules=[q_proj,lm_head]") == 2
    assert "'lm_head' shares its weight with 'model.embed_tokens'" in capsys.readouterr().err


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_rows_that_the_model_cannot_read_are_told(recipe, capsys, tmp_path, tiny_gpt2_dir):
    change(tmp_path / "model" / "config.json", max_position_embeddings=100)
    assert linchain("check", recipe) == 0
    assert "and the model was made for 100: it reads on" in capsys.readouterr().out
    change(tmp_path / "model" / "config.json", vocab_size=300)
    assert linchain("check", recipe) == 2
    error = capsys.readouterr().err
    assert "train.jsonl:1 (row 1): the token " in error and "the model's embeddings end at 299" in error
    shutil.copytree(tiny_gpt2_dir, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors"))
    change(tmp_path / "gpt2" / "config.json", n_positions=100)
    assert linchain("check", recipe, "model.path=gpt2", "adapter.target_modules=[c_attn]") == 2
    assert "the model has 100 positions: set data.max_length to at most 100" in capsys.readouterr().err


class Rows:
    lengths = np.array([3])

    def __init__(self, ids, supervised):
        self.row = np.array(ids, np.int32), np.array(supervised, bool)

    def __getitem__(self, index):
        return self.row


def printed(tokenizer, ids, supervised, **console) -> str:
    from rich.console import Console

    out = io.StringIO()
    check_view.rows(
        Console(file=out, soft_wrap=True, highlight=False, **console), Rows(ids, supervised), tokenizer
    )
    return out.getvalue()


def test_supervised_tokens_are_green_on_a_terminal(tiny_tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    ids = tokenizer("Answer: true", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    learned = [False] * (len(ids) - 2) + [True, True]
    last = tokenizer.decode(ids[-2:])
    coloured = printed(tokenizer, ids, learned, force_terminal=True, color_system="standard")
    assert f"\x1b[1;32m{last}\x1b[0m" in coloured and "⟦" not in coloured
    plain = printed(tokenizer, ids, learned)
    assert f"⟦{last}⟧" in plain and "\x1b" not in plain


def test_data_cannot_speak_to_the_terminal(tiny_tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    ids = tokenizer("a\x1b[31mb\tc\nd [bold]e", add_special_tokens=False).input_ids
    text = printed(tokenizer, ids, [False] * len(ids))
    assert "\x1b" not in text and "a�[31mb" in text and "[bold]e" in text


def test_durations():
    assert [check_view._duration(s) for s in (3, 119, 600, 7199, 36000)] == [
        "3 s",
        "119 s",
        "10 min",
        "120 min",
        "10.0 h",
    ]


def test_an_end_that_the_base_never_learned_to_write_is_told_before_anything_is_spent(
    recipe, tiny_llama_dir, capsys
):
    words = (recipe, "--json")
    assert linchain("check", *words) == 0
    assert "never taught" not in capsys.readouterr().out  # without weights nobody can tell
    tensors = load_file(tiny_llama_dir / "model.safetensors")
    tokenizer = load_tokenizer(tiny_llama_dir)
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    assert linchain("check", *words) == 0
    assert "never taught" not in capsys.readouterr().out
    tensors["lm_head.weight"][tokenizer.eos_token_id] = 0
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    assert linchain("check", *words) == 0
    (told,) = (note for note in json.loads(capsys.readouterr().out)["notes"] if "never taught" in note)
    assert f"to write {tokenizer.eos_token}: " in told and "[all-linear, lm_head]" in told
    assert linchain("check", recipe) == 0
    assert "never taught" in capsys.readouterr().out
    assert linchain("check", *words, "adapter.target_modules=[q_proj,lm_head]") == 0
    assert "never taught" not in capsys.readouterr().out
