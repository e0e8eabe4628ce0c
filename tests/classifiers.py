"""Tiny encoders and decoders to classify with, and rows that a few steps learn to tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    "the cat dog sat ran on under a mat tree and saw no bird near it while rain fell it was good bad".split()
)
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Model type: what its configuration needs, and which of its modules get a chain.
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": ({**_ENCODER, "hidden_dropout_prob": 0.1}, ["query", "value", "intermediate.dense"]),
    "roberta": ({**_ENCODER, "type_vocab_size": 1}, ["query", "value", "intermediate.dense"]),
    "deberta-v2": (
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        ["query_proj", "key_proj", "value_proj", "intermediate.dense"],
    ),
    "modernbert": (
        {
            **_ENCODER,
            "global_attn_every_n_layers": 2,
            "local_attention": 16,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
        ["Wqkv", "Wi"],
    ),
    "llama": ({**_ENCODER, "num_key_value_heads": 2}, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3},
        ["c_attn"],
    ),
}


def make_checkpoint(kind: str, directory: Path) -> Path:
    """A random checkpoint (seed 0, float32) of a model type: as it is published, without a classifier's head,
    and with a WordPiece tokenizer that joins pairs as BERT's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertTokenizer

    fields, _ = KINDS[kind]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    config = AutoConfig.for_model(kind, vocab_size=len(vocabulary), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = AutoModelForCausalLM if kind in ("llama", "gpt2") else AutoModelForMaskedLM
        build.from_config(config, dtype=torch.float32).save_pretrained(directory)
    file = directory / "words.txt"
    file.write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(file), model_max_length=60)
    tokenizer.save_pretrained(directory)
    file.unlink()
    return directory


def make_encoder(kind: str, names: list[str] | None = None) -> tuple[Any, Any]:
    """A random classifier of that kind, in whose attention everything weighs, and its own kind of tokenizer,
    which gives `names`."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        BertTokenizer,
        FunnelTokenizer,
        XLNetTokenizer,
    )

    own = {} if names is None else {"model_input_names": names}
    words = list(dict.fromkeys(WORDS))
    specials = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>", "<eop>", "<eod>"]
    if kind == "xlnet":
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40, "pad_token_id": 0}
        pieces = [(word, 0.0) for word in specials] + [(f"▁{word}", -1.0) for word in words]
        tokenizer = XLNetTokenizer(vocab=pieces, unk_id=1, **own)
    elif kind == "funnel":
        sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 40, "block_sizes": [1, 1]}
        vocabulary = {word: number for number, word in enumerate([*specials, *words])}
        tokenizer = FunnelTokenizer(vocab=vocabulary, **own)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
        sizes |= {"embedding_size": 16} if kind == "albert" else {}
        vocabulary = {
            word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])
        }
        tokenizer = BertTokenizer(vocab=vocabulary, **own)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    return model, tokenizer


def pair_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows that are `good` where their second text names the first one's animal, else `bad`; of many
    lengths."""
    rows = []
    for number in range(first, first + count):
        animal, other = (("cat", "dog"), ("dog", "cat"))[number % 2]
        same = number % 3 != 0
        place = "the mat and the tree " * (number % 4)
        rows.append(
            {
                "sentence1": f"the {animal} sat near {place}",
                "sentence2": f"a {animal if same else other} ran",
                "label": "good" if same else "bad",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
