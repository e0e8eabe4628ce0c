"""Merging classifiers: base and head under the classifier's names, as transformers loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linchain_cli.chain import adapter_of, attach, inject, save_adapter
from linchain_cli.chain.files import Head
from linchain_cli.chain.head import head_of, initialise_head
from linchain_cli.chain.inject import ChainConfig
from linchain_cli.errors import InputError
from linchain_cli.export.card import Origin
from linchain_cli.export.classifier import empty_base, loading_of
from linchain_cli.export.merge import MergeOptions, merge_checkpoint
from linchain_cli.export.peft import write_peft
from linchain_cli.model.checkpoint import open_checkpoint
from linchain_cli.model.classifier import Outputs, drawn_names, head_names
from linchain_cli.model.config import text_decoder_prefix
from linchain_cli.model.hashing import base_hash
from linchain_cli.model.loading import load_model

from ..classifiers import KINDS, make_checkpoint

CLASSES = ("bad", "so so", "good")
PROMPTS = [[2, 5, 6, 3], [2, 7, 8, 9, 10, 3, 11, 3]]


def trained(base: Path, kind: str, classes=CLASSES):
    """An adapter with values that do something, and its model."""
    model = load_model(base, dtype="float32", device="cpu", outputs=Outputs(classes))
    names = head_names(model)
    initialise_head(model, drawn_names(model), seed=1, deviation=0.3)
    config = ChainConfig(rank=4, depth=2, alpha=8, target_modules=KINDS[kind][1])
    layers = inject(model, config, 1, text_decoder_prefix(model))
    torch.manual_seed(3)
    for layer in layers.values():
        layer.B.data.normal_(0, 0.3)
    about = {"path": str(base), "hash": base_hash(base)}
    return adapter_of(model, config, about, head_of(model, names, classes)), model


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, None) for kind in KINDS), ("bert", torch.bfloat16)])
def test_a_merged_classifier_is_what_was_trained(tmp_path, kind, dtype):
    from transformers import AutoModelForSequenceClassification

    base = make_checkpoint(kind, tmp_path / "base")
    adapter, model = trained(base, kind)
    options = MergeOptions(dtype=dtype, prompts=PROMPTS)
    result = merge_checkpoint(base, adapter, tmp_path / "merged", options, Origin(kind))
    assert result.receipt.logits.largest_difference < (1e-4 if dtype is None else 0.2)
    assert result.receipt.largest_ulp <= 0.51 and not result.receipt.not_proven
    assert result.receipt.tensors["head"] == len(adapter.head.tensors)

    merged, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(loading[kinds] for kinds in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.id2label == dict(enumerate(CLASSES))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        difference = (merged.float()(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert difference < (1e-4 if dtype is None else 0.2)
    own = json.loads((tmp_path / "merged/config.json").read_text())
    assert own["architectures"] == [type(model).__name__] and own["pad_token_id"] == 0
    assert not (tmp_path / "merged/generation_config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_chains_and_head(tmp_path, kind):
    """Rows of two lengths in one batch: a decoder's head has to know the padding, which GPT-2's config.json
    does not name."""
    from peft import AutoPeftModelForSequenceClassification

    base = make_checkpoint(kind, tmp_path / "base")
    adapter, model = trained(base, kind)
    proof = write_peft(adapter, empty_base(base, adapter.head), tmp_path / "peft")
    assert proof.modules == len(adapter.tensors) and not proof.not_proven
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert {name.split(".")[0] for name in config["modules_to_save"]} <= {
        "bert",
        "pooler",
        "classifier",
        "head",
        "score",
    }
    loading = loading_of(empty_base(base, adapter.head), adapter.head, base)
    assert loading.arguments == {"num_labels": 3} | ({"pad_token_id": 0} if kind == "gpt2" else {})
    place = tmp_path / "peft"
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(place, **loading.arguments).eval()
    short, long = PROMPTS
    batch = torch.tensor([short + [0] * (len(long) - len(short)), long])
    with torch.no_grad():
        found = loaded(input_ids=batch, attention_mask=(batch != 0).long()).logits
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in PROMPTS])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_a_merged_tokenizer_gives_what_the_model_was_trained_on(tmp_path, kind):
    """Rows that are cut, padding behind them, and no segment ids, which GPT-2 would take for words. Without a
    tokenizer_config.json, too."""
    from transformers import AutoTokenizer, pipeline

    base = make_checkpoint(kind, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter, model = trained(base, kind)
    options = MergeOptions(prompts=PROMPTS, max_length=8)
    result = merge_checkpoint(base, adapter, tmp_path / "merged", options, Origin(kind))
    for told in ("model_max_length is 8", "short rows on the right", "gives no segment ids"):
        assert any(told in change for change in result.receipt.changes), told
    read = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (read.model_max_length, read.padding_side) == (8, "right")
    classify = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")
    pairs = [("the cat sat", "a dog"), ("a dog ran on the mat", "under a tree near it"), ("rain", "fell")]
    told = classify(
        [dict(zip(("text", "text_pair"), pair, strict=True)) for pair in pairs],
        **{"batch_size": 3, "truncation": True, "top_k": None, "function_to_apply": "none"},
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    for found, pair in zip(told, pairs, strict=True):
        ids = tokenizer(*pair, truncation=True, max_length=8, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].tolist()
        scores = {one["label"]: one["score"] for one in found}
        assert [scores[name] for name in CLASSES] == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_without_a_configuration_gets_one(tmp_path):
    from transformers import AutoTokenizer

    base = make_checkpoint("bert", tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    adapter, _ = trained(base, "bert")
    merge_checkpoint(base, adapter, tmp_path / "merged", MergeOptions(max_length=8), Origin("bert"))
    read, before = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "merged", base))
    assert read.model_max_length == 8 and type(read) is type(before)
    assert read("the cat", "sat")["input_ids"] == before("the cat", "sat")["input_ids"]


def test_a_head_of_other_classes_is_replaced_where_peft_loads_the_base(tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    base = make_checkpoint("bert", tmp_path / "base")
    load_model(base, dtype="float32", device="cpu", outputs=Outputs(("a", "b"))).save_pretrained(base)
    adapter, _ = trained(base, "bert")
    write_peft(adapter, empty_base(base, adapter.head), tmp_path / "peft")
    loading = loading_of(empty_base(base, adapter.head), adapter.head, base)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft", **loading.arguments)
    weight = loaded.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
    assert torch.equal(weight, adapter.head.tensors["classifier.weight"])


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    """Without it no server of the merged checkpoint can batch rows."""
    from transformers import AutoTokenizer, pipeline

    base = make_checkpoint("gpt2", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "pad_token"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    adapter, _ = trained(base, "gpt2")
    options = MergeOptions(prompts=PROMPTS)
    result = merge_checkpoint(base, adapter, tmp_path / "merged", options, Origin("gpt2"))
    assert any("fills short rows with [PAD]" in change for change in result.receipt.changes)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[PAD]"
    classify = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")
    texts = ["the cat sat", "a dog ran on the mat under a tree"]
    batched, alone = classify(texts, batch_size=2, top_k=None), [classify(text, top_k=None) for text in texts]
    for ours, theirs in zip(batched, alone, strict=True):
        assert [one["label"] for one in ours] == [one["label"] for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


def test_a_head_that_is_no_module_of_its_own_is_refused(tmp_path):
    base = make_checkpoint("bert", tmp_path / "base")
    adapter, _ = trained(base, "bert")
    part = replace(adapter, head=replace(adapter.head, tensors={"classifier.bias": torch.zeros(3)}))
    with pytest.raises(
        InputError, match="'classifier.bias' of the head is no module of its own.*linchain merge"
    ):
        write_peft(part, empty_base(base, adapter.head), tmp_path / "peft")


def test_a_bare_encoder_gets_the_classifiers_names(tmp_path):
    """Other loaders add a prefix to all names or to none."""
    from transformers import AutoModel

    base = make_checkpoint("bert", tmp_path / "base")
    AutoModel.from_pretrained(base).save_pretrained(base)
    assert not any(key.startswith("bert.") for key in open_checkpoint(base).tensors)
    adapter, _ = trained(base, "bert")
    assert "bert.pooler.dense.weight" in adapter.head.tensors  # which the bare encoder has under another name
    merge_checkpoint(base, adapter, tmp_path / "merged", MergeOptions(prompts=PROMPTS), Origin("bert"))
    names = open_checkpoint(tmp_path / "merged").tensors
    assert {name.partition(".")[0] for name in names} == {"bert", "classifier"}


def test_what_a_classifier_has_no_use_for_is_left_out_and_told(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    adapter, _ = trained(base, "llama", classes=())
    result = merge_checkpoint(
        base, adapter, tmp_path / "merged", MergeOptions(prompts=PROMPTS), Origin("llama")
    )
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "merged").tensors
    assert any("left out: lm_head.weight" in change for change in result.receipt.changes)
    card = (tmp_path / "merged/README.md").read_text()
    assert "text-classification" in card and "AutoModelForSequenceClassification" in card


@pytest.mark.parametrize("recipe", [None, "data: {columns: {text: a, text_pair: b, label: c}}"])
def test_a_card_says_how_two_texts_become_one(tmp_path, tiny_llama_dir, recipe):
    adapter, _ = trained(tiny_llama_dir, "llama")
    origin = Origin("llama", recipe=recipe)
    merge_checkpoint(tiny_llama_dir, adapter, tmp_path / "merged", MergeOptions(), origin)
    card = (tmp_path / "merged/README.md").read_text()
    assert ('`f"{first}\\n{second}"`' in card) == (recipe is not None)


def test_a_head_that_does_not_fit_the_base_is_refused(tmp_path):
    base = make_checkpoint("bert", tmp_path / "base")
    adapter, _ = trained(base, "bert")
    wrong = Head({**adapter.head.tensors, "classifier.weight": torch.zeros(3, 7)}, CLASSES)
    from dataclasses import replace

    with pytest.raises(InputError, match="head does not fit: 'classifier.weight'"):
        merge_checkpoint(base, replace(adapter, head=wrong), tmp_path / "m", MergeOptions(), Origin("b"))
    assert not (tmp_path / "m").exists()


def test_a_damaged_head_is_found_by_the_proof(tmp_path, monkeypatch):
    from linchain_cli.errors import LinchainError
    from linchain_cli.export import sums

    base = make_checkpoint("bert", tmp_path / "base")
    adapter, _ = trained(base, "bert")
    before = sums._Given.__call__

    def spoilt(self):
        for count, make in before(self):
            yield count, lambda make=make: make() * (1.01 if self.key == "classifier.weight" else 1)

    monkeypatch.setattr(sums._Given, "__call__", spoilt)
    with pytest.raises(LinchainError, match="classifier.weight is off"):
        merge_checkpoint(base, adapter, tmp_path / "m", MergeOptions(), Origin("b"))
    assert not (tmp_path / "m").exists()


def test_an_attached_adapter_tells_what_the_trained_model_told(tmp_path):
    base = make_checkpoint("roberta", tmp_path / "base")
    adapter, model = trained(base, "roberta")
    save_adapter(adapter, tmp_path / "adapter")
    from linchain_cli.chain import load_adapter

    again = load_model(base, dtype="float32", device="cpu", outputs=Outputs(CLASSES))
    attach(again, load_adapter(tmp_path / "adapter"))
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
