"""`linchain import` of what was exported, and of adapters of other tools."""

from __future__ import annotations

import json
import re
import shutil

import torch
import yaml

from linchain_cli.chain import load_adapter
from linchain_cli.run import RunDirectory

from ..command_line import linchain
from .test_commands import files_of


def test_an_imported_adapter_is_a_run(make_run, base_of, capsys, tmp_path):
    from linchain_cli.recipe import load_recipe

    run = make_run(base_of("gpt2"))
    linchain("export", run.path)
    assert linchain("import", run.path / "peft", "--out", tmp_path / "back") == 0
    recipe = load_recipe(tmp_path / "back" / "recipe.yaml")
    assert (recipe.adapter.rank, recipe.adapter.depth, recipe.adapter.alpha) == (4, 0, 8.0)
    assert recipe.adapter.target_modules == ["c_attn", "c_fc", "c_proj"]
    assert linchain("merge", tmp_path / "back") == 0
    assert linchain("inspect", tmp_path / "back") == 0
    assert "Not known: the adapter was imported" in (tmp_path / "back" / "merged" / "README.md").read_text()
    merged = json.loads((tmp_path / "back" / "merged" / "merge.json").read_bytes())
    assert merged["logits"]["largest_difference"] < 1e-5
    capsys.readouterr()
    (tmp_path / "back" / "eval").mkdir()
    for words in ((), ("--overwrite",)):  # what was made of it is not import's to replace
        assert linchain("import", run.path / "peft", "--out", tmp_path / "back", *words) == 2
        assert "left as it is" in capsys.readouterr().err


def test_an_adapter_without_a_record_is_asked_as_its_base_is(make_run, base_of, capsys, tmp_path):
    run = make_run(base_of("llama"))
    linchain("export", run.path)
    capsys.readouterr()
    assert linchain("import", run.path / "peft", "--out", tmp_path / "known") == 0
    assert ", as its linchain_prompt.json says" in capsys.readouterr().out
    (run.path / "peft" / "linchain_prompt.json").unlink()
    back = tmp_path / "back"
    assert linchain("import", run.path / "peft", "--out", back) == 0
    assert "prompt template: not recorded with it" in capsys.readouterr().out
    ask = ("generate", back, "x", "--max-new-tokens", "1")
    assert linchain(*ask) == 0
    assert "template chat, " in capsys.readouterr().err
    assert linchain("merge", back, "--no-proof") == 0
    assert not (back / "merged" / "linchain_prompt.json").exists()
    half = ("--weights", "0.5,0.5", "--as-adapter")
    assert linchain("merge", back, tmp_path / "known", *half, "--out", tmp_path / "sum") == 0
    assert "different templates" in capsys.readouterr().err
    recipe = (back / "recipe.yaml").read_text()
    (back / "recipe.yaml").write_text(recipe.replace("template: auto", "template: plain"))
    assert linchain(*ask) == 0
    assert f"template plain, as {back} was trained" in capsys.readouterr().err
    assert linchain("merge", back, "--no-proof", "--overwrite") == 0
    assert json.loads((back / "merged" / "linchain_prompt.json").read_bytes())["template"] == "plain"


def test_an_import_is_told_as_json_and_replaced_when_asked_to(make_run, base_of, capsys, tmp_path):
    run = make_run(base_of("llama"))
    linchain("export", run.path)
    capsys.readouterr()
    again = ("import", run.path / "peft", "--out", tmp_path / "back")
    assert linchain(*again, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["directory"], found["rank"], found["depth"]) == (str(tmp_path / "back"), 4, 0)
    assert (found["modules"], found["biases_dropped"]) == (14, [])
    assert found["base"] == load_adapter(tmp_path / "back" / "adapter").base
    before = files_of(tmp_path / "back")
    assert linchain(*again) == 2
    assert "Use --overwrite" in capsys.readouterr().err
    (tmp_path / "back" / "recipe.yaml").unlink()
    assert linchain(*again, "--overwrite") == 0
    assert files_of(tmp_path / "back").keys() == before.keys()


def test_an_imported_run_finds_its_base_from_elsewhere(make_run, base_of, capsys, tmp_path, monkeypatch):
    shutil.copytree(base_of("llama"), tmp_path / "here" / "base")
    run = make_run(base_of("llama"), targets=["q_proj"])
    linchain("export", run.path)
    monkeypatch.chdir(tmp_path / "here")
    assert linchain("import", run.path / "peft", "--out", "run", "--base", "base") == 0
    monkeypatch.chdir("/")
    assert linchain("merge", tmp_path / "here" / "run", "--no-proof") == 0


def test_import_without_the_base_at_hand(make_run, base_of, capsys, tmp_path):
    run = make_run(base_of("llama"))
    linchain("export", run.path)
    peft = tmp_path / "peft"
    shutil.copytree(run.path / "peft", peft)
    config = json.loads((peft / "adapter_config.json").read_bytes())
    (peft / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/where"}))
    assert linchain("import", peft, "--out", tmp_path / "back") == 0
    assert "modules were not checked" in capsys.readouterr().out
    assert load_adapter(tmp_path / "back" / "adapter").base == {
        "path": "some/where",
        "revision": None,
        "hash": None,
    }
    assert linchain("import", peft, "--out", tmp_path / "other", "--base", "some/where") == 2
    (peft / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert linchain("import", peft, "--out", tmp_path / "other") == 2
    assert "--base MODEL" in capsys.readouterr().err
    assert linchain("import", peft, "--out", tmp_path / "other", "--base", base_of("gpt2")) == 2
    assert "does not fit the base" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_import_drops_biases_only_when_asked(base_of, capsys, tmp_path):
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": torch.randn(4, 64), f"{path}.lora_B.weight": torch.randn(64, 4)}
    for place in range(3):
        tensors[f"{path}.lora_mixer.{place}.weight"] = torch.randn(4, 4)
        tensors[f"{path}.lora_mixer.{place}.bias"] = torch.randn(4)
    source = tmp_path / "authors"
    source.mkdir()
    torch.save(tensors, source / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_use_mixer": True, "mixer_num": 3}
    config["base_model_name_or_path"] = str(base_of("llama"))
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert linchain("import", source, "--out", tmp_path / "back") == 2
    assert re.search(r"the largest has norm \d.*--drop-bias", capsys.readouterr().err)
    assert linchain("import", source, "--out", tmp_path / "back", "--drop-bias") == 0
    assert "a chain of 3 links of rank 4" in capsys.readouterr().out
    (loss,) = RunDirectory(tmp_path / "back").read_status().imported["biases_dropped"]
    assert loss["norm"] > 0
    assert (
        yaml.safe_load((tmp_path / "back" / "recipe.yaml").read_text())["data"]["template"] == "llm-adapters"
    )
