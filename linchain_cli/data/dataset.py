"""From a recipe's data section to the rows that are trained on and those that validate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from linchain_cli.cache import cache_root
from linchain_cli.data.cache import open_or_encode
from linchain_cli.data.choosing import PICTURES, choose_template
from linchain_cli.data.files import short_name
from linchain_cli.data.glue import TASKS
from linchain_cli.data.labelled import (
    Labelling,
    UnknownLabel,
    encoder_for,
    find_classes,
    label_counts,
    labelled_source,
)
from linchain_cli.data.mixture import hold_out, rows_by_source, weighted
from linchain_cli.data.pipeline import EncodingSettings, Progress, encoded_rows
from linchain_cli.data.readers import shown
from linchain_cli.data.report import DataReport
from linchain_cli.data.rows import Template, UnusableRow
from linchain_cli.data.sources import Source, resolve_source
from linchain_cli.data.store import EncodedRows, EncodedStore
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.model.limits import Limits
    from linchain_cli.recipe import DataConfig, SourceConfig, TemplateConfig

# Where `max_length` is auto and the model reads more: what other tools take, and a row may need gigabytes.
LONGEST_AUTO = 2048


@dataclass
class PreparedData:
    """What a run trains on.

    `config` is the recipe's data section with what it left to `auto` settled; `template` what the model is
    asked through afterwards, the first source's, or how rows with a label are read. `validation_report` is
    about validation rows with sources of their own; `validation_sources` are the validation rows of each
    source, where there are several."""

    train: EncodedRows
    validation: EncodedRows | None
    template: Template | Labelling
    config: DataConfig
    report: DataReport
    validation_report: DataReport | None = None
    validation_sources: Mapping[str, np.ndarray] = field(default_factory=dict)
    metric: str | None = None  # what GLUE goes by, if the first source is a task of it


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits | None = None,
    *,
    task: Literal["causal", "classification", "regression"] = "causal",
    classes: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Reads, renders and encodes the rows of a recipe, or opens what an earlier call encoded.

    Args:
        config: the recipe's data section.
        tokenizer: a fast tokenizer; its template, EOS and leading tokens are part of the rows.
        limits: what the model can read; None asks no model.
        task: the recipe's; for a classification or regression, rows have a label in place of an answer.
        classes: the names of a classification's classes; None finds them in the rows.
        cache_dir: where encodings are kept, else `encoded` in the tool's cache ($LINCHAIN_CACHE).
        data_dir: a directory that may hold registered data sets as files.
        progress: called with the number of rows read so far.

    Raises:
        InputError: a source is missing, a row is bad (or none is good), rows have no supervised token, more
            rows are to be held out than there are, or the model cannot read a row.
    """
    cache_dir = Path(cache_dir) if cache_dir else cache_root() / "encoded"
    # A label can be told from a row's beginning; an answer at its end is better refused than cut off.
    positions = limits.positions if limits and limits.table and task != "causal" else None
    config = config.model_copy(update={"max_length": longest_row(config, tokenizer, positions)})
    settings = EncodingSettings(
        config.max_length, config.train_on_inputs, config.on_bad_row == "skip", config.on_long_row
    )

    labelling = None
    if task != "causal":
        if classes is None:
            classes = find_classes(config, data_dir) if task == "classification" else ()
        labelling = Labelling.of(task, classes, tokenizer)

    def encoded(sources: Sequence[SourceConfig]) -> tuple[list[_Found], EncodedStore, DataReport]:
        found = [_find(source, config, tokenizer, labelling, data_dir) for source in sources]
        pairs = [(one.source, one.template) for one in found]
        store, report = open_or_encode(pairs, tokenizer, settings, cache_dir, progress)
        report.template = found[0].template.name
        _check_supervised(report, config.max_unsupervised_share, config.max_length)
        _tell(report, found, config.max_length)
        if limits is not None and _has_unknown_ids(store, tokenizer, limits.embeddings):
            _refuse_unknown_ids(pairs, tokenizer, settings, limits.embeddings)
        return found, store, report

    found, store, report = encoded(config.sources)
    of_validation, validation_report = [], None
    if not (sources := config.validation_sources):
        train, validation = hold_out(store, config.validation, config.split_seed)
    else:
        try:
            of_validation, validation_store, validation_report = encoded(sources)
        except UnusableRow as error:
            if not isinstance(error.reason, UnknownLabel):
                raise
            raise InputError(
                f"{error.place}: {error.reason}. The classes are those of the training rows, unless"
                " data.labels names them all. Or set data.on_bad_row: skip to leave such rows out."
            ) from None
        train, validation = EncodedRows(store), EncodedRows(validation_store)
    weights = [source.weight for source in config.sources]
    train = weighted(train, [source.rows for source in report.sources], weights, config.split_seed)
    if any(weight != 1 for weight in weights):
        marked = json.dumps([report.fingerprint, weights]).encode()
        report.fingerprint = hashlib.sha256(marked).hexdigest()
    if labelling is None:
        settled = _settled(config, [one.chosen for one in found], [one.chosen for one in of_validation])
    else:
        settled = _with_columns(config, found, of_validation)
    for conflict in settled.conflicts():
        raise InputError(f"{conflict.message} The rows go through {found[0].template.name}.")
    validated_on = (validation_report or report).sources
    by_source = rows_by_source(
        validation, [source.name for source in validated_on], [source.rows for source in validated_on]
    )
    prepared = PreparedData(
        train, validation, found[0].template, settled, report, validation_report, by_source
    )
    if glue := found[0].source.glue:
        prepared.metric = TASKS[glue].metric
    report.warnings += _warnings(prepared, tokenizer)
    if limits is not None:
        longest = max(int(rows.lengths.max()) for rows in (prepared.train, prepared.validation) if rows)
        remedy = "set data.max_length to at most {positions}"
        if warning := limits.check_length(longest, "the longest row has", remedy):
            report.warnings.append(warning)
    return prepared


