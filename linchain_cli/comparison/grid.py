"""From `key=value,value` words to arms: recipes that differ in what is compared and in nothing else."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, load_recipe, within
from linchain_cli.storage import sha256_bytes

DEPTH, INIT, RATE = "adapter.depth", "adapter.init", "training.learning_rate"
LINKS_RATE, SCALE = "training.lr_multiplier.links", "adapter.scale"

# What decides rows, their order, the loss's meaning or how it is measured: arms that differ in it say nothing
# about each other. Names of sections stand for all their keys.
HELD = (
    "task", "name", "output_dir", "seed", "data", "evaluation", "model.path", "model.revision",
    "training.epochs",
    "training.max_steps", "training.global_batch_size", "training.log_every", "training.eval_every",
    "training.save_every", "training.keep_checkpoints", "training.keep", "training.best_by",
    "training.early_stopping",
    "training.trackers",
)  # fmt: skip
# What may change between the calls that make up one comparison: it touches no loss.
FREE = (
    "name",
    "output_dir",
    "seed",
    "evaluation",
    "training.save_every",
    "training.keep_checkpoints",
    "training.keep",
    "training.trackers",
)


@dataclass(frozen=True)
class Arm:
    """One combination of values. `recipe.seed` is whatever the recipe has; a run of the arm sets its own.

    `alpha` is the one that was asked for: with --equal-parameters the recipe's was changed with its rank.
    """

    name: str
    recipe: Recipe
    alpha: float

    @property
    def identity(self) -> str:
        """Equal for arms that train the same thing."""
        return identity(self.recipe)


@dataclass(frozen=True)
class Grid:
    """What is compared: `base` is the recipe with its single-valued overrides, `arms` the combinations, each
    once.

    `words` are those that vary something.
    """

    base: Recipe
    arms: tuple[Arm, ...]
    words: tuple[str, ...] = ()


def expand(path: Path | str, words: Sequence[str]) -> Grid:
    """Reads a recipe and the words behind it: `key=value` changes it, `key=value,value` makes arms of it.

    A value is written as in YAML, so commas within brackets or quotes do not part values. A key may be given
    both ways: the single value is then the recipe's own.

    Raises:
        InputError: a word or a recipe that comes out of it is wrong, nothing is varied, or something is
            varied that arms must share.
    """
    fixed, axes = _sort(words)
    base = load_recipe(path, fixed)
    check_measurable(base)
    if not axes:
        raise InputError(
            "nothing is varied: give at least one key several values, such as adapter.depth=0,1,3"
        )
    recipes = [load_recipe(path, [*fixed, *combination]) for combination in itertools.product(*axes)]
    for recipe in recipes:
        _refuse_unlike(recipe, base)
    varying = tuple(word for word in words if word not in fixed)
    return Grid(base, tuple(_name(_distinct(recipes), base)), varying)


def split_values(text: str) -> list[str]:
    """The values of `a,b,[c,d]`: parted at commas outside brackets and quotes."""
    values, start, depth, quote = [], 0, 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and text[start:position].rstrip()[-1:] in ("", *"[{(,:"):
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth <= 0:
            values.append(text[start:position])
            start = position + 1
    return [*values, text[start:]]


def _sort(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(overrides with one value, one list of overrides per varied key)."""
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = split_values(text) if equals else []
        if len(values) < 2:
            fixed.append(word)
            continue
        if key in axes:
            raise InputError(f"'{key}' is varied twice: give all its values at once, {key}=value,value")
        if any(not value.strip() for value in values):
            raise InputError(f"'{word}': a value is missing between two commas, or at the end")
        axes[key] = [f"{key}={value}" for value in values]
    return fixed, list(axes.values())


def check_measurable(base: Recipe) -> None:
    """Raises InputError where a recipe's runs cannot be told apart by validation loss after equal steps."""
    if base.data.validation == 0:
        raise InputError("data.validation is 0, and arms are compared by validation loss: hold some rows out")
    if base.training.early_stopping is not None:
        raise InputError(
            "training.early_stopping would end arms at different steps: set it to null for a comparison"
        )


