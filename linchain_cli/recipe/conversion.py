"""From a configuration of another tool (Axolotl, LLaMA-Factory, TRL) to a recipe that says the same, as far
as a recipe can.

Values are texts here, as `strict_yaml.parse` gives them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from linchain_cli.recipe.dataset_info import DatasetInfo
from linchain_cli.recipe.other_tools import CALLED_HERE, instead_of, is_known
from linchain_cli.recipe.schema import SECTIONS, Recipe, nested
from linchain_cli.recipe.validation import check, dotted_fields

_FIELDS = tuple(dotted_fields(Recipe))
_BY_LAST_PART = {field.rpartition(".")[2]: field for field in _FIELDS}
_FEWEST = 3  # settings of another tool that make a file one of its configurations
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "none", "", "0", "0.0", "[]", "{}")

Fields = dict[str, Any]
Config = Mapping[str, Any]


def foreign_keys(config: Config) -> list[str]:
    """The keys of another tool at the top of a file, if they make it a configuration of that tool."""
    if any(isinstance(config.get(section), Mapping) for section in SECTIONS):
        return []
    found = [key for key in config if is_known(key)]
    return found if len(found) >= _FEWEST else []


def converted(config: Config, source: str) -> str:
    """A recipe as YAML text, with comments on what it does not say. `source` is the file's name.

    LLaMA-Factory's names of data sets are looked up in its dataset_info.json.
    """
    flat: Fields = {}
    unsaid: list[str] = []
    left_out: list[str] = []
    if config.get("dataset") and not isinstance(config["dataset"], Mapping):
        info, names = DatasetInfo.read(str(config.get("dataset_dir") or "data")), _names(config["dataset"])
        config = {**config, "dataset": [info.source(str(name)) or name for name in names]}
        unsaid += [remark for name in names for remark in info.remarks(str(name))]
    for key, value in config.items():
        if value is None or key == "output_dir":
            continue
        field = _field_of(key)
        if key in _SPECIAL or field:
            said = _SPECIAL[key](value, config) if key in _SPECIAL else _plain(field, value)
            flat |= said
            if not said and key in _ELSEWHERE and not _is(value, (*_NO, "tokenizer_default", "jinja")):
                unsaid.append(_remark(key, value, _ELSEWHERE[key]))
        elif (reason := instead_of(key)) and (reason.startswith("leave it out") or _is(value, _NO)):
            left_out.append(key)
        else:
            unsaid.append(_remark(key, value, reason or "linchain does not know it"))
    unsaid += _of_sources(config)
    if adapter := flat.get("adapter.init_from"):
        unsaid.append(f"adapter.init_from: first `linchain import {adapter} --out NEW`, then name NEW there")
    if trackers := _trackers(config):
        flat["training.trackers"] = trackers
    flat |= _places(config, flat, source)
    if "training.max_steps" in flat:
        flat.pop("training.epochs", None)
    if _trains_everything(config):
        unsaid.insert(0, "all weights are trained there; linchain trains an adapter")
    if (stage := config.get("stage")) and stage not in ("sft", "pt"):
        unsaid.insert(0, _remark("stage", stage, "not here: what is learned is the rows' answers"))
    missing = _take_out_what_is_wrong(flat, unsaid)
    return _text(flat, missing, unsaid, left_out, source)


def _field_of(key: str) -> str | None:
    return CALLED_HERE.get(key) or (_BY_LAST_PART.get(key) if key not in SECTIONS else None)


def _plain(field: str, value: Any) -> Fields:
    new = _VALUES[field](value) if field in _VALUES else value
    return {} if new is None else {field: new}


def _take_out_what_is_wrong(flat: Fields, unsaid: list[str]) -> list[str]:
    """Moves what a recipe cannot hold from `flat` to `unsaid`; the fields that are missing."""
    missing = []
    for problem in check(Recipe, nested(flat))[1]:
        field = ".".join(part for part in problem.key if isinstance(part, str))
        while field and field not in flat:
            field = field.rpartition(".")[0]
        if field:
            unsaid.append(_remark(field, flat.pop(field), problem.message.rstrip(".")))
        elif problem.missing:
            missing.append(".".join(map(str, problem.key)))
    return missing


def _is(value: Any, words: tuple[str, ...]) -> bool:
    return (str(value) if isinstance(value, (list, dict)) else str(value).lower()) in words


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _names(value: Any) -> list[Any]:
    """A list, what stands between commas, or the one thing that is given."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [item for item in value if item is not None] if isinstance(value, list) else [value]


