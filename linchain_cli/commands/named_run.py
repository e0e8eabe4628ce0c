"""RUN, as several commands take it: its adapter, its recipe, its base and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli import console
from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError
from linchain_cli.run import Opened, RunDirectory, find_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.chain import Adapter
    from linchain_cli.data.asking import Asking
    from linchain_cli.export.card import Origin
    from linchain_cli.model.files import FoundBase
    from linchain_cli.recipe import Recipe


@dataclass(frozen=True)
class NamedRun:
    """A run and the adapter of it that is meant, not loaded."""

    opened: Opened
    recipe: Recipe

    @property
    def run(self) -> RunDirectory:
        return self.opened.run

    @property
    def imported(self) -> bool:
        return self.opened.status.imported is not None

    @property
    def recipe_from_here(self) -> Recipe:
        """Its recipe, whose files are named as they lie from the current directory."""
        from linchain_cli.data.relocation import recipe_from_here

        return recipe_from_here(self.recipe, self.run)

    @property
    def inputs(self) -> list[Path]:
        """The parts of the run that nothing may be written over."""
        return [self.run.adapter_dir, self.run.checkpoints_dir, self.run.eval_dir, self.run.recipe_path]

    @property
    def asking(self) -> Asking | None:
        """How the run's model was taught to be asked. None where nobody knows: of an adapter that was
        imported without a record, in whose recipe no template was named since."""
        from linchain_cli.data.asking import asking_of, read_asking

        if self.imported and (record := read_asking(self.run.path)) is not None:
            return record
        if self.imported and self.recipe.data.template == "auto":
            return None
        return asking_of(self.recipe.data, self.opened.status.rows)

    def warn_of_changed_base(
        self, base_directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Says so where the base's tokenizer (read here, if it is not given) or config.json was changed since
        the run was trained, which no hash of weights shows."""
        from linchain_cli.data.fingerprint import is_other_tokenizer
        from linchain_cli.model.computed import changed_values, computed_values
        from linchain_cli.model.files import read_config
        from linchain_cli.model.tokenizer import load_tokenizer

        if not is_first_process():
            return
        status, way = self.opened.status, "or name the base that has {} with --base MODEL"
        wanted = status.hashes.get("tokenizer")
        if wanted and is_other_tokenizer(tokenizer or load_tokenizer(base_directory), wanted):
            console.warn(
                f"{self.opened.name} was trained with another tokenizer than {base_directory} has now: put"
                f" back its tokenizer files, {way.format('them')}"
            )
        config = status.base and status.base.config
        if config and (changed := changed_values(config, computed_values(read_config(base_directory)))):
            console.warn(
                f"{self.opened.name} was trained with another config.json than {base_directory} has now"
                f" ({'; '.join(changed)}), so its base computes otherwise: put it back, {way.format('it')}"
            )

    def travelling_files(self, base_directory: Path, template_travels: bool = False) -> dict[str, bytes]:
        """The files that say how the run's model is asked and where it stops, by name; none where that is not
        known. Says what other programs do not read there; `template_travels`: a chat template of its own they
        do."""
        asking = self.asking
        if asking is None or self.recipe.task != "causal":
            return {}
        from linchain_cli.data.asking import template_of_asking, to_be_sent_along, travelling_files
        from linchain_cli.model.tokenizer import load_tokenizer

        if unread := to_be_sent_along(asking, template_travels):
            console.warn(
                f"{self.opened.name} was trained with {' and '.join(unread)}. Other programs do not read"
                " that in linchain_prompt.json: send it along, or the model is asked otherwise than trained"
            )
        try:
            tokenizer = load_tokenizer(base_directory)
            template = template_of_asking(asking, tokenizer)
            return travelling_files(asking, tokenizer, template, base_directory)
        except (InputError, OSError) as error:
            console.note(f"How to ask the model is not written beside it: {error}")
            return {}

    def longest_row(self, base_directory: Path) -> int | None:
        """The tokens that a classifier's rows were cut to. None of a model that writes, and where nobody
        knows: of one that was imported without a record."""
        recipe = self.recipe
        if recipe.task == "causal" or (self.imported and recipe.data.max_length == "auto"):
            return None
        from linchain_cli.data.dataset import longest_row
        from linchain_cli.model.classifier import Outputs
        from linchain_cli.model.config import empty_model
        from linchain_cli.model.limits import limits
        from linchain_cli.model.tokenizer import load_tokenizer

        readable = limits(empty_model(base_directory, Outputs.unknown(recipe.task)))
        positions = readable.positions if readable.table else None
        return longest_row(recipe.data, load_tokenizer(base_directory), positions)

    def find_base(self, base: str | None = None, weights: bool = True) -> FoundBase:
        """The base's checkpoint: at `base`, or where the run found it.

        Raises:
            InputError: it is not there, or cannot be fetched.
        """
        from linchain_cli.model.files import find_base

        model = self.recipe.model
        known = self.opened.status.base_of(model.path, model.revision)
        try:
            return find_base(known, named=base, near=self.run.path, weights=weights)
        except InputError as error:
            if base is not None:
                raise
            raise InputError(
                f"the base model of {self.opened.name}, '{model.path}': {error} Say where it is now with"
                " --base MODEL."
            ) from error

    def base_directory(self, base: str | None = None, weights: bool = True) -> Path:
        """The directory of `find_base`."""
        return self.find_base(base, weights).directory

    def load_adapter(self) -> Adapter:
        """Reads it.

        Raises:
            InputError: it is damaged.
        """
        from linchain_cli.chain import load_adapter

        return load_adapter(self.opened.adapter_dir)


@dataclass(frozen=True)
class AdaptedRun(NamedRun):
    """A run with its adapter in memory."""

    adapter: Adapter

    def origin(self, found: FoundBase, base: str | None = None) -> Origin:
        """What a model card says of it and of its base."""
        from linchain_cli import result_files
        from linchain_cli.chain.files import adapter_hash
        from linchain_cli.export.card import Origin, PublishedBase

        results, _ = result_files.find_evaluations(self.opened.place("eval"))
        if found.source is not None:
            published = PublishedBase.at(Path(found.source))
        else:
            model = self.recipe.model
            revision = found.commit or (None if base else model.revision)
            published = PublishedBase.on_hub(base or model.path, revision)
        return Origin(
            name=self.recipe.name,
            base=published,
            recipe=None if self.imported else self.recipe.to_yaml(),
            data=() if self.imported else tuple(source.path for source in self.recipe.data.sources),
            results=tuple(
                line
                for line in result_files.table(results, adapter_hash(self.opened.adapter_dir))
                if not line.earlier
            ),
        )


def name_run(path: Path | str | None) -> NamedRun:
    """The run at `path`, or the newest finished one. Which adapter that is goes to stderr, unless it was
    named.

    Raises:
        InputError: there is none, or its recipe cannot be read.
    """
    opened = find_adapter(path)
    if is_first_process():
        if opened.note:
            console.note(opened.note)
        elif path is None:
            console.note(f"run {opened.name}")
    from linchain_cli.recipe import load_recipe

    return NamedRun(opened, load_recipe(opened.run.recipe_path))


def open_run(path: Path | None) -> AdaptedRun:
    """`name_run`, with its adapter loaded.

    Raises:
        InputError: as `name_run`, or its adapter cannot be read.
    """
    named = name_run(path)
    from linchain_cli.machine import limit_threads

    limit_threads()
    return AdaptedRun(named.opened, named.recipe, named.load_adapter())
