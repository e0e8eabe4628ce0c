"""linchain push"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.export import export_run
from linchain_cli.commands.named_run import open_run
from linchain_cli.commands.options import Base, Json
from linchain_cli.errors import InputError
from linchain_cli.run import is_adapter, is_run

if TYPE_CHECKING:
    from linchain_cli.export.publish import Place, Publication

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN|DIR] ORG/NAME",
            help="A run, whose adapter goes there in PEFT's format, or a directory that merge or export "
            "wrote; left out, the newest finished run under ./runs. Then the repository on the hub.",
            show_default=False,
        ),
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="Of a run: the checkpoint that merge wrote, not the adapter.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before sending.")] = False,
    base: Base = None,
    json: Json = False,
) -> None:
    """Publish an adapter or a merged checkpoint on the hub."""
    source, repo = _source_and_repository(words)
    from linchain_cli.export.output import stops_with
    from linchain_cli.export.publish import hub_api, look_at, plan_publication, upload

    stopped = "stopped before it was published; run the command again: what has arrived does not travel twice"
    with stops_with(stopped), tempfile.TemporaryDirectory(prefix="linchain-push-") as scratch:
        directory = _directory(source, merged, base, Path(scratch) / "adapter")
        publication = plan_publication(directory, repo)
        api = hub_api()
        place = look_at(api, repo, private)
        _list(publication, place, api.endpoint, private, json)
        if not yes:
            _ask()
        with console.Progress("bytes") as progress:
            address = upload(
                api, publication, private, lambda done, total: progress.show("uploading", done, total)
            )
    if json:
        is_private = private if place.private is None else place.private
        found = {"repository": repo, "private": is_private, "commit": address}
        console.print_json({**found, "files": publication.files, "left_out": list(publication.left_out)})
    else:
        print(f"published: {address}")


def _source_and_repository(words: Sequence[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise InputError(f"expected [RUN|DIR] ORG/NAME, got {len(words)} words")
    source, repo = words if len(words) == 2 else (None, words[0])
    if not _REPOSITORY.fullmatch(repo) or Path(repo).exists():
        what = "is a directory here" if Path(repo).exists() else "is no repository's name"
        raise InputError(f"'{repo}' {what}: the repository comes last, as ORG/NAME or USER/NAME")
    return source, repo


def _directory(source: str | None, merged: bool, base: str | None, scratch: Path) -> Path:
    """What is sent: a directory as it is, a run's adapter exported to `scratch`, or its merged/."""
    if source is not None and not is_run(source) and not is_adapter(source):
        if merged or base is not None:
            raise InputError(f"--merged and --base are for runs, and {source} is none")
        if not Path(source).is_dir():
            raise InputError(f"{source} is neither a run nor a directory")
        return Path(source)
    subject = open_run(None if source is None else Path(source))
    if merged:
        place = subject.opened.place("merged")
        if not place.is_dir():
            raise InputError(f"{place} is not there: write it with 'linchain merge {subject.opened.name}'")
        return place
    found = subject.find_base(base, weights=False)
    if found.source is not None:
        raise InputError(
            f"the base of {subject.opened.name} is {found.source}, which nobody else can load: name it by its"
            " hub id with --base ORG/NAME, or publish the merged checkpoint with --merged"
        )
    subject.warn_of_changed_base(found.directory)
    export_run(subject, found, base, scratch, "peft")
    return scratch


def _list(publication: Publication, place: Place, endpoint: str, private: bool, json: bool) -> None:
    """What would be sent, before it is; on stderr where stdout is for JSON."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if json else sys.stdout)

    if place.private is None:
        state = f"new, {'private' if private else 'PUBLIC'}"
    else:
        state = f"there already, {'private' if place.private else 'PUBLIC'}"
    say(f"{endpoint}/{publication.repo} ({state}), as {place.user}:")
    for name, size in publication.files.items():
        replaced = "  (replaces the one there)" if name in place.files else ""
        say(f"  {_size(size):>9}  {name}{replaced}")
    say(f"  {_size(sum(publication.files.values())):>9}  in {len(publication.files)} files")
    if publication.left_out:
        say(f"  stays here: {', '.join(publication.left_out)}")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _ask() -> None:
    if not sys.stdin.isatty():
        raise InputError("nothing was sent: there is no terminal to ask at. Send it with --yes")
    print("Send this? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError("nothing was sent")