def _if_yes(field: str, new: str) -> Callable[[Any, Config], Fields]:
    return lambda value, config: {field: new} if _is(value, _YES) else {}


def _times_an_epoch(field: str) -> Callable[[Any, Config], Fields]:
    return lambda value, config: (
        {} if _is(value, _NO) else {field: "epoch" if _number(value) == 1 else f"epoch/{value}"}
    )


def _every_epoch(field: str) -> Callable[[Any, Config], Fields]:
    return lambda value, config: {field: "epoch"} if value == "epoch" else {}


def _rank(value: Any, config: Config) -> Fields:
    """LLaMA-Factory's alpha is twice the rank where it is not given."""
    doubled = _number(value) if config.get("lora_alpha") is None else None
    return {"adapter.rank": value, **(_alpha(f"{2 * doubled:g}", config) if doubled else {})}


def _alpha(value: Any, config: Config) -> Fields:
    """rsLoRA's scale is alpha / √rank, ours alpha / rank."""
    rank = next((_number(config[key]) for key in ("lora_r", "lora_rank", "r") if config.get(key)), None)
    rooted = any(_is(config.get(key), _YES) for key in ("use_rslora", "peft_use_rslora"))
    alpha = _number(value)
    return {"adapter.alpha": round(alpha * math.sqrt(rank), 4) if rooted and alpha and rank else value}


def _batch(value: Any, config: Config) -> Fields:
    rows, times = _number(value), _number(config.get("gradient_accumulation_steps") or 1)
    together = {"training.global_batch_size": int(rows * times)} if rows and times else {}
    return {"training.micro_batch_size": value, **together}


def _trackers(config: Config) -> list[str]:
    found = [str(name) for name in _names(config.get("report_to") or []) if name not in ("none", "all")]
    return list(dict.fromkeys(found + [_TRACKERS[key] for key in _TRACKERS if not _is(config.get(key), _NO)]))


_TRACKERS = {
    "wandb_project": "wandb",
    "use_wandb": "wandb",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_tensorboard": "tensorboard",
    "use_trackio": "trackio",
    "use_swanlab": "swanlab",
}

# Of an entry of Axolotl's `datasets`.
_TYPES = {"alpaca": "alpaca", "chat_template": "chat", "sharegpt": "chat", "completion": "text"}
_COLUMNS = {
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field": "text",
}
_DATASETS = ("datasets", "dataset", "dataset_name", "pretraining_dataset")
_OF_SOURCE = ("path", "config", "split", "revision", "data_files", "max_rows", "columns")


def _rows(value: Any, config: Config) -> Fields:
    sources = [_source(item, config) for item in _names(value)]
    return {"data.train": sources[0] if len(sources) == 1 else sources} if sources else {}


def _source(item: Any, config: Config) -> Any:
    """An entry of `datasets` as one of `data.train`."""
    given = dict(item) if isinstance(item, Mapping) else {"path": item}
    source = {key: given[key] for key in _OF_SOURCE if given.get(key)}
    if not isinstance(source.get("columns"), Mapping):  # TRL's are those that are kept
        source.pop("columns", None)
    if configuration := given.get("name") or config.get("dataset_config"):
        source["config"] = configuration
    if template := _template_of(given.get("type")):
        source["template"] = template
    columns = {
        ours: given[theirs] for theirs, ours in _COLUMNS.items() if given.get(theirs) not in (None, ours)
    }
    if columns and columns != {"messages": "conversations"}:  # those are read without being told
        source["columns"] = columns
    if config.get("max_samples"):
        source.setdefault("max_rows", config["max_samples"])
    return source["path"] if list(source) == ["path"] else source


