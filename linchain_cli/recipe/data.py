"""The recipe's data section: sources of rows, and how rows become text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES
from linchain_cli.recipe.fields import Count, CountFromZero, Text, number_or_auto
from linchain_cli.recipe.strict_yaml import scalar
from linchain_cli.recipe.validation import Conflict, Expected, StrictModel, choose, tagged
from linchain_cli.storage import expand

Columns = dict[Text, Text]


class TemplateConfig(StrictModel):
    """A prompt of your own; {column} stands for the row's value."""

    prompt: Text
    """The text before the answer."""
    prompt_no_input: Text | None = None
    """The same for rows whose input is empty; null uses prompt."""
    response: Text = "{output}"
    """The answer, which follows the prompt directly and is what the model learns to give."""


def _kind_of_template(value: Any) -> str:
    return "own" if isinstance(value, (Mapping, TemplateConfig)) else "name"


TemplateName = Literal["auto", "alpaca", "llm-adapters", "chat", "plain", "text", "prompt-completion"]
Template = Annotated[
    tagged(TemplateName, "name") | tagged(TemplateConfig, "own"),
    choose(_kind_of_template),
    Expected(
        "auto, alpaca, llm-adapters, chat, plain, text, prompt-completion, or a mapping with prompt, "
        "prompt_no_input and response"
    ),
]


class SourceConfig(StrictModel):
    """One data source; what is null here is taken from the data section."""

    path: Annotated[
        Text,
        Expected("a registered name, a hub id, a file, a directory, a pattern (data/*.jsonl), an address"),
    ]
    """Registered name, hub id, file, directory, pattern such as data/*.jsonl, or address such as
    s3://bucket/rows.jsonl."""
    config: Text | None = None
    """Configuration of a hub data set; owner/data-set/configuration as path says the same."""
    data_files: Text | list[Text] | dict[Text, Text | list[Text]] | None = None
    """Files of a hub data set or directory that are read, by name or pattern: one, a list, or by split."""
    split: Text | None = None
    """Split, or a slice of one: train[:1000], train[10%:20%], train+test. A file or pattern is one split,
    whatever it is called."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    max_rows: Count | None = None
    """Only so many rows, the first ones."""
    columns: Columns | None = None
    """Column names, ours to theirs."""
    labels: Columns | None = None
    """Words for what stands in the answer's column."""
    template: Template | None = None
    """This source's own template."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its rows comes in an epoch of training: 2 twice, 0.5 a half of the rows (the same
    half in every epoch, chosen by split_seed)."""


def _as_written(value: Any) -> Any:
    """A recipe's scalars come as text; where any type goes, true, false and numbers are what they seem.

    Raises ValueError for what other readers of YAML take for true or false: as a text each would be true to a
    template.
    """
    if isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        raise ValueError(f"write {'true' if value.lower() in ('yes', 'on') else 'false'}")
    return scalar(value) if isinstance(value, str) else value


Scalar = Annotated[
    bool | int | float | str | None,
    BeforeValidator(_as_written, json_schema_input_type=bool | int | float | str | None),
    Expected("true, false, a number, a text or null"),
]


_NAMES = ", ".join(CHAT_TEMPLATES)


def _of_model(directory: Path) -> str:
    """The chat template in a model's directory, or nothing."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _jinja(value: str) -> str:
    """A template, or the one of that name, or what the file or the model's directory of that name holds: a
    run's recipe keeps the template itself."""
    if "{%" in value or "{{" in value:
        return value
    if value in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[value]
    try:
        path = expand(value)
        text = _of_model(path) if path.is_dir() else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        otherwise = "not JSON" if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        reason = getattr(error, "strerror", None) or otherwise
        raise ValueError(f"it is none of {_NAMES}, and as a file it cannot be read: {reason}") from None
    if "{%" not in text and "{{" not in text:
        raise ValueError(f"the {'directory' if path.is_dir() else 'file'} holds no Jinja template")
    return text


ChatTemplateSource = Annotated[
    Text, AfterValidator(_jinja), Expected(f"{_NAMES}, a Jinja file or a model's directory")
]


class ChatConfig(StrictModel):
    """How conversations are written, where data.template is chat."""

    template: ChatTemplateSource | None = None
    """In place of the chat template that the tokenizer brings: chatml, llama3 or gemma, for base models; a
    Jinja file of your own; or another model's directory, whose template is taken. The run's recipe holds its
    text, and a merged checkpoint gets it as chat_template.jinja."""
    options: dict[Text, Scalar] = {}
    """Variables that the template reads: {enable_thinking: false}."""
    system: str | None = None
    """System prompt of the conversations that have none."""


def _as_sources(value: Any) -> Any:
    if value is None:
        return value
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _rows_or_path(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"0+(\.0+)?%", value):
        return 0
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value) else value


def _kind_of_validation(value: Any) -> str:
    if isinstance(value, (Mapping, SourceConfig)):
        return "source"
    if isinstance(value, list):
        return "sources"
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.endswith("%"):
        return "share"
    return "path" if isinstance(value, str) and not re.fullmatch(r"[\d.]+", value) else "rows"


def _below_all(value: str) -> str:
    if not float(value.removesuffix("%")) < 100:
        raise ValueError("some rows have to be left to train on")
    return value


