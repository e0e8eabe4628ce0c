"""What goes to the hub: the files that a merge or an export wrote, looked through before anything is sent."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from linchain_cli import storage
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export.card import PLACE
from linchain_cli.export.receipts import CARD_FILE, ExportReceipt, MergeReceipt
from linchain_cli.model.files import HUB_TIMEOUT
from linchain_cli.model.hub import causes_of
from linchain_cli.records import read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENS = "https://huggingface.co/settings/tokens"
_CONFIG = "adapter_config.json"
# Long lists of pieces of text, some of which look like the beginning of a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
_BINARY = (".safetensors", ".gguf", ".bin", ".model", ".png")
_SECRETS = {
    "a token of the hub": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\b(?:sk-(?:proj-|ant-)?|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Not within an address (https://host/home/x) or a longer path.
_HOME = re.compile(r"(?<![\w.:/~-])(?:/(?:home|Users|root)/|[A-Za-z]:\\+Users\\+)[^\s\"'`<>)\],]+")


@dataclass(frozen=True)
class Publication:
    """A directory's files as they go up.

    files: name -> bytes; left_out: names of what lies there and was not written by linchain
    card: what README.md becomes, its commands naming the repository
    """

    repo: str
    directory: Path
    files: dict[str, int]
    left_out: tuple[str, ...] = ()
    card: bytes | None = None


@dataclass(frozen=True)
class Place:
    """The repository as the hub has it before anything is sent; `private` None where it is not there yet."""

    user: str
    private: bool | None = None
    files: frozenset[str] = field(default_factory=frozenset)


def plan_publication(directory: Path, repo: str) -> Publication:
    """What of `directory`, which a merge or an export wrote, goes to `repo`.

    Raises:
        InputError: another hand wrote it, a file is missing, its model was found not to work, or it holds a
        secret or a path of this machine; the message names file, line and remedy.
    """
    receipt = _receipt(directory)
    wanted = [*receipt.files, receipt.FILE]
    if (directory / CARD_FILE).is_file():
        wanted.append(CARD_FILE)
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{directory}: {missing[0]} is missing, which {receipt.FILE} lists: write it anew")
    found = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(directory)) for path in found]
    _look_through(directory, wanted)
    card = None
    if CARD_FILE in wanted:
        card = (directory / CARD_FILE).read_text(encoding="utf-8").replace(PLACE, repo).encode()
    sizes = {name: (directory / name).stat().st_size for name in sorted(wanted)}
    left_out = tuple(name for name in names if name not in sizes)
    return Publication(repo, directory, sizes, left_out, card)


def _receipt(directory: Path) -> MergeReceipt | ExportReceipt:
    kind = next((kind for kind in (MergeReceipt, ExportReceipt) if (directory / kind.FILE).is_file()), None)
    if kind is None:
        raise InputError(
            f"{directory} holds neither merge.json nor export.json: what goes to the hub is a run, or what"
            " 'linchain merge' or 'linchain export' wrote"
        )
    receipt = read_record(directory / kind.FILE, kind)
    if failed := [line for line in receipt.not_proven if line.startswith("FAILED")]:
        raise InputError(f"{directory} is not published: {kind.FILE} says {failed[0]}")
    return receipt


def _look_through(directory: Path, names: Iterable[str]) -> None:
    """Raises InputError for a secret, or for a path that says whose machine it was."""
    own = _own_places(directory)
    for name in names:
        if name == _CONFIG:
            _check_base(directory / name)
        text = _text_of(directory / name)
        for what, pattern in _SECRETS.items():
            if match := re.search(pattern, text):
                place = _line_of(text, match.start())
                raise InputError(
                    f"{directory / name}, line {place}: {what} ({match[0][:6]}…) stands there. Nothing was"
                    " sent: take it out, and revoke it if it ever left this machine"
                )
        if name in _VOCABULARIES:
            continue
        hits = [match for match in (_HOME.search(text), *(re.search(one, text) for one in own)) if match]
        if hits:
            match = min(hits, key=re.Match.start)
            raise InputError(
                f"{directory / name}, line {_line_of(text, match.start())}: '{match[0]}' is a path of this"
                " machine. Nothing was sent: take it out, or write a hub id in its place"
            )


def _check_base(path: Path) -> None:
    """Raises InputError where an adapter's base can be loaded on this machine alone."""
    base = str(json.loads(path.read_bytes()).get("base_model_name_or_path") or "")
    if not base:
        raise InputError(f"{path} names no base model: export it with --base and the base's hub id")
    if os.path.isabs(base) or base.startswith((".", "~")) or base.count("/") > 1:
        raise InputError(
            f"{path} names {base} as the base, which nobody else can load: export it again with --base and"
            " the base's hub id"
        )


