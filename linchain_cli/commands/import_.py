"""linchain import"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linchain_cli import console
from linchain_cli.commands.adapter_run import write_adapter_run
from linchain_cli.commands.options import Json, Overwrite
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.chain.head import Head
    from linchain_cli.importing.convert import Imported
    from linchain_cli.importing.foreign import ForeignAdapter
    from linchain_cli.model.files import FoundBase
    from linchain_cli.run import RunStatus


def run(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="An adapter of PEFT LoRA (a classifier's, too), MoSLoRA or the LinChain authors' code: its"
            " directory or hub id.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes, as a run.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model; left out, the one the checkpoint names.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION",
            help="Of an adapter on the hub: a branch, a tag or a commit.",
            show_default=False,
        ),
    ] = None,
    drop_bias: Annotated[
        bool, typer.Option("--drop-bias", help="Leave out trained biases, which no weight can hold.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What a classifier's classes are called, in the order of its outputs; left out, as the"
            " checkpoint or its base says, else LABEL_0, LABEL_1, ...",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Read an adapter that another tool wrote."""
    from linchain_cli.export.output import check_output
    from linchain_cli.export.receipts import ImportReceipt
    from linchain_cli.importing.convert import import_adapter
    from linchain_cli.importing.finding import find_checkpoint
    from linchain_cli.importing.foreign import read_foreign

    foreign = read_foreign(find_checkpoint(checkpoint, revision))
    target = check_output(out, ImportReceipt, overwrite=overwrite, sources=[foreign.directory])
    path = base or foreign.config.get("base_model_name_or_path")
    if not path:
        raise InputError(f"{checkpoint} names no base model: say which it is with --base MODEL")
    names = _label_names(foreign, labels)
    found = _find_base(foreign, path, names, given=base is not None)
    origin = {"path": path, "revision": foreign.config.get("revision"), "hash": found.hash}
    imported = import_adapter(foreign, drop_bias=drop_bias, base=origin, names=found.names, head=found.head)
    adapter = found.shorten(imported.adapter)
    how = _what_it_tells(foreign, adapter) if adapter.head else _how_it_is_asked(foreign, out)
    notes = [note for note in (found.note, how) if note]
    status = _write(target, imported, adapter, foreign, found.place, overwrite)
    if json:
        console.print_json(_as_json(out, adapter, status, notes))
    else:
        _show(out, imported, adapter, notes)


@dataclass(frozen=True)
class _Base:
    """What is known of the base: the model without its weights, the checkpoint's module names in it, the hash
    of its weights, what could not be checked, and a classifier's head on it."""

    model: Any = None
    names: Mapping[str, str] = field(default_factory=dict)
    hash: str | None = None
    note: str = ""
    place: FoundBase | None = None
    head: Head | None = None

    def shorten(self, adapter: Adapter) -> Adapter:
        """The adapter with names as its targets instead of whole paths, where the base shows that they do."""
        if self.model is None:
            return adapter
        from linchain_cli.importing.fit import short_targets
        from linchain_cli.model.config import text_decoder_prefix

        return short_targets(adapter, self.model, text_decoder_prefix(self.model))


def _find_base(foreign: ForeignAdapter, path: str, labels: Sequence[str], given: bool) -> _Base:
    """Looks the checkpoint's modules up in the base, where it is at hand; its weights are fetched only to be
    compared with whole ones that were saved beside the adapter.

    Args:
        labels: what a classifier's classes are called, if that is known.

    Raises:
        InputError: the modules are not in the base, or a base that was named on the command line cannot be
        had.
    """
    from linchain_cli.importing.classifier import outputs_of, read_head
    from linchain_cli.importing.fit import check_base_weights, fit_to_model
    from linchain_cli.model.checkpoint import open_checkpoint
    from linchain_cli.model.classifier import Outputs
    from linchain_cli.model.config import empty_model
    from linchain_cli.model.files import found_at, locate
    from linchain_cli.model.hashing import base_hash

    whole, told = list(foreign.base_weights), None
    try:
        needed = bool(whole) or foreign.is_classifier
        directory = locate(path, foreign.config.get("revision"), weights=needed)
        model = empty_model(directory, Outputs.unknown("classification") if foreign.is_classifier else None)
    except InputError as error:
        if given:
            raise
        if foreign.is_classifier:
            raise InputError(
                f"{foreign.directory} is a classifier's, whose head cannot be read without the base: {error}"
                " Say where it is with --base MODEL."
            ) from error
        if whole:
            raise InputError(
                f"{foreign.directory} holds the weight of '{whole[0]}' whole. Whether that is the base's own"
                f" cannot be told without the base: {error} Say where it is with --base MODEL."
            ) from error
        return _Base(note=f"The base is not at hand, so its modules were not checked: {error}")
    if foreign.is_classifier:
        told = outputs_of(foreign, directory, labels)
        model = empty_model(directory, told)
    names = fit_to_model(foreign, model)
    if whole:
        check_base_weights(foreign, model, open_checkpoint(directory))
    place = found_at(path, directory)
    head = read_head(foreign, model, told, directory) if told else None
    return _Base(model, names, base_hash(directory) if place.source else None, place=place, head=head)


