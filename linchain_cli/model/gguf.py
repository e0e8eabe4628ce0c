"""A .gguf file as a checkpoint directory in float32, converted once.

transformers reads GGUF only into memory, in seconds to minutes, and refuses to save what it read;
everything else in this project (hashing a base, merging into it, mapping its tensors) wants a
directory. The weights are written in float32, because that holds every dequantised value exactly.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.cache import cache_root, keep, remembered_sha256, remove_unused
from linchain_cli.directories import staged_directory
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.locks import locked
from linchain_cli.model.portable import make_portable
from linchain_cli.model.quiet import quiet
from linchain_cli.storage import make_directory, remove_staging

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def converted_gguf(path: Path) -> Path:
    """The cached checkpoint directory of a .gguf file, made on first use and found by name and content."""
    _check_gguf(path)
    target = cache_root() / "gguf" / f"{path.stem}-{remembered_sha256(path, cache_root())[:16]}"
    if not _is_converted(target):
        with _cache_problems(target):
            make_directory(target.parent)
            with locked(target, wait=None, needed=False):
                if not _is_converted(target):
                    remove_staging(target.parent, spare_living=True)
                    convert_gguf(path, target)
                    _is_converted(target)
            remove_unused(cache_root())
    return target


def _is_converted(target: Path) -> bool:
    """Whether the directory is there, which this process keeps from then on."""
    with contextlib.suppress(FileNotFoundError):
        return keep(target / "config.json")
    return False


def convert_gguf(path: Path, target: Path) -> None:
    """Writes a .gguf file's model, tokenizer and generation settings as a checkpoint directory.

    `target` appears only when it is complete. Raises InputError if the file is not a GGUF file, is
    damaged, or holds an architecture that transformers cannot read.
    """
    _check_gguf(path)
    logger.info("Converting %s to a float32 checkpoint, once: %s", path.name, target)
    started = time.monotonic()
    with (
        _cache_problems(target),
        staged_directory(target) as staging,
        quiet(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        _write_checkpoint(path, staging)
    logger.info("Converted in %.0f s.", time.monotonic() - started)


def _write_checkpoint(path: Path, staging: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the reader walks foreign bytes and raises whatever they lead it to
        raise InputError(f"{path} cannot be read as GGUF: {error or type(error).__name__}") from error
    # What was read is plain float32; the mark of its former format makes save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _restore_special_tokens(tokenizer, model.config)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    make_portable(staging)
    _make_readable(staging)


def _restore_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Takes the tokenizer's special tokens from the configuration, which holds the file's own ids.

    transformers 5.17 gives byte-level tokenizers the BOS token for EOS and drops the padding token.
    """
    for name in ("bos", "eos", "pad"):
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))


def _make_readable(directory: Path) -> None:
    """Gives files the permissions a plain `open` would: safetensors writes its files for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(
                (stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH)
                & ~umask
            )


def _check_gguf(path: Path) -> None:
    try:
        with open(path, "rb") as handle:
            magic = handle.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != MAGIC:
        raise InputError(
            f"{path} is not a GGUF file: it does not begin with the letters GGUF. Download it again."
        )
    if SPLIT.search(path.name):
        raise InputError(
            f"{path} is one part of a split GGUF model. Join the parts first: "
            f"llama-gguf-split --merge {path.name} {SPLIT.sub('.gguf', path.name)}"
        )


@contextlib.contextmanager
def _cache_problems(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LinchainError(
            f"The converted model cannot be written to {target}: {error.strerror or error}. Set"
            " LINCHAIN_CACHE to a directory that can be written and has room."
        ) from error
