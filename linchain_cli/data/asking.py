"""How a model was taught to be asked, and where to stop: what travels with its weights.

A run knows it from its recipe. A merged or exported checkpoint has it in a file of its own, and where other
tools look: the chat template beside the tokenizer, the end tokens in generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from linchain_cli import storage
from linchain_cli.data.templates import end_tokens, get_template
from linchain_cli.errors import InputError
from linchain_cli.records import read_record, record_bytes, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.data.rows import Row, Template
    from linchain_cli.recipe import ChatConfig, DataConfig

ASKING_FILE = "linchain_prompt.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What prompts went through in training.

    template: a template's name, or its prompt, response and prompt_no_input
    chat_template: the Jinja source of conversations, where it was not the base's own
    options, system: of conversations
    turns: which of a conversation's answers were learned
    straddles: whether the first token of an answer held the end of its prompt in most rows; None: not known
    """

    FORMAT: ClassVar[str] = "linchain prompt"
    VERSION: ClassVar[int] = 1

    template: str | dict[str, str | None]
    chat_template: str | None = None
    options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    system: str | None = None
    turns: str = "all"
    straddles: bool | None = None

    def chat_config(self) -> ChatConfig:
        """The settings of the template `chat`."""
        from linchain_cli.recipe import ChatConfig

        # The source is checked where it is used: it need not be a file, as in a recipe.
        return ChatConfig.model_construct(
            template=self.chat_template, options=self.options, system=self.system
        )


def asking_of(data: DataConfig, rows: Mapping[str, Any] | None = None) -> Asking:
    """As a recipe's data section has it; `rows` are the counts of the rows that were trained on."""
    template = data.template
    return Asking(
        template=template if isinstance(template, str) else template.model_dump(),
        chat_template=data.chat.template,
        options=dict(data.chat.options),
        system=data.chat.system,
        turns=data.turns,
        straddles=straddle_mostly(rows or {}),
    )


def straddle_mostly(rows: Mapping[str, Any]) -> bool | None:
    """Whether in most of the kept rows a token lay on both sides of the prompt's end; None without counts."""
    straddling, kept = rows.get("straddling_rows"), rows.get("kept")
    return None if straddling is None or not kept else 2 * straddling >= kept


def read_asking(directory: Path) -> Asking | None:
    """What a checkpoint's directory says of it; None if it says nothing.

    Raises:
        InputError: its file is damaged.
    """
    path = directory / ASKING_FILE
    return read_record(path, Asking) if path.is_file() else None


def write_asking(asking: Asking, directory: Path) -> None:
    """Leaves the record where `read_asking` finds it."""
    write_record(directory / ASKING_FILE, asking)


def template_of_asking(
    asking: Asking, tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> Template:
    """The template, or the one of another `name` with the same settings of conversations."""
    return get_template(name or asking.template, tokenizer, asking.chat_config(), asking.turns)


def to_be_sent_along(asking: Asking, template_travels: bool) -> list[str]:
    """What of conversations was said in training by no file that other programs read: whoever serves the
    model has to send it with each question.

    Args:
        template_travels: whether the chat template is written beside the weights.
    """
    if asking.template != "chat":
        return []
    options = json.dumps(asking.options, ensure_ascii=False)
    found = {
        "a chat template of its own (data.chat.template)": asking.chat_template and not template_travels,
        f"chat_template_kwargs {options} (data.chat.options)": asking.options,
        "a system prompt (data.chat.system)": asking.system,
    }
    return [what for what, is_said in found.items() if is_said]


def question(template: Template, text: str) -> Row:
    """The row that asks `text`: as the instruction, or as the one column that the template's prompt needs.

    Raises:
        InputError: it needs several.
    """
    needed = [
        tuple(name for name in layout.required if name not in layout.answer) for layout in template.layouts
    ]
    if any("instruction" in names for names in needed):
        return {"instruction": text, "input": ""}
    if len(needed[0]) != 1:
        columns = " ".join(f"--column {name}=VALUE" for name in needed[0])
        raise InputError(
            f"the template asks for {len(needed[0])} columns: give them to linchain generate, {columns}"
        )
    return {needed[0][0]: text}


def travelling_files(
    asking: Asking,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    base_directory: Path,
) -> dict[str, bytes]:
    """The files, by name, that a checkpoint of this training needs beside the base's to be asked as it was.

    Raises:
        InputError: the base's generation_config.json is damaged.
    """
    files = {ASKING_FILE: record_bytes(asking)}
    settings = _read_json(base_directory / GENERATION_FILE)
    if settings is None:
        config = _read_json(base_directory / "config.json") or {}
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {key: config[key] for key in ids if config.get(key) is not None}
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    ends = list(dict.fromkeys([*known, *end_tokens(template, tokenizer)]))
    if ends != known:
        files[GENERATION_FILE] = storage.json_bytes({**settings, "eos_token_id": ends})
    return files


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