def _template_of(kind: Any) -> str | None:
    return _TYPES.get(kind.removesuffix(".default")) if isinstance(kind, str) else None


def _of_sources(config: Config) -> Iterator[str]:
    """What entries of `datasets` say beside that."""
    for item in [item for name in _DATASETS for item in _names(config.get(name) or [])]:
        for key, value in item.items() if isinstance(item, Mapping) else ():
            if key == "type" and value is not None and not _template_of(value):
                yield _remark("datasets: type", value, "the rows' columns tell the format (data.template)")
            elif key == "message_property_mappings" and isinstance(value, Mapping):
                if not {str(name) for name in value.values()} <= {"role", "from", "content", "value"}:
                    yield _remark(f"datasets: {key}", value, "turns have role and content, or from and value")
            elif key not in (*_OF_SOURCE, *_COLUMNS, "name", "type") and not _is(value, _NO):
                reason = instead_of(key) or CALLED_HERE.get(key) or "linchain does not know it"
                if not reason.startswith("leave it out"):
                    yield _remark(f"datasets: {key}", value, reason)


def _held_out(value: Any) -> Any:
    if isinstance(value, list):
        return _source(value[0], {}) if value else None
    share = _number(value)
    return 0 if share == 0 else f"{100 * share:g}%" if share and share < 1 else value


def _targets(value: Any) -> Any:
    if value == "all":
        return "all-linear"
    return _names(value) if isinstance(value, str) and "," in value and "(" not in value else value


# What other keys say, or a default.
_SAID_ELSEWHERE = (
    *_TRACKERS,
    *"adapter auto_find_batch_size chat_template dataset_config dataset_dir dataset_test_split".split(),
    *"deepspeed dp_replicate_size dp_shard_size exclude_modules fsdp fsdp_config".split(),
    *"gradient_accumulation_steps layers_pattern layers_to_transform logging_strategy max_samples".split(),
    *"peft_layers_pattern peft_layers_to_transform peft_use_rslora report_to use_rslora".split(),
)
_SPECIAL: dict[str, Callable[[Any, Config], Fields]] = {
    **dict.fromkeys(("bf16", "bfloat16", "pure_bf16"), _if_yes("model.dtype", "bfloat16")),
    **dict.fromkeys(("fp16", "float16"), _if_yes("model.dtype", "float16")),
    "float32": _if_yes("model.dtype", "float32"),
    "load_in_4bit": _if_yes("model.quantization", "nf4"),
    "load_in_8bit": _if_yes("model.quantization", "int8"),
    "eager_attention": _if_yes("model.attention", "eager"),
    "lora_alpha": _alpha,
    "lora_rank": _rank,
    "lora_target_linear": _if_yes("adapter.target_modules", "all-linear"),
    **dict.fromkeys(_DATASETS, _rows),
    "enable_thinking": lambda value, config: {"data.chat.options": {"enable_thinking": value}},
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss"),
        lambda value, config: {"data.train_on_inputs": "true"} if _is(value, _NO) else {},
    ),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size"), _batch),
    "disable_gradient_checkpointing": _if_yes("training.gradient_checkpointing", "false"),
    "evals_per_epoch": _times_an_epoch("training.eval_every"),
    "saves_per_epoch": _times_an_epoch("training.save_every"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), _every_epoch("training.eval_every")),
    "save_strategy": _every_epoch("training.save_every"),
    "load_best_model_at_end": lambda value, config: {"training.keep": "best" if _is(value, _YES) else "last"},
    **dict.fromkeys(_SAID_ELSEWHERE, lambda value, config: {}),
}
_VALUES: dict[str, Callable[[Any], Any]] = {
    "model.quantization": lambda value: {"4": "nf4", "8": "int8"}.get(str(value), value),
    "model.attention": lambda value: value if value == "eager" else None,  # auto takes the fastest
    "adapter.target_modules": _targets,
    "data.validation": _held_out,
    "data.template": lambda value: value if value in ("alpaca", "chat", "text", "plain") else None,
    "data.turns": lambda value: "last" if _is(value, _YES) else None,
    "training.lr_scheduler": lambda value: "constant" if value == "constant_with_warmup" else value,
    "training.optimizer": lambda value: "adamw" if re.match("(paged_)?adamw", str(value)) else value,
    "training.gradient_checkpointing": lambda value: "true" if value in ("unsloth", "offload") else value,
    "training.compile": lambda value: None if value == "auto" else value,
    "training.max_steps": lambda value: None if (_number(value) or 0) <= 0 else value,
    "training.early_stopping": lambda value: None if _is(value, _NO) else value,
}
# Why a value of these may say nothing here.
_OWN_TEMPLATE = (
    "the template that the model's tokenizer brings is used; data.chat.template takes a Jinja file"
)
_ELSEWHERE = {
    "chat_template": _OWN_TEMPLATE,
    "template": _OWN_TEMPLATE,
    **dict.fromkeys(
        ("exclude_modules", "layers_to_transform", "layers_pattern", "peft_layers_to_transform"),
        "adapter.target_modules takes a regular expression over the module's path",
    ),
    "dataset_test_split": "data.validation: {path: ..., split: ...}",
}


