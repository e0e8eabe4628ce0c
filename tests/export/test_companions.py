"""What lies beside merged weights: read alike by others, and settings with which `generate` works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from linchain_cli.errors import InputError
from linchain_cli.export.companions import write_companions
from linchain_cli.model.checkpoint import companion_files

from ..command_line import linchain


@pytest.fixture
def copied(tmp_path, tiny_llama_dir):
    """copied(name=content, …): the changes that were told, and the directory, for a base whose files were
    changed so."""

    def run(dtype: torch.dtype | None = None, **files) -> tuple[list[str], Path]:
        base, out = tmp_path / "base", tmp_path / "out"
        shutil.copytree(tiny_llama_dir, base)
        out.mkdir()
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (base / f"{name}.json").write_text(text)
        return write_companions(companion_files(base), base, out, dtype), out

    return run


def test_older_readers_find_their_names(copied, tiny_llama_dir):
    changes, out = copied()
    assert not changes, "what everybody reads alike needs no telling"
    config = json.loads((out / "config.json").read_bytes())
    assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == config["dtype"] == "float32"
    assert (out / "tokenizer.json").read_bytes() == (tiny_llama_dir / "tokenizer.json").read_bytes()


def test_a_recast_is_named_in_both_forms(copied):
    _, out = copied(torch.bfloat16)
    config = json.loads((out / "config.json").read_bytes())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_the_bases_old_place_is_not_copied(copied, tiny_llama_dir):
    config = json.loads((tiny_llama_dir / "config.json").read_bytes())
    _, out = copied(config={**config, "_name_or_path": "/home/me/models/x"})
    assert "/home" not in (out / "config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"num_return_sequences": 3, "do_sample": False}, ["num_return_sequences"]),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, ["temperature"]),
        ({"max_new_tokens": -1, "num_beams": "x"}, ["max_new_tokens", "num_beams"]),
        ({"num_beams": "four"}, ["num_beams"]),
        ({"temperature": 0.7, "top_p": 0.9}, []),
        ({"do_sample": True, "num_return_sequences": 3}, []),
    ],
)
def test_settings_that_generate_refuses_are_left_out_and_told(copied, settings, left_out):
    settings = {"eos_token_id": 2, "pad_token_id": 0, **settings}
    changes, out = copied(generation_config=settings)
    found = json.loads((out / "generation_config.json").read_bytes())
    assert found == {key: value for key, value in settings.items() if key not in left_out}
    assert len(changes) == bool(left_out)
    for name in left_out:
        assert f"{name} ({settings[name]!r})" in changes[0]


def test_settings_beyond_repair_keep_their_special_tokens(copied):
    changes, out = copied(generation_config={"eos_token_id": "two", "pad_token_id": 0, "top_k": 3})
    assert json.loads((out / "generation_config.json").read_bytes()) == {"pad_token_id": 0}
    assert "only its special tokens were kept" in changes[0]


def test_files_that_are_no_json_are_named(copied):
    with pytest.raises(InputError, match="generation_config.json is not valid JSON"):
        copied(generation_config="{")


@pytest.mark.parametrize("name", ["config", "tokenizer_config"])
def test_configurations_that_are_no_json_are_named(copied, name):
    with pytest.raises(InputError, match=f"base's {name}.json holds no JSON object"):
        copied(**{name: "[]"})


def test_a_merge_says_what_it_repaired_and_proves_generate(make_run, checkpoint, capsys):
    settings = {"eos_token_id": 2, "pad_token_id": 0, "num_return_sequences": 3}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    run = make_run(checkpoint, targets=["q_proj"])
    assert linchain("merge", run.path) == 0
    told = capsys.readouterr().out
    assert "changed: the base's generation_config.json is invalid" in told
    assert "without num_return_sequences (3) it is valid" in told and "generate runs with" in told
    receipt = json.loads((run.path / "merged" / "merge.json").read_bytes())
    assert receipt["generated"] > 0 and receipt["changes"] and not receipt["not_proven"]
