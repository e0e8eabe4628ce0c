"""docs/data.md: its rows are rows, and its recipes are recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from linchain_cli.data.dataset import prepare_data
from linchain_cli.recipe import DataConfig
from linchain_cli.recipe.strict_yaml import parse

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.reasoning_content or '' }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sections() -> dict[str, list[str]]:
    """The rows below each heading, as they stand there."""
    parts = re.split(r"^### (.*)$", PAGE, flags=re.MULTILINE)
    found = {
        title: re.findall(r"^    (\{\".*\})$", text, flags=re.MULTILINE)
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: rows for title, rows in found.items() if rows}


@pytest.mark.parametrize("title", sections())
def test_every_example_is_trained_on(title, byte_level, data_config, tmp_path, monkeypatch):
    monkeypatch.setattr(byte_level, "chat_template", TOOLS)
    rows = sections()[title]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(json.loads(row)) + "\n", encoding="utf-8")
        prepared = prepare_data(data_config(str(path)), byte_level, cache_dir=tmp_path / "cache")
        assert prepared.report.kept == 1
        ids, supervised = prepared.train[len(prepared.train) - 1]
        learned = byte_level.decode(ids[supervised])
        assert "Is ice cold?" not in learned
        assert learned.endswith("</s>")


def test_its_recipes_can_be_read():
    blocks = re.findall(r"^    data:\n(?:^      ?.*\n)+", PAGE, flags=re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        document = parse("\n".join(line[4:] for line in block.splitlines()))
        assert not document.problems
        DataConfig(**document.value["data"])
