"""Classifiers that PEFT trained, and those that went to PEFT's format and came back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from linchain_cli.chain import attach, load_adapter
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.loading import load_model

from ..classifiers import KINDS, make_checkpoint, pair_rows, write_rows
from ..command_line import linchain

ROWS = [[2, 5, 6, 3], [2, 7, 8, 9, 10, 3, 11, 3]]


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def trained_by_peft(base: Path, kind: str, classes: int, **options) -> torch.Tensor:
    """Leaves a classifier's adapter in ./peft whose values all do something; returns what it says of ROWS."""
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes, ignore_mismatched_sizes=True
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": KINDS[kind][1]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained("peft")
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])


def told(run: str, base: Path) -> torch.Tensor:
    adapter = load_adapter(Path(run, "adapter"))
    model = load_model(base, dtype="float32", device="cpu", outputs=Outputs(adapter.head.classes))
    attach(model, adapter)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])


def with_head(kind: str, directory: Path, classes: int = 2) -> Path:
    """A checkpoint that is a classifier of that many classes, as of an earlier fine-tuning."""
    from transformers import AutoModelForSequenceClassification

    make_checkpoint(kind, directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=classes)
    model.save_pretrained(directory)
    return directory


CASES = [
    ("bert", 3, {}),
    ("bert", 3, {"target_modules": ["query", "dense"]}),  # a pooler's, too
    ("roberta", 2, {}),
    ("deberta-v2", 3, {"modules_to_save": ["pooler"]}),
    ("modernbert", 1, {}),
    ("llama", 2, {"bias": "none", "use_rslora": True}),
    ("gpt2", 3, {"fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("kind", "classes", "options"), CASES)
def test_a_classifier_of_peft_tells_what_it_told(tmp_path, capsys, kind, classes, options):
    from transformers import AutoModelForSequenceClassification

    base = (
        with_head(kind, tmp_path / "base", 2) if kind == "bert" else make_checkpoint(kind, tmp_path / "base")
    )
    expected = trained_by_peft(base, kind, classes, **options)
    assert linchain("import", "peft", "--out", "run") == 0
    printed = capsys.readouterr().out
    head = load_adapter(Path("run/adapter")).head
    assert head.classes == tuple(f"LABEL_{number}" for number in range(classes if classes > 1 else 0))
    assert ("--labels NAME" in printed) == (classes > 1) and ("regression" in printed) == (classes == 1)
    torch.testing.assert_close(told("run", base), expected, rtol=1e-5, atol=1e-5)
    assert linchain("merge", "run") == 0
    merged = AutoModelForSequenceClassification.from_pretrained("run/merged").eval()
    with torch.no_grad():
        found = torch.cat([merged(input_ids=torch.tensor([row])).logits for row in ROWS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_was_exported_comes_back_bit_for_bit(tmp_path, capsys, kind):
    make_checkpoint(kind, tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", pair_rows(16))
    write_rows(tmp_path / "dev.jsonl", pair_rows(12, first=101))
    recipe = {
        "task": "classification",
        "name": "one",
        "model": {"path": "base", "dtype": "float32"},
        "adapter": {"rank": 4, "depth": 0, "target_modules": KINDS[kind][1]},
        "data": {"train": "train.jsonl", "validation": 4, "max_length": 16},
        "training": {"max_steps": 2, "global_batch_size": 4, "learning_rate": 0.01},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert linchain("train", "recipe.yaml") == 0
    assert linchain("export", "runs/one") == 0
    capsys.readouterr()
    assert linchain("import", "runs/one/peft", "--out", "back") == 0
    assert "predicts bad, good, of rows of up to 16 tokens, as its linchain_labels" in capsys.readouterr().out
    first, back = load_adapter(Path("runs/one/adapter")), load_adapter(Path("back/adapter"))
    assert first.head.classes == back.head.classes
    assert first.head.tensors.keys() == back.head.tensors.keys()
    for name, tensor in first.head.tensors.items():
        assert torch.equal(back.head.tensors[name], tensor)
    found = yaml.safe_load(Path("back/recipe.yaml").read_text())
    assert (found["task"], found["data"]["max_length"]) == ("classification", 16)
    for run in ("runs/one", "back"):
        assert linchain("eval", run, "--tasks", "dev.jsonl", "--out", f"of-{Path(run).name}") == 0
    one, other = (Path(f"of-{name}/classification.predictions.jsonl") for name in ("one", "back"))
    assert one.read_bytes() == other.read_bytes()
    capsys.readouterr()
    assert linchain("merge", "runs/one", "back", "--weights", "0.5,0.5", "--out", "sum") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: classifiers do not add up")
    for place, what in {"runs/one": "a run of linchain's", "base": "a whole model"}.items():
        assert linchain("import", place, "--out", "x") == 2
        assert f"adapter_config.json is missing. It is {what}, which" in capsys.readouterr().err
    assert linchain("export", "back") == 0  # and goes again
    assert Path("back/peft/linchain_labels.json").read_bytes() == (
        Path("runs/one/peft/linchain_labels.json").read_bytes()
    )


def test_classes_are_named_by_the_option_or_the_base(tmp_path, capsys):
    base = with_head("roberta", tmp_path / "base", 2)
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (base / "config.json").write_text(json.dumps(config))
    trained_by_peft(base, "roberta", 2)
    assert linchain("import", "peft", "--out", "named") == 0
    head = load_adapter(Path("named/adapter")).head
    assert head.classes == ("no", "yes")
    weights = Path("peft/adapter_model.safetensors")
    as_wrapped = {
        key.replace("classifier.", "classifier.modules_to_save.default."): tensor
        for key, tensor in load_file(weights).items()
    }
    save_file(as_wrapped, weights)  # as tools write it that save the wrapped model themselves
    assert linchain("import", "peft", "--out", "wrapped") == 0
    for name, tensor in load_adapter(Path("wrapped/adapter")).head.tensors.items():
        assert torch.equal(tensor, head.tensors[name])
    assert linchain("import", "peft", "--out", "own", "--labels", "sad, merry") == 0
    assert load_adapter(Path("own/adapter")).head.classes == ("sad", "merry")
    capsys.readouterr()
    for labels, message in {
        "a,b,c": "error: peft predicts 2 classes, and 3 are named: a, b, c",
        "a,a": "error: --labels a,a: expected different names",
        "a,": "error: --labels a,: expected different names",
    }.items():
        assert linchain("import", "peft", "--out", "x", "--labels", labels) == 2
        assert " ".join(capsys.readouterr().err.split()).startswith(message)


def test_several_labels_at_once_are_refused(tmp_path, capsys):
    base = make_checkpoint("roberta", tmp_path / "base")
    trained_by_peft(base, "roberta", 2)
    config = json.loads((base / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (base / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert linchain("import", "peft", "--out", "run") == 2
    assert "predicts several labels at once" in capsys.readouterr().err


def edited(**changes) -> None:
    path = Path("peft/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_nobody_has_the_values_of_is_refused(tmp_path, capsys):
    """A masked language model has no pooler, PEFT draws one, trains it or not, and does not save it."""
    base = make_checkpoint("bert", tmp_path / "base")
    trained_by_peft(base, "bert", 2)
    assert linchain("import", "peft", "--out", "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "lacks bert.pooler.dense.weight, bert.pooler.dense.bias of the head" in said
    assert "modules_to_save" in said and not Path("run").exists()


def test_other_whole_modules_and_missing_heads_are_refused(tmp_path, capsys):
    base = make_checkpoint("roberta", tmp_path / "base")
    trained_by_peft(base, "roberta", 2, modules_to_save=["word_embeddings"])
    assert linchain("import", "peft", "--out", "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "roberta.embeddings.word_embeddings.weight was trained whole" in said
    edited(task_type="TOKEN_CLS")
    assert linchain("import", "peft", "--out", "run") == 2
    assert "the head of a sequence classifier (task_type SEQ_CLS)" in " ".join(
        capsys.readouterr().err.split()
    )
    trained_by_peft(base, "roberta", 2)
    weights = Path("peft/adapter_model.safetensors")
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "out_proj" not in key}, weights)
    assert linchain("import", "peft", "--out", "run") == 2
    assert "'classifier.out_proj.weight' is missing" in " ".join(capsys.readouterr().err.split())
    save_file(tensors, weights)
    edited(base_model_name_or_path="./gone")
    assert linchain("import", "peft", "--out", "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be read without the base" in said and "--base MODEL" in said
    assert linchain("import", "peft", "--out", "run", "--base", base) == 0
    edited(task_type="CAUSAL_LM", modules_to_save=None)
    save_file({key: value for key, value in tensors.items() if "lora_" in key}, weights)
    assert linchain("import", "peft", "--out", "x", "--labels", "a,b") == 2
    assert "is no classifier's adapter" in capsys.readouterr().err
