"""What the documents say of the source tree."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def anchors(text: str) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    folders = "linchain_cli|tests|docs|scripts|configs"
    named = set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", PAGES[page]))
    assert page != "docs/contributing.md" or len(named) > 10
    assert not {name for name in named if not (ROOT / name).exists()}


def commands() -> dict[str, set[str]]:
    """The options of each command, those of the commands below it among them."""
    from typer.main import get_command

    from linchain_cli.cli import app

    found = {}
    for name, command in get_command(app).commands.items():
        parts = (command, *getattr(command, "commands", {}).values())
        found[name] = {option for part in parts for field in part.params for option in field.opts}
    return found


def code(text: str) -> list[str]:
    """Lines of blocks, and what stands in backquotes within the text."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    return [*"\n".join(fenced).splitlines(), *indented, *re.findall(r"`([^`\n]+)`", text)]


OF_ALL = {"--debug", "--quiet", "-q", "--help", "-h"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_are_named(page):
    known = commands()
    for line in code(PAGES[page]):
        words = re.split(r" {3,}|#", line)[0].split()
        if words[:1] != ["linchain"] or not re.match("[a-z]", " ".join(words[1:])):  # COMMAND stands for any
            continue
        assert words[1] in known, line
        options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(words[2:])))
        assert options <= known[words[1]] | OF_ALL, line


def keys(model: type, prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        found.add(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_recipe_keys_that_are_named_are_keys(page):
    from linchain_cli.recipe import Recipe

    sections = "|".join(Recipe.model_fields)
    text = re.sub(r"```\nmy-run.yaml has 2 problems.*?```", "", PAGES[page], flags=re.DOTALL)
    named = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-zA-Z_]+(?:\.[a-zA-Z_]+)*)", text))
    files = {name for name in named if name.endswith((".md", ".py", ".gguf", ".json", ".yaml"))}
    assert not named - files - keys(Recipe)


def test_the_memory_table_is_what_check_predicts():
    """Its smallest model, whose cells take a few seconds; `make docs` writes all of it."""
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "scripts" / "memory_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for quantization, name in (("none", "bfloat16"), ("nf4", "nf4")):
        cells = [script.cell(script.predicted("1 B", quantization, 8, *script.COLUMNS["2,048"]))]
        (row,) = (line for line in page.splitlines() if line.startswith(f"| 1 B | {name} | 8 |"))
        assert row.split(" | ")[3 + list(script.COLUMNS).index("2,048")] == cells[0]
