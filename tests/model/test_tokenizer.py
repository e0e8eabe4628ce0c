"""Tokenizers that are SentencePiece models (DeBERTa-v3 brings nothing else)."""

from __future__ import annotations

import json

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from linchain_cli.model.tokenizer import load_tokenizer


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return tmp_path


def test_pairs_are_encoded_with_segments(directory):
    proto = ModelProto()
    pieces = {"[PAD]": 3, "[CLS]": 3, "[SEP]": 3, "[UNK]": 2}  # 3: control tokens, 2: the unknown one
    for score, (piece, kind) in enumerate((pieces | dict.fromkeys(["▁the", "▁cat", "▁a", "▁"], 1)).items()):
        added = proto.pieces.add()
        added.piece, added.score, added.type = piece, -float(score), kind
    proto.trainer_spec.unk_id = 3
    (directory / "spm.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(directory)
    found = tokenizer("the cat", "a cat")
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert tokens == ["[CLS]", "▁the", "▁cat", "[SEP]", "▁a", "▁cat", "[SEP]"]
    assert found["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
