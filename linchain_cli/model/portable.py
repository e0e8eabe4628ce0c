"""Configuration files that readers of transformers 4's names and of transformers 5's read alike.

What transformers 5 writes misleads older readers without a word: they find no `rope_theta` where the base of
the rotary embeddings is in `rope_parameters` alone, and take 10,000 (transformers 4, mlx-lm, the converters
of llama.cpp and Ollama); they know no tokenizer class `TokenizersBackend`. So both forms are written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linchain_cli import storage
from linchain_cli.model.quiet import quiet

# What transformers 4 calls the parts of `rope_parameters`, where it is not the usual name: of models with one
# set of them, and of models with one for full and one for sliding attention.
_ROPE_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
}
_LOCAL_BASE = "rope_local_base_freq"

# How the saving process had reached its files; nothing about the tokenizer.
_TOKENIZER_STATE = ("backend", "is_local", "local_files_only")


def make_portable(directory: Path) -> None:
    """Adds to config.json and tokenizer_config.json what older readers want. A file that lacks nothing keeps
    its bytes."""
    for name, change in (("config.json", portable_config), ("tokenizer_config.json", portable_tokenizer)):
        path = directory / name
        if not path.is_file():
            continue
        before = json.loads(path.read_bytes())
        after = change(before)
        if after != before:
            storage.write_atomic(path, storage.json_bytes(after))


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with transformers 4's names beside transformers 5's: `torch_dtype`, `rope_theta`,
    `rope_scaling`.

    Names for the rotary embeddings are added only where transformers 5 still reads the same from it.
    """
    both = _with_both(config, str(config.get("model_type", "")))
    if _rope_as_read(both) == _rope_as_read(config):
        return both
    return _with_both(config, None)


def _with_both(part: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """`part` and the parts within it (a text decoder's, a vision tower's); `kind` None leaves RoPE alone."""
    result = {}
    for key, value in part.items():
        if isinstance(value, dict) and key != "rope_parameters":
            value = _with_both(value, kind and str(value.get("model_type", "")))
        result[key] = value
        if key == "dtype" and isinstance(value, str):
            result.setdefault("torch_dtype", part.get("torch_dtype", value))
    if kind is not None and isinstance(part.get("rope_parameters"), dict):
        for key, value in _old_rope_names(part["rope_parameters"], kind).items():
            result.setdefault(key, value)
    return result


def _old_rope_names(parameters: Mapping[str, Any], kind: str) -> dict[str, Any]:
    names = _ROPE_NAMES.get(kind, {})
    by_layer = isinstance(parameters.get("full_attention"), dict)
    whole = parameters["full_attention"] if by_layer else parameters
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in whole:
            found[names.get(key, key)] = whole[key]
    sliding = parameters.get("sliding_attention") if by_layer else None
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        found[names.get("local", _LOCAL_BASE)] = sliding["rope_theta"]
    scaling = {key: whole[key] for key in whole if key not in ("rope_theta", "partial_rotary_factor")}
    found["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return found


def _rope_as_read(config: Mapping[str, Any]) -> Any:
    """`rope_parameters` of a configuration and of the parts within it, as transformers reads them."""
    from transformers import CONFIG_MAPPING

    def parameters(part: Mapping[str, Any]) -> dict[str, Any]:
        inner = {key: parameters(value) for key, value in part.items() if key.endswith("_config") and value}
        return {"own": part.get("rope_parameters"), **inner}

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of some classes, that the old name is an old one
            read = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
        return parameters(read.to_dict())
    except Exception as error:  # a configuration that cannot be read is nobody's here
        return repr(error)


def portable_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class that transformers 4 knows as well, and without the state of the
    process that saved it."""
    result = {key: value for key, value in config.items() if key not in _TOKENIZER_STATE}
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4's class would give token types as well, which `generate` of a decoder refuses.
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(result.get("extra_special_tokens"), list):
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    return result
