"""The model card: a README.md beside every export that says what it is, where it comes from and how to load
it. Cards get published: they name no directory of the machine that they were written on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import yaml

from linchain_cli import __version__
from linchain_cli.chain import Adapter, adapter_kind
from linchain_cli.chain.head import Head
from linchain_cli.result_files import Line, TaskScore, heading

if TYPE_CHECKING:
    from linchain_cli.export.classifier import Loading

Kind = Literal["merged", "peft", "gguf"]
PLACE = "path/of/this/directory"

# A checkpoint of the hub in its cache: models--<organisation>--<name>/snapshots/<commit>
_SNAPSHOT = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True)
class PublishedBase:
    """The base model as it is named to others.

    name: its hub id, or the last part of a local path
    hub_id, revision: where anybody can load it; None for a local model
    path: where this machine can load it: the hub id, or the absolute path, which no card shows
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None

    @classmethod
    def on_hub(cls, hub_id: str, revision: str | None = None) -> PublishedBase:
        return cls(hub_id, hub_id, revision, hub_id)

    @classmethod
    def at(cls, path: Path) -> PublishedBase:
        """The model at a local path, which is the hub's if it lies in the hub's cache."""
        path = Path(path).absolute()
        if snapshot := _SNAPSHOT.fullmatch(path.as_posix()):
            return cls.on_hub(snapshot["id"].replace("--", "/", 1), snapshot["commit"])
        return cls(path.name, path=str(path))

    @property
    def is_gguf(self) -> bool:
        return self.hub_id is None and self.name.lower().endswith(".gguf")


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from, as far as it is known.

    base: None where it is not known how it is called
    recipe: the resolved recipe as YAML; None for an adapter that was imported
    data: the training sources by name
    results: the adapter's evaluations, a line per task and setting
    parts: weight and name of each run that the adapter is a sum of; empty for one run's own
    """

    name: str
    base: PublishedBase | None = None
    recipe: str | None = None
    data: tuple[str, ...] = ()
    results: tuple[Line, ...] = ()
    parts: tuple[tuple[float, str], ...] = ()


def model_card(
    kind: Kind,
    adapter: Adapter,
    origin: Origin,
    facts: Mapping[str, str],
    auto_class: str,
    loading: Loading | None = None,
) -> str:
    """The card's Markdown.

    Args:
        facts: lines of the proof, by caption.
        auto_class: transformers' class that loads the base, such as AutoModelForCausalLM.
        loading: what the base of a classifier is loaded with.
    """
    config = adapter.config
    base = origin.base or PublishedBase("a base model that is not named")
    what = {
        "merged": f"`{base.name}` with a trained adapter folded in. It loads and runs like the base.",
        "peft": f"An adapter for `{base.name}` as a plain LoRA of rank {config.rank} in PEFT's file format.",
        "gguf": f"An adapter for `{base.name}` as a LoRA of rank {config.rank} for llama.cpp and Ollama.",
    }[kind]
    parts = [
        _front_matter(kind, base, auto_class),
        f"# {origin.name}",
        f"{what} {_made(adapter, origin)} Every ΔW has rank {config.rank} at most.",
        "## Base",
        f"`{base.name}`"
        + (f" at revision `{base.revision}`" if base.revision else "")
        + (f", weights `{adapter.base['hash']}`" if adapter.base.get("hash") else "")
        + ". Its licence and its limits hold for this derivative too.",
        _labels(adapter.head, loading, origin.recipe),
        "## Data",
        "\n".join(f"- `{_without_folders(source)}`" for source in origin.data)
        or "Not known: the adapter was imported.",
        "## Results",
        _results(origin.results),
        "## What was verified when it was written" if facts else "",
        "\n".join(f"- {caption}: {value}" for caption, value in facts.items()),
        "## How to load it",
        _use(kind, base, auto_class, loading),
        "" if origin.recipe is None else f"## Recipe\n\n```yaml\n{_published_recipe(origin.recipe)}```",
        f"Written by linchain {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(adapter: Adapter, origin: Origin) -> str:
    config, modules = adapter.config, f"{len(adapter.tensors)} linear modules"
    if origin.parts:
        parts = " + ".join(f"{weight:g} × `{name}`" for weight, name in origin.parts)
        return f"The adapter is a weighted sum, {parts}, on {modules}."
    return (
        f"The adapter was trained as {adapter_kind(config.depth)}, rank {config.rank}, alpha"
        f" {config.alpha:g}, on {modules}."
    )


def _labels(head: Head | None, loading: Loading | None, recipe: str | None) -> str:
    """What a classifier tells, and of what where a tokenizer would join two texts otherwise."""
    if head is None:
        return ""
    told = "\n".join(f"{number}. `{name}`" for number, name in enumerate(head.classes))
    parts = ["## Labels", told or "One number: a regression."]
    if loading and loading.max_length:
        cut = f"`truncation=True, max_length={loading.max_length}`"
        parts.append(
            f"Rows were read up to {loading.max_length:,} tokens: call tokenizer or pipeline with {cut}."
        )
    if loading and not loading.paired and "text_pair" in (recipe or ""):
        parts.append('Two texts were given as one, with a line break between them: `f"{first}\\n{second}"`.')
    return "\n\n".join(parts)


def _front_matter(kind: Kind, base: PublishedBase, auto_class: str) -> str:
    fields: dict[str, Any] = {
        "library_name": {"peft": "peft", "gguf": "gguf"}.get(kind, "transformers"),
        "pipeline_tag": _pipeline(auto_class),
        "tags": ["linchain"],
    }
    if base.hub_id:
        fields["base_model"] = base.hub_id
        fields["base_model_relation"] = "finetune" if kind == "merged" else "adapter"
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---"


def _pipeline(auto_class: str) -> str:
    """What the hub calls what the model does."""
    if "SequenceClassification" in auto_class:
        return "text-classification"
    return "image-text-to-text" if _has_images(auto_class) else "text-generation"


def _has_images(auto_class: str) -> bool:
    return "ImageText" in auto_class


def _use(kind: Kind, base: PublishedBase, auto_class: str, loading: Loading | None) -> str:
    """Commands that load it."""
    if kind == "gguf":
        return (
            "With llama.cpp, and with Ollama by the `Modelfile` here (its `FROM` names the base):\n\n"
            "```bash\nllama-cli -m BASE.gguf --lora adapter.gguf\n"
            "ollama create my-model -f Modelfile && ollama run my-model\n```"
        )
    reader = "AutoProcessor" if _has_images(auto_class) else "AutoTokenizer"
    imports = f"from transformers import {', '.join(sorted((auto_class, reader)))}"
    name = {"AutoProcessor": "processor", "AutoTokenizer": "tokenizer"}[reader]
    if kind == "merged":
        lines = [
            imports,
            "",
            f'model = {auto_class}.from_pretrained("{PLACE}")',
            f'{name} = {reader}.from_pretrained("{PLACE}")',
        ]
    else:
        place = f'"{base.hub_id or "path/of/the/base"}"'
        if base.revision:
            place += f', revision="{base.revision}"'
        if base.is_gguf:
            place = f'"path/of/its/directory", gguf_file="{base.name}"'
        more = "".join(f", {key}={value}" for key, value in (loading.arguments if loading else {}).items())
        lines = [
            "from peft import PeftModel",
            imports,
            "",
            f"base = {auto_class}.from_pretrained({place}{more})",
            f'model = PeftModel.from_pretrained(base, "{PLACE}")',
            f"{name} = {reader}.from_pretrained({place})",
        ]
        if loading and loading.pad_token:
            lines.append(f"{name}.pad_token = {json.dumps(loading.pad_token, ensure_ascii=False)}")
    return "```python\n" + "\n".join(lines) + "\n```"


def _published_recipe(recipe: str) -> str:
    """A recipe whose absolute paths are cut to their last part."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        return _without_folders(value) if isinstance(value, str) else value

    return yaml.safe_dump(cut(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True, width=100)


def _without_folders(path: str) -> str:
    """The last part of an absolute path, which says whose machine it was; anything else as it is."""
    if "\n" not in path and (path.startswith("~") or PurePath(path).is_absolute()):
        return PurePath(path).name or path
    return path


def _results(lines: Sequence[Line]) -> str:
    """One table of all tasks and settings; accuracies in per cent."""
    if not lines:
        return "Not evaluated."
    rows = [
        f"| {_without_folders(line.task)} | {_percent(line.score.accuracy)} | {_percent(line.score.stderr)} |"
        f" {'–' if line.score.n is None else line.score.n} | {_others(line.score)} | {line.setting} |"
        for line in lines
    ]
    head = "| task | accuracy | standard error | rows | beside it | how |\n|---|---|---|---|---|---|\n"
    return "Accuracy in per cent:\n\n" + head + "\n".join(rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _others(score: TaskScore) -> str:
    return ", ".join(
        f"{heading(name)} {_percent(metric.value) if metric.is_share else f'{metric.value:.4g}'}"
        for name, metric in score.metrics.items()
    )
