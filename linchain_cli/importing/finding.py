"""Where another tool's adapter lies: a directory here, or on the hub."""

from __future__ import annotations

from pathlib import Path

from linchain_cli.errors import InputError
from linchain_cli.importing.foreign import CONFIG_FILE, WEIGHTS_FILES
from linchain_cli.model.files import hub_fetcher, looks_local, refuse_lfs_pointers, refuse_missing
from linchain_cli.model.hub import HubKind, hub_problems
from linchain_cli.storage import expand

ADAPTER = HubKind("adapter", "", "models--", "--revision", "or give the path of its directory")


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """The directory (or file) of that name, or the hub's adapter, downloaded once.

    Raises:
        InputError: there is none, or the hub does not hand it over.
    """
    local = expand(name)
    if local.exists():
        if revision is not None:
            raise InputError(f"--revision is for adapters on the hub, and {name} is here")
        if local.is_dir():
            refuse_lfs_pointers(local)
        return local
    if looks_local(name):
        refuse_missing(name, what="adapter")
    with hub_problems(ADAPTER, name, revision):
        fetch = hub_fetcher(name, revision)
        directory = fetch(["*.json"])
        if not (directory / CONFIG_FILE).is_file():
            raise InputError(f"{name} on the hub is no adapter: it has no {CONFIG_FILE}")
        for weights in WEIGHTS_FILES:
            fetch([weights])
            if (directory / weights).is_file():
                break
    return directory