def _trains_everything(config: Config) -> bool:
    method = config.get("finetuning_type") or config.get("adapter")
    if method:
        return method not in ("lora", "qlora")
    names = ("lora_r", "lora_rank", "r", "use_peft")
    return not any(config.get(key) for key in names)


def _places(config: Config, flat: Fields, source: str) -> Fields:
    """The run's name and directory: together they are the other tool's output_dir."""
    place = PurePosixPath(str(config.get("output_dir") or flat.get("name") or PurePosixPath(source).stem))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).strip("._-")[:200] or "run"
    return {"name": name, **({"output_dir": str(place.parent)} if place.parent.name else {})}


def _remark(key: str, value: Any, why: str) -> str:
    text = yaml.safe_dump(_typed(value), default_flow_style=True, width=2**31, allow_unicode=True)
    text = " ".join(text.removesuffix("\n").removesuffix("\n...").split())
    return f"{key}: {text if len(text) <= 60 else text[:57] + '...'}  ({why})"


def _typed(value: Any) -> Any:
    """Texts as the scalars of YAML that they were."""
    if isinstance(value, Mapping):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in ("true", "True", "false", "False"):
        return value.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,15}", value):
        return int(value)
    return float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,3})?", value) else value


def _text(flat: Fields, missing: list[str], unsaid: list[str], left_out: list[str], source: str) -> str:
    flat = {"adapter.depth": 0, **flat}
    ordered = {field: _typed(flat[field]) for field in _FIELDS if field in flat}
    body = yaml.safe_dump(nested(ordered), sort_keys=False, allow_unicode=True, width=2**31)
    for line, remark in (
        ("  depth: 0", "LoRA, as there; 3 makes it a chain"),
        (r"  global_batch_size: \d+", "of one process there: times your GPUs"),
    ):
        body = re.sub(rf"^({line})$", rf"\1  # {remark}", body, count=1, flags=re.MULTILINE)
    lines = [f"# Made from {source}. What it leaves open has the defaults of linchain: see `linchain check`."]
    lines += [f"# Missing: {field}" for field in missing]
    lines.append(body)
    if unsaid:
        lines += ["# Not said above:", *(f"#   {remark}" for remark in unsaid)]
    if left_out:
        lines.append(f"# Not needed: {', '.join(left_out)}")
    return "\n".join(lines).rstrip("\n") + "\n"
