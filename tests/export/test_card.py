"""Model cards: what they tell others of the base, and how to load what they describe."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import yaml

from linchain_cli.chain import Adapter, ChainConfig, ChainTensors
from linchain_cli.export.card import Origin, PublishedBase, model_card
from linchain_cli.model.config import auto_class
from linchain_cli.result_files import Line, TaskScore

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def adapter() -> Adapter:
    chain = ChainTensors(torch.zeros(2, 4), torch.zeros(0, 2, 2), torch.zeros(4, 2))
    return Adapter(ChainConfig(rank=2, depth=0, alpha=4.0), {"a.q_proj": chain}, {"hash": None})


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def snippet(card: str) -> str:
    code = card.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    return code


def test_bases_are_named_as_others_know_them(tmp_path):
    cache = tmp_path / "hub" / "models--org--some--name" / "snapshots" / COMMIT
    assert PublishedBase.at(cache) == PublishedBase.on_hub("org/some--name", COMMIT)
    local = PublishedBase.at(tmp_path / "models" / "base")
    assert (local.name, local.hub_id, local.path) == ("base", None, str(tmp_path / "models" / "base"))
    assert PublishedBase.at(tmp_path / "tiny.gguf").is_gguf
    assert not PublishedBase.on_hub("org/x.gguf").is_gguf


@pytest.mark.parametrize("kind", ["merged", "peft", "gguf"])
def test_only_a_model_of_the_hub_is_a_base_model(adapter, kind):
    for base, named in (
        (PublishedBase.on_hub("org/name", COMMIT), "org/name"),
        (PublishedBase("models/base"), None),
        (None, None),
    ):
        card = model_card(kind, adapter, Origin("x", base), {}, "AutoModelForCausalLM")
        assert front(card).get("base_model") == named


def test_the_snippet_loads_the_bases_class(adapter):
    from transformers import Llama4Config, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

    for config, reader in (
        (LlamaConfig(), "AutoTokenizer"),
        (Qwen2_5_VLConfig(), "AutoProcessor"),
        (LlavaConfig(), "AutoProcessor"),
        (Llama4Config(), "AutoProcessor"),
    ):
        name = auto_class(config).__name__
        for kind in ("merged", "peft"):
            card = model_card(kind, adapter, Origin("x", PublishedBase.on_hub("org/name")), {}, name)
            code = snippet(card)
            assert f"{name}.from_pretrained(" in code and f"{reader}.from_pretrained(" in code
            pipeline = "text-generation" if reader == "AutoTokenizer" else "image-text-to-text"
            assert front(card)["pipeline_tag"] == pipeline


def test_a_gguf_base_is_loaded_as_one(adapter, tmp_path):
    origin = Origin("x", PublishedBase.at(tmp_path / "tiny.gguf"))
    code = snippet(model_card("peft", adapter, origin, {}, "AutoModelForCausalLM"))
    assert 'from_pretrained("path/of/its/directory", gguf_file="tiny.gguf")' in code


def test_paths_of_the_machine_are_cut(adapter):
    recipe = "name: a\noutput_dir: /home/me/runs\ndata:\n  train: [~/rows.jsonl, commonsense170k]\n"
    score = TaskScore(accuracy=0.5, n=4)
    measured = tuple(
        Line(task, "classification", score, Path("x.json"), "present")
        for task in ("/home/me/dev.csv", "glue/rte")
    )
    origin = Origin("x", recipe=recipe, data=("/home/me/rows.jsonl", "org/rows"), results=measured)
    card = model_card("merged", adapter, origin, {}, "AutoModelForCausalLM")
    assert "/home" not in card and "~" not in card
    assert "| dev.csv | 50.00 |" in card and "| glue/rte | 50.00 |" in card
    assert "- `rows.jsonl`\n- `org/rows`" in card and "- commonsense170k" in card
