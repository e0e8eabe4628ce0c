"""An adapter that was not trained here, written as a run that every command takes like a trained one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.data.asking import Asking
    from linchain_cli.model.files import FoundBase
    from linchain_cli.recipe import Recipe
    from linchain_cli.run import RunStatus


def write_adapter_run(
    target: Path,
    adapter: Adapter,
    place: FoundBase | None,
    origin: dict[str, Any],
    *,
    asking: Asking | None = None,
    prompts: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
) -> RunStatus:
    """Writes a run directory whose recipe knows of base and adapter alone; returns its run.json.

    Args:
        place: where the base is, if it is at hand.
        origin: what run.json says of where the adapter came from.
        asking: how it was taught to be asked; without it the recipe has `prompts`, if those are known.
        max_length: the tokens that a classifier's rows were cut to, if that is known.
    """
    from linchain_cli import storage
    from linchain_cli.chain import save_adapter
    from linchain_cli.data.asking import write_asking
    from linchain_cli.export.output import staged_output
    from linchain_cli.export.receipts import ImportReceipt, hash_files
    from linchain_cli.model.computed import computed_values
    from linchain_cli.model.files import read_config
    from linchain_cli.records import write_record
    from linchain_cli.run import RunBase, RunDirectory, RunStatus, now

    more = {**(prompts or {}), **({} if max_length is None else {"max_length": max_length})}
    recipe = _recipe(target, adapter, asking, more)
    status = RunStatus(
        name=recipe.name,
        status="finished",
        created_at=now(),
        finished_at=now(),
        base=RunBase(
            path=recipe.model.path,
            revision=recipe.model.revision,
            commit=place and place.commit,
            source=place and place.source,
            directory=place and str(place.directory.resolve()),
            config=place and computed_values(read_config(place.directory)),
        ),
        imported=origin,
        classes=list(adapter.head.classes) if adapter.head else None,
    )
    with staged_output(target, ImportReceipt, overwrite=overwrite) as staging:
        run = RunDirectory(staging)
        save_adapter(adapter, run.adapter_dir)
        storage.write_atomic(run.recipe_path, recipe.to_yaml())
        write_record(run.status_path, status)
        if asking is not None:
            write_asking(asking, staging)
        write_record(staging / ImportReceipt.FILE, ImportReceipt(files=hash_files(staging)))
    return status


def _recipe(target: Path, adapter: Adapter, asking: Asking | None, reading: Mapping[str, Any]) -> Recipe:
    from linchain_cli.recipe import Recipe

    config = adapter.config
    task = "causal"
    if adapter.head:
        task = "classification" if adapter.head.classes else "regression"
    elif asking is not None:
        chat = {"template": asking.chat_template, "options": asking.options, "system": asking.system}
        reading = {"template": asking.template, "chat": chat, "turns": asking.turns}
    return Recipe.model_validate(
        {
            "task": task,
            "name": re.sub(r"[^A-Za-z0-9._-]", "-", target.name).lstrip("._-")[:200] or "imported",
            "output_dir": str(target.parent),
            "model": {"path": adapter.base["path"], "revision": adapter.base["revision"]},
            "adapter": {
                "rank": config.rank,
                "depth": config.depth,
                "alpha": config.alpha,
                "init": config.init,
                "target_modules": list(config.target_modules),
            },
            "data": {"train": "unknown", "validation": 0, **reading},
            "training": {"keep": "last"},
        }
    )
