"""From a configuration of another tool (Axolotl, LLaMA-Factory, TRL) to a recipe that says the same, as far
as a recipe can.

Rules read what they need of the whole configuration (foreign_rows.py, foreign_settings.py); what none has
read goes by the tables of other_tools.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from linchain_cli.recipe.dotted import nested
from linchain_cli.recipe.foreign_rows import rows
from linchain_cli.recipe.foreign_settings import note_what_is_learned, settings
from linchain_cli.recipe.other_tools import CALLED_HERE, SAME_HERE, instead_of, is_known
from linchain_cli.recipe.schema import SECTIONS, Recipe
from linchain_cli.recipe.theirs import Config, Fields, Theirs, is_no, number, remark, typed
from linchain_cli.recipe.validation import check, dotted_fields

_FIELDS = tuple(dotted_fields(Recipe))
_BY_LAST_PART = {field.rpartition(".")[2]: field for field in _FIELDS}
_FEWEST = 3  # settings of another tool that make a file one of its configurations


def foreign_keys(config: Config) -> list[str]:
    """The keys of another tool at the top of a file, if they make it a configuration of that tool."""
    if any(isinstance(config.get(section), Mapping) for section in SECTIONS):
        return []
    found = [key for key in _unfolded(config) if is_known(key)]
    return found if len(found) >= _FEWEST else []


def converted(config: Config, source: str) -> str:
    """A recipe as YAML text, with comments on what it does not say. `source` is the file's name.

    LLaMA-Factory's names of data sets are looked up in its dataset_info.json.
    """
    theirs = Theirs(_unfolded(config))
    note_what_is_learned(theirs)
    flat = rows(theirs) | settings(theirs)
    left_out = _rest(theirs, flat)
    for key, value in theirs.config.items():
        if "${" in str(value):
            theirs.unsaid(key, value, "nothing is put in for ${...}: write the value out")
    flat |= _places(theirs, flat, source)
    missing = _take_out_what_is_wrong(flat, theirs.remarks)
    return _text(flat, missing, theirs, left_out, source)


# LLaMA-Factory v1 puts settings into mappings that have a name, which is a setting too.
_FOLDED = {
    "peft_config": "finetuning_type",
    "quant_config": "quantization_method",
    "optim_config": "optim",
    "lr_scheduler_config": "lr_scheduler_type",
}


def _unfolded(config: Config) -> Config:
    if "train_dataset" not in config and "model_class" not in config:
        return config
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FOLDED and isinstance(value, Mapping):
            flat |= {_FOLDED[key] if name == "name" else name: item for name, item in value.items()}
        else:
            flat["model_name_or_path" if key == "model" else key] = value
    return flat


def _rest(theirs: Theirs, flat: Fields) -> list[str]:
    """Puts what no rule has read where its name says; returns the keys that need no setting here."""
    left_out = []
    for key in list(theirs.unread):
        if key == "output_dir":
            continue
        value = theirs(key)
        field = CALLED_HERE.get(key) or (_BY_LAST_PART.get(key) if key not in SECTIONS else None)
        if field and field not in flat:
            flat[field] = value
        elif field and not is_no(value) and flat[field] != value:
            theirs.unsaid(key, value, f"another of these keys has become {field}")
        elif field or key in _ASKING or _needs_no_setting(key, value):
            left_out.append(key)
        else:
            theirs.unsaid(key, value, instead_of(key) or "linchain does not know it")
    return left_out


# How a model is asked, which no training does: options of `linchain generate` and `chat` are called so.
_ASKING = (
    "max_new_tokens temperature top_p top_k do_sample num_beams repetition_penalty length_penalty".split()
)


def _needs_no_setting(key: str, value: Any) -> bool:
    reason = instead_of(key)
    same = key in SAME_HERE and SAME_HERE[key] in (number(value), str(value))
    return reason is not None and (reason.startswith("leave it out") or is_no(value) or same)


def _take_out_what_is_wrong(flat: Fields, remarks: list[str]) -> list[str]:
    """Moves what a recipe cannot hold from `flat` to `remarks`; the fields that are missing."""
    missing = []
    for problem in check(Recipe, nested(flat))[1]:
        field = ".".join(part for part in problem.key if isinstance(part, str))
        while field and field not in flat:
            field = field.rpartition(".")[0]
        if field:
            remarks.append(remark(field, flat.pop(field), problem.message.rstrip(".")))
        elif problem.missing:
            missing.append(".".join(map(str, problem.key)))
    return missing


def _places(theirs: Theirs, flat: Fields, source: str) -> Fields:
    """The run's name and directory: together they are the other tool's output_dir."""
    place = PurePosixPath(str(theirs("output_dir") or flat.get("name") or PurePosixPath(source).stem))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).strip("._-")[:200] or "run"
    if flat.get("name", name) != name:
        theirs.unsaid("name", flat["name"], "a run is called after its output_dir")
    return {"name": name, **({"output_dir": str(place.parent)} if place.parent.name else {})}


# Texts, which may look like numbers: 007, 1e5.
_NAMES = (
    "name",
    "output_dir",
    "model.path",
    "model.revision",
    "adapter.init_from",
    "data.split",
    "data.revision",
)


def _scalars(field: str, value: Any) -> Any:
    if field in _NAMES or (isinstance(value, str) and field == "data.train"):
        return value
    if field in ("data.train", "data.validation") and isinstance(value, list):
        return [_scalars(field, item) for item in value]
    if field in ("data.train", "data.validation") and isinstance(value, Mapping):
        return {key: typed(item) if key in ("max_rows", "weight") else item for key, item in value.items()}
    return typed(value)


def _text(flat: Fields, missing: list[str], theirs: Theirs, left_out: list[str], source: str) -> str:
    ordered = {field: _scalars(field, flat[field]) for field in _FIELDS if field in flat}
    body = yaml.safe_dump(nested(ordered), sort_keys=False, allow_unicode=True, width=2**31)
    for field, said in theirs.notes.items():
        note = " ".join(said.split())
        line = rf"^(  {field.rpartition('.')[2]}: .+)$"
        body = re.sub(line, lambda found, note=note: f"{found[1]}  # {note}", body, flags=re.MULTILINE)
    lines = [
        f"# Made from {source}. What {theirs.tool.name} does by default is written out where it changes the",
        "# result; the rest has linchain's defaults: see `linchain check`.",
        *(f"# Missing: {field}" for field in missing),
        body,
    ]
    if theirs.remarks:
        lines += ["# Not said above:", *(f"#   {said}" for said in dict.fromkeys(theirs.remarks))]
    if left_out:
        lines.append(f"# Not needed: {', '.join(left_out)}")
    lines = [" ".join(line.splitlines()) if line.startswith("#") else line for line in lines]
    return "\n".join(lines).rstrip("\n") + "\n"