def _write(
    target: Path,
    imported: Imported,
    adapter: Adapter,
    foreign: ForeignAdapter,
    place: FoundBase | None,
    overwrite: bool,
) -> RunStatus:
    from linchain_cli.data.asking import read_asking
    from linchain_cli.data.telling import read_telling

    telling = read_telling(foreign.directory) if adapter.head else None
    return write_adapter_run(
        target,
        adapter,
        place,
        {
            "from": str(foreign.directory),
            "padded": list(imported.padded),
            "rescaled": list(imported.rescaled),
            "biases_dropped": [asdict(loss) for loss in imported.losses],
        },
        asking=read_asking(foreign.directory),
        prompts={"template": "llm-adapters"} if _of_the_authors(foreign) else None,
        max_length=telling and telling.max_length,
        overwrite=overwrite,
    )


def _label_names(foreign: ForeignAdapter, labels: str | None) -> list[str]:
    """What a classifier's classes are called: as the option, or the checkpoint's directory, says; none where
    nobody does."""
    from linchain_cli.data.telling import read_telling

    if labels is None:
        telling = read_telling(foreign.directory) if foreign.is_classifier else None
        return telling.classes if telling else []
    if not foreign.is_classifier:
        raise InputError(f"--labels {labels}: {foreign.directory} is no classifier's adapter")
    names = [name.strip() for name in labels.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"--labels {labels}: expected different names with commas between them")
    return names


def _what_it_tells(foreign: ForeignAdapter, adapter: Adapter) -> str:
    from linchain_cli.data.telling import TELLING_FILE, read_telling
    from linchain_cli.errors import some

    classes = adapter.head.classes
    told = f"predicts {some(classes)}" if classes else "predicts a number: a regression"
    if telling := read_telling(foreign.directory):
        cut = f", of rows of up to {telling.max_length:,} tokens" if telling.max_length else ""
        return f"{told}{cut}, as its {TELLING_FILE} says"
    if classes and classes[0] == "LABEL_0":
        told += ", whose names are not recorded with it (--labels NAME,... names them)"
    return f"{told}; rows are cut where the base's tokenizer cuts, or at data.max_length in its recipe.yaml"


def _of_the_authors(foreign: ForeignAdapter) -> bool:
    """Whether the LinChain authors' code wrote it, whose prompts are LLM-Adapters'."""
    return any(module.mixer_biases for module in foreign.modules.values()) or "mixer_num" in foreign.config


def _how_it_is_asked(foreign: ForeignAdapter, out: Path) -> str:
    from linchain_cli.data.asking import ASKING_FILE, read_asking

    if (asking := read_asking(foreign.directory)) is not None:
        name = asking.template if isinstance(asking.template, str) else "its own"
        return f"prompt template: {name}, as its {ASKING_FILE} says"
    if _of_the_authors(foreign):
        return "prompt template: llm-adapters, which the LinChain authors' code trains with"
    return (
        "prompt template: not recorded with it. It is asked through the base's chat template, or alpaca where"
        f" there is none; if it was trained with another one, set data.template in {out / 'recipe.yaml'}"
    )


def _as_json(out: Path, adapter: Adapter, status: RunStatus, notes: list[str]) -> dict[str, Any]:
    config = adapter.config
    return {
        "directory": str(out),
        "base": adapter.base,
        "rank": config.rank,
        "depth": config.depth,
        "alpha": config.alpha,
        "modules": len(adapter.tensors),
        **status.imported,
        "notes": notes,
    }


def _show(out: Path, imported: Imported, adapter: Adapter, notes: list[str]) -> None:
    from linchain_cli.chain import adapter_kind
    from linchain_cli.importing.convert import describe_losses

    config = adapter.config
    kind = adapter_kind(config.depth)
    print(f"{out}: {kind} of rank {config.rank}, alpha {config.alpha:g}, on {len(adapter.tensors)} modules")
    if imported.padded:
        print(
            f"  {len(imported.padded)} modules of smaller rank were filled with zeros up to {config.rank}:"
            " the same ΔW"
        )
    if imported.rescaled:
        print(
            f"  {len(imported.rescaled)} modules had another scaling, which went into their B: the same ΔW"
            " to rounding"
        )
    if imported.losses:
        print(f"  biases dropped: {describe_losses(imported.losses)}")
    for note in notes:
        print(f"  {note}")
