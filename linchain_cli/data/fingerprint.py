"""What an encoding depends on, as one hash."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.cache import remembered_sha256
from linchain_cli.data.encoding import serialized_tokenizer
from linchain_cli.data.reading import hub_dataset
from linchain_cli.data.rows import Template
from linchain_cli.data.sources import Source
from linchain_cli.data.streams import ending
from linchain_cli.storage import sha256_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encoding_fingerprint(
    sources: Sequence[tuple[Source, Template]],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    cache_dir: Path,
) -> str:
    """64 hexadecimal digits of the sources' content, their templates, the tokenizer and `settings`."""
    import tokenizers

    templates = [(template.fingerprint, template.adds_bos) for _, template in sources]
    shared = templates[0] if len(set(templates)) == 1 else None
    parts = {
        "sources": [_source_parts(source, cache_dir) for source, _ in sources],
        "tokenizer": tokenizer_sha256(tokenizer),
        "tokenizers": tokenizers.__version__,
        "eos": tokenizer.eos_token_id,
        "template": shared[0] if shared else [fingerprint for fingerprint, _ in templates],
        "adds_bos": shared[1] if shared else [adds_bos for _, adds_bos in templates],
        "settings": settings,
    }
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells one tokenizer from another: `tokenizers-<version>:<64 digits>`. The library's version stands
    in it because another one may write the same tokenizer otherwise."""
    import tokenizers

    return f"tokenizers-{tokenizers.__version__}:{tokenizer_sha256(tokenizer)}"


def is_other_tokenizer(tokenizer: PreTrainedTokenizerBase, wanted: str) -> bool:
    """Whether the tokenizer is certainly not the one whose hash is `wanted`."""
    found = tokenizer_hash(tokenizer)
    return found != wanted and found.partition(":")[0] == wanted.partition(":")[0]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the tokenizer as this version of its library writes it."""
    return sha256_bytes(_without_state(serialized_tokenizer(tokenizer)).encode())


def _without_state(serialized: str) -> str:
    """The tokenizer without padding and truncation, which each call of it may set anew."""
    start = serialized.find('"added_tokens"')
    return serialized[start:] if start > 0 else serialized


def _source_parts(source: Source, cache_dir: Path) -> dict[str, Any]:
    """Everything about a source that its rows depend on. Its path is no part of it."""
    parts: dict[str, Any] = {"columns": sorted(source.columns.items())}
    if source.max_rows is not None:
        parts["max_rows"] = source.max_rows
    if source.glue:
        parts["glue"] = source.glue
    if source.labels:
        parts["labels"] = sorted(source.labels.items())
    if file := source.single_file:
        form, content = "".join(ending(file.path.name)), remembered_sha256(file.path, cache_dir)
        return {**parts, "kind": "file", "format": form, "content": content}
    parts |= {"kind": source.kind, "split": source.split or "train"}
    if source.kind == "generated":
        from linchain_cli.data.everyday import everyday_rows

        return {**parts, "content": sha256_bytes(json.dumps(everyday_rows(parts["split"])).encode())}
    return {**parts, "content": _content(source, cache_dir)}


def _content(source: Source, cache_dir: Path) -> Any:
    """What identifies the rows of a source: its files, split by split, or those of the data set."""
    if source.files is not None:
        return {
            split: [
                ["".join(ending(file.path.name)), remembered_sha256(file.path, cache_dir)] for file in files
            ]
            for split, files in source.files.splits.items()
        }
    from linchain_cli.data.hub import content_of, load_saved

    saved = load_saved(source.location).values() if source.kind == "saved" else [hub_dataset(source)]
    names = [name for dataset in saved for name in content_of(dataset)]
    return [remembered_sha256(Path(name), cache_dir) if os.path.isfile(name) else name for name in names]
