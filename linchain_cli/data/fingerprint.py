"""What an encoding depends on, as one hash; and hashes of large files that need not be read twice."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.data.encoding import serialized_tokenizer
from linchain_cli.data.rows import Template
from linchain_cli.data.sources import Source, generated_rows
from linchain_cli.storage import sha256_bytes, sha256_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A file that changed this recently may change again within the clock's resolution, and look the same.
_SETTLED_AFTER = 2.0  # seconds


def encoding_fingerprint(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: dict[str, Any],
    cache_dir: Path,
) -> str:
    """64 hexadecimal digits of the sources' content, the tokenizer, the template and `settings`."""
    import tokenizers

    parts = {
        "sources": [_source_parts(source, cache_dir) for source in sources],
        "tokenizer": sha256_bytes(_without_state(serialized_tokenizer(tokenizer)).encode()),
        "tokenizers": tokenizers.__version__,
        "eos": tokenizer.eos_token_id,
        "template": template.fingerprint,
        "adds_bos": template.adds_bos,
        "settings": settings,
    }
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


def _without_state(serialized: str) -> str:
    """The tokenizer without padding and truncation, which each call of it may set anew."""
    start = serialized.find('"added_tokens"')
    return serialized[start:] if start > 0 else serialized


def _source_parts(source: Source, cache_dir: Path) -> dict[str, Any]:
    """Everything about a source that its rows depend on. Its path is no part of it."""
    parts: dict[str, Any] = {"kind": source.kind, "columns": sorted(source.columns.items())}
    if source.kind == "file":
        path = Path(source.location)
        return {**parts, "format": path.suffix.lower(), "content": file_hash(path, cache_dir)}
    parts["split"] = source.split
    if source.kind == "generated":
        return {**parts, "content": sha256_bytes(json.dumps(generated_rows(source)).encode())}
    from linchain_cli.data.hub import content_of, load_hub_dataset

    content = content_of(load_hub_dataset(source.location, source.split, source.revision))
    return {
        **parts,
        "content": [file_hash(Path(name), cache_dir) if os.path.isfile(name) else name for name in content],
    }


def file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file, remembered in `cache_dir` for as long as its size, times and inode stay the same."""
    status = os.stat(path)
    seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    note = cache_dir / "hashes" / f"{sha256_bytes(os.fsencode(path.resolve()))[:32]}.json"
    try:
        known = json.loads(note.read_bytes())
        if known["status"] == seen:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or damaged: hash the file again
    digest = sha256_file(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_AFTER:
        with contextlib.suppress(OSError):  # it only saves time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path.resolve()), "status": seen, "sha256": digest})
    return digest
