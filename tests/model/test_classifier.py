"""What a classifier is given of a row: what transformers' own tokenizer would give it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.labelled_batches import collate_labelled
from linchain_cli.model.classifier import (
    padding,
    padding_side,
    reads_padding,
    row_logits,
    tells_segments,
)
from linchain_cli.recipe import DataConfig

from ..classifiers import make_encoder, pair_rows, write_rows

LENGTH = 24  # which some of the pairs have not, and some go beyond
WITH_SEGMENTS = ["input_ids", "token_type_ids", "attention_mask"]
WITHOUT = ["input_ids", "attention_mask"]


@pytest.mark.parametrize("names", [None, WITH_SEGMENTS, WITHOUT])
@pytest.mark.parametrize("kind", ["bert", "albert", "electra", "xlnet", "funnel"])
@torch.no_grad()
def test_pairs_are_read_as_transformers_reads_them(tmp_path: Path, monkeypatch, kind, names):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    model, tokenizer = make_encoder(kind, names)
    rows = pair_rows(6)
    section = DataConfig.model_validate(
        {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "validation": 0, "max_length": LENGTH}
    )
    data = prepare_data(section, tokenizer, task="classification")
    batch = collate_labelled(data.train, list(range(6)), padding(model, tokenizer))
    texts = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    theirs = tokenizer(*texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    expected = model(**theirs).logits
    torch.testing.assert_close(row_logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert ("token_type_ids" in theirs) == (batch.token_type_ids is not None)
    if names == WITH_SEGMENTS:
        without = model(input_ids=theirs["input_ids"], attention_mask=theirs["attention_mask"]).logits
        assert (expected - without).abs().max() > 1e-3  # so it would show if they were not given
    alone = [row_logits(model, collate_labelled(data.train, [number], 0)) for number in range(6)]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=1e-4, atol=1e-4)
    assert padding_side(model) == ("left" if kind == "xlnet" else "right")


def test_segments_are_for_models_that_have_them():
    from transformers import AutoConfig

    told = {
        kind: tells_segments(AutoConfig.for_model(kind))
        for kind in ("bert", "xlnet", "funnel", "gpt2", "llama", "deberta-v2", "xlm", "distilbert")
    }
    assert [kind for kind, tells in told.items() if tells] == ["bert", "xlnet", "funnel"]
    assert not tells_segments(AutoConfig.for_model("roberta", type_vocab_size=1))


@pytest.mark.parametrize(
    ("kind", "reads"),
    [("bert", False), ("electra", False), ("xlnet", False), ("funnel", False), ("convbert", True)],
)
def test_what_takes_padding_for_text_is_known(kind, reads):
    model, tokenizer = make_encoder(kind)
    assert reads_padding(model, padding(model, tokenizer)) is reads
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
