"""What `merge`, `export` and `inspect` know of the run they work on: its adapter, its recipe, its base and
its results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory, find_run

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.export.card import Origin
    from linchain_cli.recipe import Recipe


@dataclass(frozen=True)
class AdaptedRun:
    """A finished run with its adapter in memory."""

    run: RunDirectory
    recipe: Recipe
    adapter: Adapter
    imported: bool

    @property
    def origin(self) -> Origin:
        """What a model card says of it."""
        from linchain_cli.export.card import Origin

        return Origin(
            name=self.recipe.name,
            recipe=None if self.imported else self.recipe.to_yaml(),
            data=() if self.imported else tuple(source.path for source in self.recipe.data.sources),
            results={path.stem: result for path, result in _results(self.run.eval_dir)},
        )

    @property
    def inputs(self) -> list[Path]:
        """The parts of the run that nothing may be written over."""
        return [self.run.adapter_dir, self.run.checkpoints_dir, self.run.eval_dir, self.run.recipe_path]

    def base_directory(self, base: str | None = None, weights: bool = True) -> Path:
        """Where the base's checkpoint is: at `base`, or where the run found it.

        Raises:
            InputError: it is not there, or cannot be fetched.
        """
        from linchain_cli.model.files import locate

        if base is not None:
            return locate(base, weights=weights)
        model = self.recipe.model
        try:
            return locate(model.path, model.revision, weights=weights)
        except InputError as error:
            raise InputError(
                f"the run's base model: {error} Or say where it is now: --base MODEL."
            ) from error


def open_run(path: Path | None) -> AdaptedRun:
    """The finished run at `path`, or the newest one, whose name is printed then.

    Raises:
        InputError: there is none, or its adapter or recipe cannot be read.
    """
    run = find_run(path)
    if path is None:
        print(f"run {run.path}")
    from linchain_cli.chain import load_adapter
    from linchain_cli.machine import limit_threads
    from linchain_cli.recipe import load_recipe

    limit_threads()
    imported = bool(run.read_status().get("imported"))
    return AdaptedRun(run, load_recipe(run.recipe_path), load_adapter(run.adapter_dir), imported)


def _results(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The run's evaluations; a file that is none is passed over, since a card can do without."""
    found = []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            result = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(result, dict) and isinstance(result.get("tasks"), dict):
            found.append((path, result))
    return found