def _refuse_unlike(recipe: Recipe, base: Recipe) -> None:
    for key in differences(recipe, base):
        if key == "seed":
            raise InputError("seed: vary seeds with --seeds 1,2,3, so that arms are paired by seed")
        if within(key, HELD):
            raise InputError(
                f"{key} cannot be varied: arms see the same rows in the same order, for as long, and are"
                " measured alike. Compare such runs by hand, or make two comparisons."
            )


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe trains, by dotted key: equal arms have equal settings.

    Keys that touch no loss are left out, and those that cannot matter to this recipe are None.
    """
    found = {key: value for key, value in recipe.flat().items() if not within(key, FREE)}
    if recipe.adapter.depth == 0 or recipe.adapter.init != "kaiming":  # others lose no scale
        found[SCALE] = None
    if recipe.adapter.depth == 0:
        found[INIT] = found[LINKS_RATE] = None
    if recipe.adapter.init_from is not None:
        found[INIT] = None
    return found


def identity(recipe: Recipe) -> str:
    """A recipe's settings as text."""
    return json.dumps(settings(recipe), sort_keys=True)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ."""
    first, second = one.flat(), other.flat()
    return [key for key in {**first, **second} if first.get(key) != second.get(key)]


def refuse_other_base(base: Recipe, saved: Recipe, place: Path) -> None:
    """Raises InputError when a comparison that exists was made from another recipe than the one given now."""
    keys = [key for key in differences(base, saved) if not within(key, FREE)]
    if keys:
        raise InputError(
            f"{place} holds a comparison of another recipe; it differs in {', '.join(keys)}. Give this one"
            " another name (name=NEW), or replace the old one with --fresh."
        )


def _distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """The first recipe of each identity."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        found.setdefault(identity(recipe), recipe)
    return list(found.values())


def _name(recipes: Iterable[Recipe], base: Recipe) -> list[Arm]:
    """Arms with directory names that depend on the arm and the base recipe alone, not on the other arms."""
    names: set[str] = set()
    arms = []
    for recipe in recipes:
        name = arm_name(recipe, base)
        if name in names:  # two long values that are cut to the same text
            name = f"{name[:180]}-{sha256_bytes(identity(recipe).encode())[:8]}"
        names.add(name)
        arms.append(Arm(name, recipe, recipe.adapter.alpha))
    return arms


def arm_name(recipe: Recipe, base: Recipe) -> str:
    """`depth-3-kaiming`, and behind it whatever else differs from the base recipe."""
    own, common = settings(recipe), settings(base)
    name = f"depth-{recipe.adapter.depth}"
    if own[INIT] is not None:
        name += f"-{own[INIT]}"
    for key in {**own, **common}:
        if _tells(key, own) and own.get(key) != common.get(key):
            name += f"_{key.partition('.')[2]}-{_slug(own.get(key))}"
    return name[:190]


def _tells(key: str, own: Mapping[str, Any]) -> bool:
    """Whether a setting belongs into an arm's name, behind depth and init: not where it cannot matter."""
    return key not in (DEPTH, INIT) and not (key in (LINKS_RATE, SCALE) and own[key] is None)


def _slug(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"
    return text if len(text) <= 40 else f"{text[:30]}-{sha256_bytes(str(value).encode())[:8]}"


def labels(recipes: Sequence[Recipe], base: Recipe) -> list[str]:
    """What people call the arms: LoRA, MoSLoRA or the depth, and what else differs from the base recipe.

    The learning rate is left out: it stands in a column of its own.
    """
    common = settings(base)
    texts = []
    for recipe in recipes:
        own, depth = settings(recipe), recipe.adapter.depth
        text = {0: "LoRA", 1: "MoSLoRA"}.get(depth, f"depth {depth}")
        if own[INIT] is not None:
            text += f", {own[INIT]}"
        for key in {**own, **common}:
            if key != RATE and _tells(key, own) and own.get(key) != common.get(key):
                text += f", {key.partition('.')[2]} {_shown(own.get(key))}"
        texts.append(text)
    return texts


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
