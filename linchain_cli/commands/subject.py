"""MODEL, as several commands take it: a run (adapter on base), a checkpoint, a hub id or a .gguf file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.commands.named_run import NamedRun, name_run
from linchain_cli.errors import InputError
from linchain_cli.run import ComparisonDirectory, is_adapter, is_run, runs_below
from linchain_cli.storage import expand

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linchain_cli.chain import Adapter
    from linchain_cli.data.asking import Asking
    from linchain_cli.data.rows import Template
    from linchain_cli.model.classifier import Outputs
    from linchain_cli.recipe import EvaluationConfig, Recipe


@dataclass(frozen=True)
class Subject:
    """A model that is named but not loaded. `named` is None unless it is a run; `base` is where its base is
    now, None where the run found it."""

    name: str
    named: NamedRun | None = None
    base: str | None = None
    allow_other_base: bool = False

    @property
    def recipe(self) -> Recipe | None:
        return self.named and self.named.recipe

    @property
    def evaluation(self) -> EvaluationConfig | None:
        """What its recipe says of evaluating it, its files named as they lie from here; None of no run."""
        return self.named and self.named.recipe_from_here.evaluation

    @property
    def asking(self) -> Asking | None:
        """How it was taught to be asked, as its run or its directory says."""
        from linchain_cli.data.asking import read_asking

        if self.named is not None:
            return self.named.asking
        return read_asking(locate_subject(self, weights=False))

    @property
    def results_dir(self) -> Path:
        """Where evaluations of it go by default."""
        if self.named is not None:
            return self.named.opened.place("eval")
        parts = [part for part in Path(self.name).parts if part not in ("/", ".", "..")]
        return Path("-".join(["eval", *parts[-2:]]))


@dataclass(frozen=True)
class LoadedModel:
    """A subject's model and tokenizer, and what tells it from others in a result; `outputs` are those of a
    classifier."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base_sha256: str
    quantization: str
    outputs: Outputs | None = None
    adapter_sha256: str | None = None


@dataclass(frozen=True)
class Asked:
    """What prompts go through, and why: `straddles` as for `encode_prompt`, `system` of conversations."""

    template: Template
    straddles: bool | None
    why: str
    system: str | None = None


def choose_template(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, name: str | None = None, like: Subject | None = None
) -> Asked:
    """The template of that name; left out, the one that the subject was trained with, or else that `like`
    was: two models that are compared get the same prompts. Without a record of any it is the model's own
    chat template, or alpaca where it has none.

    Raises:
        InputError: the model has no chat template that can be used.
    """
    from linchain_cli.data.asking import template_of_asking
    from linchain_cli.data.templates import get_template

    own = subject.asking and subject.asking.chat_template
    if name == "chat" and not own and not tokenizer.chat_template:
        raise InputError(
            f"--template chat: {subject.name} has no chat template. Name another, or leave the option out."
        )
    for source in (one for one in (subject, like) if one is not None):
        asking = source.asking
        if asking is None:
            continue
        template = template_of_asking(asking, tokenizer, name)
        why = "as asked for" if name else f"as {source.name} was trained"
        return Asked(template, asking.straddles if name is None else None, why, asking.system)
    if name is not None:
        return Asked(get_template(name, tokenizer), None, "as asked for")
    if tokenizer.chat_template:
        why = f"{subject.name} has a chat template, and no record of another one"
        return Asked(get_template("chat", tokenizer), None, why)
    why = f"{subject.name} has no chat template, and no record of its training"
    return Asked(get_template("alpaca", tokenizer), None, why)


def find_subject(name: str | None, base: str | None = None, allow_other_base: bool = False) -> Subject:
    """The run or checkpoint of that name; None is the newest finished run.

    Raises:
        InputError: a run without an adapter, a name that can be neither a run, a checkpoint nor a hub id, or
        `base` for what is no run. Whether the hub has it shows in `locate_subject`.
    """
    from linchain_cli.model.files import looks_local, refuse_missing

    if name is not None and name.startswith("~"):
        name = str(expand(name))
    if name is None or is_run(name) or is_adapter(name) or ComparisonDirectory(name).exists():
        named = name_run(name)
        return Subject(named.opened.name, named, base, allow_other_base)
    if base is not None:
        raise InputError(f"--base is for runs, and {name} is none")
    if not Path(name).exists() and is_run(Path("runs", name)):
        raise InputError(f"there is no {name} here. Did you mean 'runs/{name}'?")
    if looks_local(name) and not Path(name).exists():
        refuse_missing(name, [str(path) for path in runs_below(Path("runs"))])
    return Subject(name.rstrip("/") or name)