def _own_places(directory: Path) -> list[str]:
    """Patterns of directories of this machine, those that are too short to mean anything left out."""
    places = {directory.resolve(), Path.cwd()}
    try:
        places.add(storage.expand("~").resolve())
    except InputError:  # a container's user may have none
        pass
    return [rf"{re.escape(str(place))}(?![\w.-])[^\s\"'`]*" for place in places if len(place.parts) > 2]


def _text_of(path: Path) -> str:
    """What can be read in a file: of safetensors the metadata, of other binary files nothing."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        return json.dumps(json.loads(header).get("__metadata__", {}), ensure_ascii=False)
    return "" if path.suffix in _BINARY else path.read_text(encoding="utf-8", errors="replace")


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def hub_api() -> HfApi:
    """The hub, as whoever is logged in.

    Raises:
        InputError: nobody is.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set: unset it to publish")
    token = get_token()
    if token is None:
        raise InputError(
            f"nobody is logged in to the hub: run 'hf auth login' with a token that may write ({TOKENS}), or"
            " set HF_TOKEN"
        )
    return HfApi(token=token, library_name="linchain")


def look_at(api: HfApi, repo: str, private: bool) -> Place:
    """Who is logged in, and what is at `repo` already.

    Raises:
        InputError: the hub does not accept the token, or the repository is public where `private` was asked
        for.
        LinchainError: the hub cannot be reached.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        user = api.whoami()["name"]
        try:
            info = api.repo_info(repo, timeout=HUB_TIMEOUT)
        except RepositoryNotFoundError:
            return Place(user)
    except Exception as error:
        _explain(error, repo)
    if private and not info.private:
        raise InputError(
            f"{repo} is there already and is public: --private makes new repositories private. Change it at"
            f" {api.endpoint}/{repo}/settings, or choose another name"
        )
    return Place(user, bool(info.private), frozenset(one.rfilename for one in info.siblings or ()))


def upload(
    api: HfApi,
    publication: Publication,
    private: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Makes the repository if it is not there, and sends all files as one commit; returns the commit's
    address. Files that are there already as they are do not travel again.

    Raises:
        InputError: the token may not write there.
        LinchainError: the hub cannot be reached, or refuses. The repository is then what it was, or empty.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        api.create_repo(publication.repo, private=private or None, exist_ok=True)
        operations = []
        for name in publication.files:
            own = publication.card if name == CARD_FILE else None
            content = str(publication.directory / name) if own is None else own
            operations.append(CommitOperationAdd(name, content))
        total, done = sum(publication.files.values()), 0
        for operation in operations:
            api.preupload_lfs_files(publication.repo, [operation], free_memory=False)
            done += publication.files[operation.path_in_repo]
            progress(done, total)
        message = "Upload with linchain"
        return api.create_commit(publication.repo, operations, commit_message=message).commit_url
    except Exception as error:
        _explain(error, publication.repo)
    finally:
        if shown:
            enable_progress_bars()


def _explain(error: Exception, repo: str) -> NoReturn:
    """What the hub's refusal means, with the way out."""
    from huggingface_hub import constants, errors

    causes = list(causes_of(error))
    refusals = [one.response for one in causes if isinstance(one, errors.HfHubHTTPError)]
    status = next((response.status_code for response in refusals if response is not None), None)
    owner = repo.partition("/")[0]
    if status == 401:
        raise InputError(
            "the hub does not accept the token (HTTP 401): log in again with 'hf auth login', or set HF_TOKEN"
            f" to one that may write ({TOKENS})"
        ) from error
    if status == 403:
        raise InputError(
            f"the token may not write to {repo} (HTTP 403): use one with write access to {owner} ({TOKENS}),"
            " or choose a repository of your own"
        ) from error
    if status == 404:
        raise InputError(
            f"the hub has no user or organisation '{owner}' that you may write for, or no such repository"
            f" (HTTP 404): check the spelling of {repo}"
        ) from error
    again = "Run the command again: what has arrived does not travel a second time."
    if status is not None:
        said = next((str(one).strip().splitlines()[-1] for one in causes if str(one).strip()), "")
        raise LinchainError(f"the hub refused {repo} (HTTP {status}: {said[:200]}). {again}") from error
    if any(isinstance(one, (errors.HTTPError, ConnectionError, TimeoutError)) for one in causes):
        raise LinchainError(
            f"the hub ({constants.ENDPOINT}) cannot be reached; check the network or the proxy. {again}"
        ) from error
    if isinstance(error, ValueError):  # what its client finds wrong with a card or a name
        raise InputError(f"{repo}: {' '.join(str(error).split())[:400]}") from error
    raise error
