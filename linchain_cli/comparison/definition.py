"""comparison.json: base recipe, arms and seeds of a comparison, across all calls that add to it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linchain_cli import directories, storage
from linchain_cli.comparison.grid import Arm, Grid, refuse_other_base
from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe
from linchain_cli.run import ComparisonDirectory, RunDirectory, refuse_foreign

FORMAT_VERSION = 1


@dataclass
class Definition:
    """Arms with the seeds that each is trained with, in the order in which they were first asked for.

    `commands` are the words behind `linchain compare RECIPE` that asked for them.
    """

    base: Recipe
    equal_parameters: bool
    arms: list[Arm] = field(default_factory=list)
    seeds: dict[str, list[int]] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)

    def add(self, arms: Sequence[Arm], seeds: Sequence[int], command: Sequence[str] = ()) -> list[Arm]:
        """Takes arms and seeds in and returns the arms as it knows them: a known one keeps its name."""
        if list(command) not in self.commands:
            self.commands.append(list(command))
        known = {arm.identity: arm for arm in self.arms}
        names = {arm.name for arm in self.arms}
        found = []
        for arm in arms:
            if arm.identity not in known:
                if arm.name in names:
                    mark = storage.sha256_bytes(arm.identity.encode())[:8]
                    arm = replace(arm, name=f"{arm.name[:180]}-{mark}")
                known[arm.identity] = arm
                names.add(arm.name)
                self.arms.append(arm)
            own = known[arm.identity]
            before = self.seeds.setdefault(own.name, [])
            before += [seed for seed in seeds if seed not in before]
            found.append(own)
        return found

    def write(self, directory: ComparisonDirectory) -> None:
        arms = [
            {
                "name": arm.name,
                "seeds": self.seeds[arm.name],
                "alpha": arm.alpha,
                "recipe": arm.recipe.model_dump(mode="json"),
            }
            for arm in self.arms
        ]
        content = {
            "format": FORMAT_VERSION,
            "equal_parameters": self.equal_parameters,
            "commands": self.commands,
            "recipe": self.base.model_dump(mode="json"),
            "arms": arms,
        }
        storage.make_directory(directory.path.resolve())
        storage.write_json(directory.definition_path, content)


def read_definition(directory: ComparisonDirectory) -> Definition:
    """What `Definition.write` wrote.

    Raises:
        InputError: it is damaged, or of another version of linchain.
    """
    path = directory.definition_path
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content["format"] != FORMAT_VERSION:
            raise InputError(f"{path} has format {content['format']}; this linchain reads {FORMAT_VERSION}")
        return Definition(
            Recipe.model_validate(content["recipe"]),
            bool(content["equal_parameters"]),
            [
                Arm(arm["name"], Recipe.model_validate(arm["recipe"]), float(arm["alpha"]))
                for arm in content["arms"]
            ],
            {arm["name"]: list(map(int, arm["seeds"])) for arm in content["arms"]},
            [list(map(str, words)) for words in content["commands"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged ({reason}): start over with --fresh") from error


def open_definition(directory: ComparisonDirectory, grid: Grid, equal_parameters: bool) -> Definition:
    """The comparison that exists in `directory` if it is of the same recipe, else a new one.

    Raises:
        InputError: something else lies there, or a comparison of another recipe or kind.
    """
    if not directory.exists():
        _refuse_what_lies_there(directory.path)
        return Definition(grid.base, equal_parameters)
    saved = read_definition(directory)
    refuse_other_base(grid.base, saved.base, directory.path)
    if saved.equal_parameters != equal_parameters:
        had = "with" if saved.equal_parameters else "without"
        raise InputError(
            f"{directory.path} holds a comparison {had} --equal-parameters. Give this one another name"
            " (name=NEW), or replace the old one with --fresh."
        )
    return Definition(grid.base, equal_parameters, saved.arms, saved.seeds, saved.commands)


def _refuse_what_lies_there(path: Path) -> None:
    if RunDirectory(path).exists():
        raise InputError(f"{path} holds a run, not a comparison: give the comparison another name (name=NEW)")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"{path} exists and is no comparison; it is left alone. Choose another name (name=NEW) or"
            " output_dir."
        )


_PARTS = re.compile(
    r"(comparison|results|tuning)\.json|(results|runs)\.csv|(loss|tuning)\.png|report\.html|recipe\.yaml|arms|base"
)


def remove(directory: ComparisonDirectory) -> None:
    """Removes a comparison with all its arms.

    Raises:
        InputError: its directory holds what linchain did not write.
    """
    if directory.exists():
        refuse_foreign(directory.path, _PARTS)
        directories.remove_directory(directory.path)


def arm_recipe(arm: Arm, seed: int, directory: ComparisonDirectory) -> Recipe:
    """The recipe of one run: an arm with a seed, below arms/.

    It keeps its last adapter, so that accuracies and losses are those of the same one, and no run has chosen
    it by the rows that arms are compared on.
    """
    training = arm.recipe.training.model_copy(update={"keep": "last"})
    update = {"name": f"{arm.name}_seed-{seed}", "output_dir": str(directory.arms_dir), "seed": seed}
    return arm.recipe.model_copy(update={**update, "training": training})
