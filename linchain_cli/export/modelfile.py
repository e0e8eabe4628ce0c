"""Ollama's Modelfile: which base, which adapter, and the prompt that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linchain_cli.data.templates import get_template
from linchain_cli.export.card import PublishedBase

MODEL_FILE = "Modelfile"
PROMPT = "{{ .Prompt }}"  # where Ollama puts what a user says


def modelfile(base: PublishedBase | None, template: str | Mapping[str, Any] | None, adapter: str) -> str:
    """The file's text. `template` is the recipe's `data.template`, None where it is not known."""
    place = f"./{base.name}" if base and base.is_gguf else "./base.gguf"
    named = base.name if base else "the base model"
    lines = [
        f"# The base as a GGUF file ({named}): put it here, or write its path, or what Ollama calls it.",
        "# llama.cpp's convert_hf_to_gguf.py makes one of a checkpoint directory.",
        f"FROM {place}",
        f"ADAPTER ./{adapter}",
    ]
    if prompt := _prompt(template):
        lines += ["# The prompt that the adapter was trained with.", f'TEMPLATE """{prompt}"""']
    else:
        lines += ["# The prompt comes from the base's own chat template."]
    return "\n".join(lines) + "\n"


class _Said(dict):
    """A row whose every column holds Ollama's placeholder once it is asked for."""

    def __missing__(self, column: str) -> str:
        self[column] = PROMPT
        return PROMPT


def _prompt(template: str | Mapping[str, Any] | None) -> str | None:
    """The template's prompt around Ollama's placeholder; None where it is the base's own or asks for more
    than one column."""
    if template is None or template == "chat":
        return None
    row = _Said()
    prompt = get_template(template, None).prompt(row)
    return prompt if len(row) == 1 and '"""' not in prompt else None
