"""Tokenizers of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.errors import InputError, first_line
from linchain_cli.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. It must be a fast one, because supervision masks need character offsets.

    It is left as stored: a tokenizer without a pad token stays without one.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "spm.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(
            f"{directory} holds no tokenizer (tokenizer.json). Copy the model's tokenizer files into it."
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        raise InputError(f"{directory}: the tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{directory}: {type(tokenizer).__name__} is a slow tokenizer without character offsets. "
            "Use a checkpoint that carries a tokenizer.json."
        )
    if len(tokenizer) == 0:
        raise InputError(f"{directory}: the tokenizer is empty. Copy the model's tokenizer files again.")
    return tokenizer