def is_model(name: str) -> bool:
    """Whether a word on the command line names a run, an adapter or a checkpoint that is here."""
    path = Path(name)
    return len(name) < 1000 and (is_run(path) or is_adapter(path) or (path / "config.json").is_file())


def locate_subject(subject: Subject, weights: bool = True) -> Path:
    """The checkpoint directory of its base, downloaded or converted first where need be.

    Raises:
        InputError: there is none.
    """
    from linchain_cli.model.files import locate

    if subject.named is not None:
        return subject.named.base_directory(subject.base, weights=weights)
    return locate(subject.name, weights=weights)


def predicts_labels(subject: Subject) -> bool:
    """Whether it is a classifier or a regression: a run of such a task, or a checkpoint of such a model."""
    from linchain_cli.model.classifier import names_classifier
    from linchain_cli.model.files import read_config

    if subject.recipe is not None:
        return subject.recipe.task != "causal"
    return names_classifier(read_config(locate_subject(subject, weights=False)).get("architectures"))


def refuse_classifier(subject: Subject) -> None:
    """Raises InputError for a model that predicts labels and writes no text."""
    if predicts_labels(subject):
        raise InputError(
            f"{subject.name} is a classifier (or a regression): it predicts labels and writes no text."
            " linchain eval measures how well: --tasks FILE"
        )


def subject_tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    """Its tokenizer, which says how it can be asked before its weights are read."""
    from linchain_cli.model.tokenizer import load_tokenizer

    return load_tokenizer(locate_subject(subject))


def load_subject(
    subject: Subject, dtype: str | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedModel:
    """Loads it onto the GPU, or the CPU without one; a run's adapter is attached to its base.

    `dtype` None is float32 on a CPU and elsewhere the recipe's, or `auto`.

    Raises:
        InputError: the model cannot be found or read, is none that reads from left to right, or a run's base
        is not the one it was trained on.
    """
    from linchain_cli.chain import attach
    from linchain_cli.chain.files import adapter_hash
    from linchain_cli.machine import collect_memory, limit_threads
    from linchain_cli.model.hashing import refuse_other_base
    from linchain_cli.model.head import refuse_looking_ahead
    from linchain_cli.model.loading import load_model

    limit_threads()
    config = subject.recipe.model if subject.recipe else None
    directory = locate_subject(subject)
    device = process_device()
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else (config.dtype if config else "auto")
    quantization = config.quantization if config else "none"
    options = {"quantization": quantization, "attention": config.attention if config else "auto"}
    adapter = subject.named.load_adapter() if subject.named else None
    wanted = adapter.base.get("hash") if adapter else None
    weights = refuse_other_base(directory, wanted, subject.name, allow=subject.allow_other_base)
    tokenizer = tokenizer or subject_tokenizer(subject)
    if subject.named is not None:
        subject.named.warn_of_changed_base(directory, tokenizer)
    outputs = _outputs(subject, adapter, directory)
    collect_memory()  # a model that was evaluated before must go before this one comes
    model = load_model(directory, dtype=dtype, device=device, outputs=outputs, **options)
    if outputs is None:
        refuse_looking_ahead(model)
    values = None
    if adapter is not None:
        attach(model, adapter)
        values = adapter_hash(subject.named.opened.adapter_dir)
    return LoadedModel(model, tokenizer, weights, quantization, outputs, values)


def _outputs(subject: Subject, adapter: Adapter | None, directory: Path) -> Outputs | None:
    """What the subject predicts, if it is a classifier."""
    from linchain_cli.model.classifier import Outputs
    from linchain_cli.model.config import stored_outputs
    from linchain_cli.model.files import read_config

    if adapter is not None:
        return Outputs(adapter.head.classes) if adapter.head else None
    if not predicts_labels(subject):
        return None
    if read_config(directory).get("problem_type") == "multi_label_classification":
        raise InputError(
            f"{subject.name} predicts several labels at once (its config.json: problem_type), which cannot be"
            " measured here: name a model that predicts one"
        )
    return stored_outputs(directory)


def process_device() -> torch.device:
    """This process's device: of several processes on a machine, each has a GPU of its own."""
    import torch

    from linchain_cli.training.launch import world_size

    if world_size() > 1:
        import atexit

        from accelerate import PartialState

        from linchain_cli.training.processes import PATIENCE, disconnect, join_group

        join_group()
        atexit.register(disconnect)
        return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).device
    from linchain_cli.model.loading import default_device

    return default_device()
