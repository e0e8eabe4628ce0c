"""What another tool's configuration says of rows, as a recipe's data section: its data sets as entries of
`data.train`, which of their rows and turns are learned, and through which template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from linchain_cli.errors import InputError
from linchain_cli.recipe import strict_yaml
from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES
from linchain_cli.recipe.dataset_info import DRAWN, PAIRS, STARTED_THERE, DatasetInfo
from linchain_cli.recipe.other_tools import (
    AXOLOTL,
    CALLED_HERE,
    LLAMA_FACTORY,
    LLAMA_FACTORY_V1,
    TRL,
    instead_of,
)
from linchain_cli.recipe.theirs import Fields, Theirs, are_all, is_no, is_yes, names, number, remark

Source = dict[str, Any]

_AS_HERE = ("path", "config", "split", "revision", "data_files", "max_rows", "weight")
_COLUMNS = {
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field": "text",
    "text_column": "text",
}
_TYPES = {
    "alpaca": "alpaca",
    "chat_template": "chat",
    "sharegpt": "chat",
    "completion": "text",
    "pretrain": "text",
}
_READERS = ("json", "csv", "parquet", "arrow")  # what `datasets` calls files; they stand in data_files

# What an entry may say without a loss, and what there is in place of anything else.
_TURNS = "turns have role and content, or from and value: rename them"
_MARKS = "the mark of a turn is `train: false` or `weight: 0`: rename it"
_THINKING = ("reasoning_content", "reasoning", "thinking")
_END = "the token that ends an answer is learned with it, no other"
_USUAL: dict[str, tuple[tuple[str, ...], str]] = {
    "message_property_mappings": (("role", "from", "content", "value", "tool_calls", *_THINKING), _TURNS),
    "message_field_role": (("role", "from"), _TURNS),
    "message_field_content": (("content", "value"), _TURNS),
    "message_field_training": (("train", "training", "loss", "weight", "loss_weight"), _MARKS),
    "field_thinking": (_THINKING, f"reasoning is called {' or '.join(_THINKING)}: rename it"),
    "train_on_eos": (("turn",), _END),
    "train_on_eot": (("turn",), _END),
    "roles": (
        ("user", "human", "assistant", "gpt", "model", "bot", "chatgpt", "system", "tool"),
        "human, user, gpt, assistant, model, bot, system and tool are known roles: rename others",
    ),
    "roles_to_train": (("assistant", "gpt", "model"), "assistants' turns are, unless one has `train: false`"),
    "drop_system_message": (("false",), "take it out of the rows"),
    "shards": ((), "split: train[:10%] beside the path takes a part"),
    "chat_template": (("tokenizer_default",), "data.chat.template, for all rows"),
}


def rows(theirs: Theirs) -> Fields:
    """The fields of the data section that are said."""
    fields = {
        field: value
        for rule in (_train, _turns, _chat)
        for field, value in rule(theirs).items()
        if value is not None
    }
    sources = fields.get("data.train")
    own = [
        source.get("template") if isinstance(source, Mapping) else None
        for source in (sources if isinstance(sources, list) else [sources])
    ]
    if all(template not in (None, "chat") for template in own):  # theirs is for asking the model alone
        fields.pop("data.chat.template", None)
        fields.pop("data.chat.options", None)
    return fields


def _train(theirs: Theirs) -> Fields:
    given = theirs(*_TRAIN)
    documents = given is None
    if documents:
        given = theirs("pretraining_dataset")
    found = _all_sources(given, theirs, documents)
    theirs.documents = theirs("stage") == "pt" or (
        bool(found) and all(isinstance(one, dict) and one.get("template") == "text" for one in found)
    )
    column = theirs("dataset_text_field", "text_column")
    return {
        "data.columns": None if column in ("text", None) else {"text": column},
        "data.train": (found[0] if len(found) == 1 else found) or None,
        "data.validation": _validation(theirs),
    }


_TRAIN = "datasets dataset train_dataset dataset_name dataset_path data_path train_file".split()


def _validation(theirs: Theirs) -> Any:
    """Rows of their own, or how many are held out."""
    given = theirs("test_datasets", "eval_dataset")
    share = theirs("val_set_size", "val_size", "test_split_size")
    split = theirs("dataset_test_split") or "test"
    if given is None and share is None and theirs.tool is TRL:
        share = "0"
        if not is_no(theirs("eval_strategy", "evaluation_strategy")):
            given, share = theirs("dataset_name"), None
    if given is None:
        size = number(share)
        return share if size is None else f"{100 * size:g}%" if 0 < size < 1 else f"{size:.12g}"
    if theirs.tool is LLAMA_FACTORY:
        split = "train"
    found = [_to_validate(source, split) for source in _all_sources(given, theirs)]
    return (found[0] if len(found) == 1 else found) or None


def _to_validate(given: Source | str, split: str) -> Source:
    """A source of validation rows; `split` is what their tool takes of a hub data set."""
    source = {**given} if isinstance(given, Mapping) else {"path": given}
    source.pop("weight", None)
    return source if PurePosixPath(str(source.get("path"))).suffix else {"split": split, **source}


def _turns(theirs: Theirs) -> Fields:
    """Which part of a row is learned."""
    longest = theirs("excess_length_strategy", "truncation_mode")
    return {
        "data.turns": "last" if theirs.yes("mask_history", "train_on_last_step_only") else None,
        "data.train_on_inputs": "true" if _learns_whole_rows(theirs) else None,
        "data.max_length": _length(theirs),
        "data.on_long_row": {"truncate": "cut", "keep_start": "cut", "raise": "error"}.get(
            str(longest), longest
        ),
    }


def _learns_whole_rows(theirs: Theirs) -> bool:
    """TRL's two keys are about rows of two kinds: either of them that says yes says that questions are not
    learned."""
    completion, assistant = theirs("completion_only_loss"), theirs("assistant_only_loss")
    if theirs.yes("train_on_inputs", "train_on_prompt"):
        return True
    if is_yes(completion) or is_yes(assistant):
        return False
    if theirs.tool is TRL and completion is None:
        theirs.remarks.append(
            "data.train_on_inputs: TRL learns conversations whole, as true does here"
            if assistant is None
            else "data.train_on_inputs: of prompts with completions TRL learns these alone, as false does"
        )
    return completion is not None or assistant is not None


def _length(theirs: Theirs) -> Any:
    if theirs.tool is TRL and "max_length" in theirs.nulls and not theirs.sets(*LENGTH):
        theirs.unsaid("max_length", None, "no row is cut there; auto, as here, is at most 2,048")
        return None
    return theirs(*LENGTH)


LENGTH = [key for key, field in CALLED_HERE.items() if field == "data.max_length"] + ["max_length"]


def _chat(theirs: Theirs) -> Fields:
    name = theirs("chat_template")
    jinja = theirs("chat_template_jinja", "chat_template_path", "custom_chat_template")
    if jinja is None and re.search(r"[{/]|\.jinja", str(name)):
        jinja = name
    options, thinking = theirs("chat_template_kwargs"), theirs("enable_thinking")
    if thinking is not None:
        options = {**(options if isinstance(options, Mapping) else {}), "enable_thinking": thinking}
    own, template = theirs("template"), None
    if theirs.tool in (LLAMA_FACTORY, LLAMA_FACTORY_V1):  # instructions are conversations, too
        template = "text" if theirs("stage") == "pt" else _ALPACA if own == "alpaca" else "chat"
        name = None if own == "alpaca" else own
    if str(name) in CHAT_TEMPLATES and not own:  # Axolotl's takes the place of the tokenizer's
        jinja = jinja or name
    if name and not jinja and not str(name).startswith("tokenizer_default"):
        known = name if str(name) in CHAT_TEMPLATES else f"{', '.join(CHAT_TEMPLATES)} or a Jinja file"
        why = "the template that the model's tokenizer brings is used; if there is none, data.chat.template: "
        theirs.unsaid("template" if own else "chat_template", name, why + known)
    return {"data.template": template or own, "data.chat.template": jinja, "data.chat.options": options}


# LLaMA-Factory's knows no input: that stands below the instruction.
_BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}"
)
_ALPACA = {
    "prompt": _BEFORE + "\n{input}\n\n### Response:\n",
    "prompt_no_input": _BEFORE + "\n\n### Response:\n",
    "response": "{output}",
}


def _all_sources(value: Any, theirs: Theirs, documents: bool = False) -> list[Source | str]:
    """Entries of `data.train`; a path alone where there is no more to say. `documents`: they are, unless they
    say otherwise."""
    return [
        found["path"] if list(found) == ["path"] else found
        for item in names(value)
        for found in _sources(item, theirs, documents)
    ]


def _sources(item: Any, theirs: Theirs, documents: bool) -> Iterator[Source]:
    if not isinstance(item, Mapping):
        if theirs.tool is LLAMA_FACTORY_V1 and str(item).endswith(".yaml"):
            yield from _listed(str(item), theirs)
            return
        source = _by_name(str(item), theirs)
        for key, said in (
            ("config", theirs("dataset_config")),
            ("max_rows", theirs("max_samples")),
            ("template", "text" if documents else None),
        ):
            if not is_no(said):
                source.setdefault(key, said)
        yield source
        return
    source = _entry({"type": "pretrain", **item} if documents else item, theirs)
    files = source.get("data_files")
    if source.get("path") in _READERS and isinstance(files, (str, list)):
        rest = {key: said for key, said in source.items() if key not in ("path", "data_files")}
        yield from ({"path": file, **rest} for file in ([files] if isinstance(files, str) else files))
    else:
        yield source


def _listed(file: str, theirs: Theirs) -> Iterator[Source]:
    """The data sets of a list that LLaMA-Factory v1 keeps in a file of its own."""
    try:
        listed = strict_yaml.parse(Path(file).read_text(encoding="utf-8")).value
    except (OSError, ValueError, InputError):
        listed = None
    if not isinstance(listed, Mapping):
        theirs.remarks.append(f"{file}: a list of data sets, which cannot be read: {STARTED_THERE}")
        listed = {}
    for name, said in listed.items():
        if isinstance(said, Mapping):
            if said.get("converter") == "pair":
                theirs.remarks.append(f"{name}: {PAIRS}")
            if said.get("size"):
                theirs.remarks.append(remark(f"{name}: size", said["size"], DRAWN))
            source = {**said, "max_rows": said.get("size")}
            yield {key: source[key] for key in _AS_HERE if source.get(key)}


def _by_name(name: str, theirs: Theirs) -> Source:
    """A data set that LLaMA-Factory's dataset_info.json describes, or else the file or hub id."""
    if theirs.tool is not LLAMA_FACTORY:
        return {"path": name}
    directory = str(theirs("dataset_dir") or "data")
    if directory == "ONLINE":  # names are hub ids
        return {"path": name}
    info = DatasetInfo.read(directory)
    theirs.remarks += info.remarks(name)
    return info.source(name) or {"path": name}