@dataclass(frozen=True)
class _Found:
    """A source of a recipe with the template that its rows go through; `chosen` is how a recipe writes
    that."""

    source: Source
    template: Template | Labelling
    chosen: str | TemplateConfig
    by_itself: bool  # the recipe says auto, or names no columns of text and label


def _find(
    wanted: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    labelling: Labelling | None,
    data_dir: str | Path | None,
) -> _Found:
    if labelling is not None:
        source, guessed = labelled_source(wanted, labelling.name, data_dir)
        return _Found(source, labelling, "auto", guessed)
    source, chosen = resolve_source(wanted, data_dir), wanted.template
    if chosen == "auto":
        chats = bool(config.chat.template or tokenizer.chat_template)
        chosen = choose_template(source, chats).name
    template = get_template(chosen, tokenizer, config.chat, config.turns)
    return _Found(source, template, chosen, wanted.template == "auto")


def _settled(
    config: DataConfig,
    templates: Sequence[str | TemplateConfig],
    of_validation: Sequence[str | TemplateConfig],
) -> DataConfig:
    """The data section with the templates that were found: the first source's for all, the others' beside
    them."""
    first, *_ = templates
    own = [template if template != first else None for template in templates]
    train = [
        source.model_copy(update={"template": template})
        for source, template in zip(config.train, own, strict=True)
    ]
    if any(template != first for template in of_validation):
        pairs = zip(config.validation_sources, of_validation, strict=True)
        changed = [source.model_copy(update={"template": template}) for source, template in pairs]
        config = config.with_validation_sources(changed)
    return config.model_copy(update={"template": first, "train": train})


def _with_columns(config: DataConfig, found: Sequence[_Found], of_validation: Sequence[_Found]) -> DataConfig:
    """The data section with the columns of text and label that were chosen for its sources."""

    def named(sources: Sequence[SourceConfig], found: Sequence[_Found]) -> list[SourceConfig]:
        return [
            source.model_copy(update={"columns": dict(one.source.columns)}) if one.by_itself else source
            for source, one in zip(sources, found, strict=True)
        ]

    if any(one.by_itself for one in of_validation):
        config = config.with_validation_sources(named(config.validation_sources, of_validation))
    return config.model_copy(update={"train": named(config.train, found)})


