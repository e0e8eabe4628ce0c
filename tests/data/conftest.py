"""Small tokenizers of the kinds that models come with, each trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linchain_cli.data.dataset import prepare_data

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.",
    "### Instruction:\nPlease answer the question with true or false\n\n### Input:\n\n### Response:\n",
    "the correct answer is true", "the correct answer is answer12",
    "She has 16 apples, 4.5 pears.\nA: 20 # four",
    "user assistant system What is two and two? It is four.", "naïve café 東京 🙂 — “quotes”",
]  # fmt: skip


def _byte_level(trim_offsets: bool, end: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    last = processors.TemplateProcessing("<s> $A" + (" </s>" if end else ""), None, [("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), last])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def _sentencepiece():
    """As Llama 2: no pre-tokenizer, a space in front of the text, bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _unigram():
    """As T5 and XLM: Metaspace with a prefix space, and an EOS that the tokenizer adds itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"}


def _wordpiece():
    """As BERT: lower case, no accents, white space dropped, [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer, {"eos_token": "[SEP]", "bos_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


_BUILD = {
    "byte-level": lambda: _byte_level(trim_offsets=False),
    "byte-level-trimmed": lambda: _byte_level(trim_offsets=True),
    "byte-level-adds-eos": lambda: _byte_level(trim_offsets=False, end=True),
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict:
    from transformers import PreTrainedTokenizerFast

    made = {}
    for kind, build in _BUILD.items():
        tokenizer, special = build()
        made[kind] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, chat_template=CHATML)
    return made


@pytest.fixture(params=list(_BUILD))
def tokenizer(request: pytest.FixtureRequest, tokenizers_by_kind: dict):
    """Each kind of tokenizer in turn."""
    return tokenizers_by_kind[request.param]


@pytest.fixture
def byte_level(tokenizers_by_kind: dict):
    """Byte-level BPE that puts <s> in front; pad is eos (</s>)."""
    return tokenizers_by_kind["byte-level"]


@pytest.fixture
def data_config():
    """`data_config(train, **fields)`: a recipe's data section, without validation unless given."""
    from linchain_cli.recipe import DataConfig

    return lambda train, **fields: DataConfig(**{"train": train, "validation": 0, **fields})


@pytest.fixture
def source():
    """`source(path, columns)`: what a recipe says of one source."""
    from linchain_cli.recipe import SourceConfig

    return lambda path, **fields: SourceConfig(path=str(path), **fields)


@pytest.fixture
def write(tmp_path: Path):
    """`write(name, content)`: a file in a temporary directory; its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def rows(commonsense_rows):
    return commonsense_rows(50)


@pytest.fixture
def train(write, rows) -> str:
    return str(write("train.json", json.dumps(rows)))


@pytest.fixture
def prepare(tmp_path, byte_level, data_config):
    """`prepare(train, **fields)`: prepares with the byte-level tokenizer and a cache of the test's own."""

    def call(train, tokenizer=byte_level, **fields):
        return prepare_data(data_config(train, **fields), tokenizer, cache_dir=tmp_path / "cache")

    return call