def _entry(item: Mapping[str, Any], theirs: Theirs) -> Source:
    """An entry that says more than a path."""
    source = {key: item[key] for key in _AS_HERE if item.get(key)}
    if configuration := item.get("name"):
        source["config"] = configuration
    kind = item.get("type")
    fields: Mapping[str, Any] = item
    if isinstance(kind, Mapping):
        source["template"], fields = _own_prompt(kind), {**item, **kind, "field_system": None}
    elif template := _TYPES.get(re.sub(r"\.(default|load)$", "", str(kind))):
        source["template"] = template
    columns = {ours: fields[name] for name, ours in _COLUMNS.items() if fields.get(name) not in (None, ours)}
    if columns and columns != {"messages": "conversations"}:  # those are read without being told
        source["columns"] = columns
    theirs.remarks += _remarks(item, source)
    if theirs.tool is AXOLOTL and is_no(kind):
        why = "rows of tokens there; here they go by their columns, see data.template"
        theirs.unsaid(f"{source.get('path')}: type", None, why)
    return source


def _own_prompt(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Axolotl's own prompts, in which {instruction} and {input} are the columns that its fields name."""
    system = str(kind.get("system_prompt") or "")
    if system:
        literal = system.replace("{", "{{").replace("}", "}}")
        system = str(kind.get("system_format") or "{system}").replace("{system}", literal)
    asked = str(kind.get("format") or "{instruction} {input} ")
    alone = str(kind.get("no_input_format") or "{instruction} ")
    prompt = {"prompt": system + asked, "prompt_no_input": system + alone, "response": "{output}"}
    return prompt if alone != asked else {key: prompt[key] for key in ("prompt", "response")}


def _remarks(item: Mapping[str, Any], source: Source) -> Iterator[str]:
    """What the source does not say of the entry."""
    path = item.get("path") or "datasets"
    for key, value in item.items():
        if value is None or key in (*_AS_HERE, *_COLUMNS, "name"):
            continue
        if key == "type":
            if "template" not in source:
                yield remark(f"{path}: type", value, "not here: rows go by their columns, see data.template")
            elif isinstance(value, Mapping) and value.get("field_system"):
                why = "data.template.prompt takes {system} where all rows have one"
                yield remark(f"{path}: field_system", value["field_system"], why)
        elif key in _USUAL:
            usual, why = _USUAL[key]
            if not are_all(value, usual):
                yield remark(f"{path}: {key}", value, why)
        elif not is_no(value) and not (key == "columns" and isinstance(value, list)):  # TRL: what is kept
            reason = instead_of(key) or CALLED_HERE.get(key) or "linchain does not know it"
            if not reason.startswith("leave it out"):
                yield remark(f"{path}: {key}", value, reason)
