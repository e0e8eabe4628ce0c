"""What lies beside a merged checkpoint's weights: the base's configurations and tokenizer, copied, and
changed where they would mislead."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from linchain_cli import storage
from linchain_cli.data.asking import GENERATION_FILE
from linchain_cli.errors import InputError, first_line
from linchain_cli.export.output import copy_files
from linchain_cli.model.portable import make_portable
from linchain_cli.model.quiet import quiet

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer_config.json"
# Keys that say where a base was when it was saved.
_PLACES = {CONFIG_FILE: "_name_or_path", TOKENIZER_FILE: "name_or_path"}
# Settings of GPTQ's and AWQ's tools, which repeat what config.json says.
_OF_QUANTIZATION = ("quantize_config.json", "quant_config.json")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_companions(
    files: Iterable[Path],
    source: Path,
    directory: Path,
    dtype: torch.dtype | None,
    *,
    restored: str | None = None,
    own: Mapping[str, bytes] | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> list[str]:
    """Copies `files` of the base at `source`; returns what was changed, in sentences for people.

    Args:
        dtype: what the weights were recast to; None where they keep their types.
        restored: the method by which the base's weights were quantised, which they no longer are.
        own: files by name that come in place of the base's, or beside them.
        config: keys of config.json that are set, and make it no language model's: nothing generates with it.
        tokenizer: keys of tokenizer_config.json that are set.

    Raises:
        InputError: a configuration is no JSON object.
    """
    if restored is not None:
        files = [path for path in files if path.name not in _OF_QUANTIZATION]
    if config is not None:
        files = [path for path in files if path.name != GENERATION_FILE]
    copy_files(files, source, directory)
    for name, content in (own or {}).items():
        (directory / name).write_bytes(content)
    changes = []
    if restored is not None:
        dtype = dtype or torch.bfloat16
        _change(directory / CONFIG_FILE, _without_quantization)
        changes.append(
            f"the weights that the base holds quantised ({restored}) were restored to bfloat16 before ΔW was"
            " added; config.json names no quantization any more"
        )
    if config is not None:
        _change(directory / CONFIG_FILE, lambda stored: {**stored, **config})
    if tokenizer:
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            path.write_text("{}")
        _change(path, lambda stored: {**stored, **tokenizer})
    if dtype is not None:
        _change(directory / CONFIG_FILE, lambda config: _with_dtype(config, dtype))
    for name in _PLACES:
        _change(directory / name, dict)  # which reads it, and refuses what is no JSON
    make_portable(directory)
    for name, key in _PLACES.items():
        _change(directory / name, lambda config, key=key: _without_place(config, key))
    if note := _repair_generation(directory / GENERATION_FILE):
        changes.append(note)
    return changes


def _change(path: Path, change: Callable[[Any], Any]) -> None:
    """Writes what `change` makes of a JSON file, if that is another thing."""
    if not path.is_file():
        return
    before = _read(path)
    after = change(before)
    if after != before:
        path.write_bytes(storage.json_bytes(after))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"the base's {path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the base's {path.name} holds no JSON object")
    return content


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the type that the weights now have, wherever it names one."""
    name = str(dtype).removeprefix("torch.")

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        result = {key: changed(value) if isinstance(value, dict) else value for key, value in part.items()}
        return result | {key: name for key in ("dtype", "torch_dtype") if key in part}

    result = changed(config)
    return result if {"dtype", "torch_dtype"} & result.keys() else result | {"dtype": name}


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _without_place(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Without the directory that the base was loaded from, which is nobody's business and nobody's use."""
    place = config.get(key)
    if isinstance(place, str) and Path(place).is_absolute():
        return {other: value for other, value in config.items() if other != key}
    return config


def _repair_generation(path: Path) -> str | None:
    """Takes out of generation_config.json what transformers' `generate` would refuse; what was done."""
    if not path.is_file():
        return None
    content, vocabulary = _read(path), _vocabulary(path.parent)
    why = _refusal(content, vocabulary)
    if why is None:
        return None
    keys = [key for key in content if key not in (*_TOKENS, "transformers_version")]
    keys.sort(key=lambda key: key not in why)  # what the message names comes first
    for number in (1, 2):
        for left_out in itertools.combinations(keys, number):
            valid = {key: value for key, value in content.items() if key not in left_out}
            if _refusal(valid, vocabulary) is None:
                path.write_bytes(storage.json_bytes(valid))
                named = " and ".join(f"{key} ({content[key]!r})" for key in left_out)
                return f"the base's {path.name} is invalid ({why}); without {named} it is valid"
    valid = {key: content[key] for key in _TOKENS if _is_token(content.get(key))}
    path.write_bytes(storage.json_bytes(valid))
    return f"the base's {path.name} is invalid ({why}); only its special tokens were kept"


def _is_token(value: Any) -> bool:
    return isinstance(value, int) or isinstance(value, list) and all(type(one) is int for one in value)


def _refusal(content: dict[str, Any], vocabulary: int) -> str | None:
    """Why `generate` refuses these settings, tried with a model of next to nothing; None if it does not."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            settings = GenerationConfig.from_dict(dict(content))
            settings.validate()
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary)).eval()
            model.generate(torch.zeros(1, 2, dtype=torch.long), settings, max_new_tokens=2)
    except Exception as error:  # settings of a wrong type make it raise anything
        return first_line(error)
    return None


def _vocabulary(directory: Path) -> int:
    config = _read(directory / CONFIG_FILE)
    sizes = [part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)]
    return max([size for size in sizes if isinstance(size, int)], default=1 << 16)