Sources = Annotated[
    list[SourceConfig],
    BeforeValidator(_as_sources, json_schema_input_type=str | SourceConfig | list[str | SourceConfig]),
    Field(min_length=1),
    Expected("a registered name, a hub id, a file, or a list of them"),
]
Validation = Annotated[
    tagged(CountFromZero, "rows")
    | tagged(Literal["auto"], "auto")
    | tagged(
        Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?%$"), AfterValidator(_below_all)], "share"
    )
    | tagged(Text, "path")
    | tagged(SourceConfig, "source")
    | tagged(Sources, "sources"),
    choose(_kind_of_validation),
    BeforeValidator(
        _rows_or_path, json_schema_input_type=int | str | SourceConfig | list[str | SourceConfig]
    ),
    Expected("a number of rows to hold out (0 for none) or a share such as 5%, auto, or sources of its own"),
]


Length = Annotated[
    tagged(Annotated[int, Field(ge=2, le=10**9)], "number") | tagged(Literal["auto"], "auto"),
    choose(number_or_auto),
    Expected("a whole number from 2 to 1,000,000,000, or auto"),
]


class DataConfig(StrictModel):
    """Rows, and how they become text."""

    train: Sources
    """Registered name (commonsense170k, everyday; glue/rte and GLUE's other tasks), hub id, file (.json,
    .jsonl, .ndjson, .csv, .tsv, also .gz, .bz2, .xz, .zst; .parquet, .arrow), directory, pattern
    (data/*.jsonl) or address (s3://bucket/rows.jsonl); or a list of these; or mappings with path and what
    one source alone needs. Paths are relative to the current directory."""
    split: Text | None = None
    """Split of the sources that name none, or a slice of it, such as train[:1000]; null is train, or the only
    one."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    columns: Columns = {}
    """Where columns have other names, ours to theirs: {instruction: question, output: solution}; of rows
    with a label {text: premise, text_pair: hypothesis, label: gold_label}, of which text_pair may be left
    out. Those that such columns are usually called are found."""
    labels: Columns = {}
    """Where answers are numbers or codes, the words for them: {0: negative, 1: positive}. Classes that a
    data set names itself need none. Of a classification: the classes' names, in this order."""
    validation: Validation = "auto"
    """Rows held out of train by split_seed: auto (120, but at most a tenth of the rows), a number (0 for
    none) or a share such as 5%. Or sources of its own, written as train's are; of a hub data set or
    directory it is the split `validation` unless one is named."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Chooses the held-out rows, apart from seed, so that runs with several seeds share them."""
    template: Template = "auto"
    """auto (by the rows' columns: chat for conversations, alpaca for instructions, text for documents,
    prompt-completion for prompts with a completion), alpaca (as Alpaca-LoRA writes it: Stanford's prompt
    and a line break), llm-adapters (the prompt that LLM-Adapters and the LinChain authors train with, byte
    for byte), chat (the tokenizer's own), plain (input and output as they are), text (documents, for
    continued pretraining), prompt-completion (nothing between the two), or a mapping with prompt,
    prompt_no_input and response."""
    chat: ChatConfig = ChatConfig()
    """How conversations are written."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned; one with `train: false` or `weight: 0` never is."""
    train_on_inputs: bool = False
    """Also learn to write the prompt, as the paper's runs did; of a conversation all its text, whatever marks
    its turns have. false: the loss is over the response alone."""
    max_length: Length = "auto"
    """Longest row in tokens; documents are cut into rows of it. auto: what the model reads, at most 2048."""
    on_long_row: Literal["cut", "drop", "error"] = "cut"
    """A row beyond max_length loses its end, is left out, or stops the run. What is cut or left out is
    told."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used stops the run, or is skipped and counted."""
    max_unsupervised_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rows that may be without a supervised token (all of it cut off) before the run is refused."""

    def conflicts(self) -> Iterator[Conflict]:
        own = [source.template for source in self.train]
        own += [source.template for source in self._given_to_validate]
        if any(source.weight != 1 for source in self._given_to_validate):
            yield Conflict(("validation",), "a weight is for rows to train on: leave it out here.")
        if any(template in ("chat", "auto") for template in (self.template, *own)):
            return
        for key, set_ in (("chat", self.chat != ChatConfig()), ("turns", self.turns != "all")):
            if set_:
                yield Conflict(
                    (key, "template"), f"data.{key} is for data.template: chat, which this is not."
                )

    @property
    def sources(self) -> list[SourceConfig]:
        """The sources of `train`, with this section's split, revision and columns filled in where theirs are
        null."""
        return [self._filled(source, self.split, self.revision) for source in self.train]

    @property
    def validation_sources(self) -> list[SourceConfig]:
        """Where validation rows have sources of their own, these with what they leave open filled in. A
        revision is train's where it is the same data set."""
        shared = {other.path: other.revision for other in self.sources}
        return [
            self._filled(source, "validation", shared.get(source.path)) for source in self._given_to_validate
        ]

    def _filled(self, source: SourceConfig, split: str | None, revision: str | None) -> SourceConfig:
        """A source with what it leaves open: this split and revision, and this section's other values."""
        return source.model_copy(
            update={
                "split": source.split or split,
                "revision": source.revision or revision,
                "columns": self.columns if source.columns is None else source.columns,
                "labels": self.labels if source.labels is None else source.labels,
                "template": source.template or self.template,
            }
        )

    @property
    def _given_to_validate(self) -> list[SourceConfig]:
        given = self.validation
        if isinstance(given, str):
            return [] if given == "auto" or given.endswith("%") else [SourceConfig(path=given)]
        if isinstance(given, SourceConfig):
            return [given]
        return given if isinstance(given, list) else []

    def with_validation_sources(self, sources: list[SourceConfig]) -> DataConfig:
        """The same with other sources in the place of `validation_sources`."""
        return self.model_copy(update={"validation": sources if len(sources) > 1 else sources[0]})