def longest_row(config: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> int:
    """`data.max_length` in tokens; auto is what the tokenizer names, and at most 2,048 or the `positions`."""
    if config.max_length != "auto":
        return config.max_length
    return max(2, min(LONGEST_AUTO, tokenizer.model_max_length, positions or LONGEST_AUTO))


def _check_supervised(report: DataReport, tolerated: float, max_length: int) -> None:
    """Stops a run in which more rows have nothing to learn than the recipe tolerates."""
    usable = report.kept + report.unsupervised
    if not usable:
        raise InputError(
            f"all {report.long:,} rows have more than data.max_length ({max_length:,}) tokens (the longest "
            f"{report.longest:,}), and data.on_long_row is drop. Raise data.max_length."
        )
    share = report.unsupervised / usable
    if share > tolerated or not report.kept:
        examples = "".join(f"\n  {example}" for example in report.unsupervised_examples)
        raise InputError(
            f"{report.unsupervised:,} of {usable:,} rows ({share:.1%}) have no supervised token: their "
            f"prompts fill data.max_length ({max_length}), so that the answer is cut off. Raise "
            "data.max_length, leave long rows out (data.on_long_row: drop), or accept a share with "
            f"data.max_unsupervised_share (now {tolerated:g}).{examples}"
        )


_WRITTEN_OUT = (
    ". If documents are conversations written out, questions are learned with the answers: rows of"
    " `messages` learn the answers alone"
)


def _tell(report: DataReport, found: Sequence[_Found], max_length: int) -> None:
    """Puts what the user should know of these rows into `notes` and `warnings`."""
    notes, told = report.notes, report.warnings
    for one, counts in zip(found, report.sources, strict=True):
        name, files, counts.template = one.source.name, one.source.files, one.template.name
        if one.by_itself and isinstance(one.template, Labelling):
            chosen = ", ".join(f"{ours}: {theirs}" for ours, theirs in one.source.columns.items())
            notes.append(f"{name}: texts and label are the columns {{{chosen}}} (data.columns)")
        elif one.by_itself:
            notes.append(f"{name}: rows go through the template {counts.template} (data.template: auto)")
        if counts.unread and one.source.glue is None:
            notes.append(f"{name}: nothing reads the columns {', '.join(map(shown, counts.unread[:20]))}")
        for column in counts.unshown:
            if column in PICTURES:
                told.append(
                    f"{name}: rows hold `{column}`, which the model is not shown: text alone is learned"
                )
                continue
            told.append(
                f"{name}: rows hold a `{column}`, which the template {counts.template} does not show to the "
                "model: data.template: chat does"
                + (", with data.columns: {system: system_prompt}" if column == "system_prompt" else "")
            )
        if files and files.left_out:
            left_out = list(map(short_name, files.left_out))
            notes.append(f"{name}: not read are {some(left_out, 5)}")
    if report.truncated and isinstance(labelling := found[0].template, Labelling):
        place = "beginning" if labelling.keeps_end else "end"
        told.append(
            f"{report.truncated:,} of {report.rows:,} rows are longer than data.max_length ({max_length:,}"
            f" tokens; the longest has {report.longest:,}): the longer of their texts loses its {place}"
        )
    elif report.truncated:
        told.append(
            f"{report.truncated:,} of {report.rows:,} rows are longer than data.max_length ({max_length:,}"
            f" tokens; the longest has {report.longest:,}) and lose their end, the end-of-sequence token"
            " with it. Raise data.max_length, or leave them out with data.on_long_row: drop"
        )
    if report.answers_cut_away:
        told.append(f"{report.answers_cut_away:,} answers of conversations lie wholly behind data.max_length")
    if report.long:
        told.append(
            f"{report.long:,} rows with more than {max_length:,} tokens are left out (data.on_long_row: drop)"
        )
    if report.control_rows:
        told.append(
            f"{report.control_rows:,} of {report.total:,} rows hold control tokens of the tokenizer in their"
            f" texts (first {report.control_examples[0]}), which are encoded as these, not as letters"
            + (_WRITTEN_OUT if any(one.template.name == "text" for one in found) else "")
        )
    told += [f"{remark} ({count:,} rows)" for remark, count in report.remarks.items()]


def _warnings(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    if isinstance(prepared.template, Labelling) and (alike := prepared.template.alike):
        found.append(f"{some(alike, 10)} are classes of their own, though they differ by case alone")
    if isinstance(prepared.template, Labelling) and prepared.template.classes:
        found += _uneven(prepared.train, prepared.validation, prepared.template.classes)
    if tokenizer.eos_token_id is None and not isinstance(prepared.template, Labelling):
        found.append(
            "the tokenizer has no end-of-sequence token: the model does not learn where an answer ends"
        )
    if prepared.validation is not None:
        twice = prepared.validation.repeated_in(prepared.train)
        if twice:
            found.append(
                f"{twice:,} of {len(prepared.validation):,} validation rows also occur among the training "
                "rows"
            )
    return found


def _uneven(train: EncodedRows, validation: EncodedRows | None, classes: Sequence[str]) -> list[str]:
    """What rows of a classification do not show."""
    told = []
    if missing := [name for name, count in label_counts(train, classes).items() if not count]:
        told.append(f"no row to train on is labelled {some(missing, 10)}: it cannot be learned")
    met = [name for name, count in label_counts(validation, classes).items() if count] if validation else []
    if len(met) == 1:
        told.append(f"all {len(validation):,} rows to validate on are labelled {met[0]}")
    return told


def _has_unknown_ids(store: EncodedStore, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> bool:
    """Whether rows hold tokens without an embedding. They are read only if the tokenizer has such tokens."""
    return max(tokenizer.get_vocab().values()) >= embeddings and store.highest_token() >= embeddings


def _refuse_unknown_ids(
    sources: Sequence[tuple[Source, Template]],
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    embeddings: int,
) -> NoReturn:
    """Encodes again to find where the first of the tokens comes from that the model has no embedding for."""
    for row in encoded_rows(sources, encoder_for(sources[0][1], tokenizer), settings):
        for text in row.encoded:
            unknown = text.input_ids[text.input_ids >= embeddings]
            if len(unknown) and text.supervised.any():
                token = tokenizer.convert_ids_to_tokens(int(unknown[0]))
                raise InputError(
                    f"{row.place}: the token {token!r} has the id {unknown[0]}, and the model's embeddings"
                    f" end at {embeddings - 1}: the tokenizer has more tokens than the model. Take the"
                    " checkpoint's own tokenizer files, or rows and a template without this token."
                )
    raise InputError("the encoded rows are damaged: remove the folder `encoded` from the cache")
