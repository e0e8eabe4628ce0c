"""Where a base model lies: hub ids, directories and .gguf files become one local checkpoint directory.

Nothing here loads weights into a model; `loading` does. Every problem is an `InputError` that names
the path and says how to get the model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn, Protocol

from linchain_cli.errors import InputError, did_you_mean, some
from linchain_cli.model.gguf import converted_gguf
from linchain_cli.model.hub import MODEL, cached_ids, hub_problems
from linchain_cli.storage import broken_link, expand, refuse_lfs_pointer

logger = logging.getLogger(__name__)

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LOCAL_SUFFIXES = (".gguf", ".safetensors", ".bin")
# Directories that people keep models in. A path below one that is misspelt, or read from another directory,
# must not become the weights of a stranger who calls himself so.
LOCAL_FOLDERS = frozenset(
    "adapter adapters base bases checkpoint checkpoints data dataset datasets home merged model models out"
    " output outputs results run runs tmp weights".split()
)
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_LARGEST_POINTER = 1024  # bytes: theirs are 130
HUB_TIMEOUT = 10.0  # seconds until an unresponsive hub counts as unreachable


class KnownBase(Protocol):
    """What a run knows of its base; run.RunBase has it."""

    path: str
    revision: str | None
    commit: str | None
    source: str | None
    directory: str | None


@dataclass(frozen=True)
class FoundBase:
    """A base model that has been found.

    directory: its checkpoint directory
    source: absolute path of the directory or .gguf file that was named, None for a hub id
    commit: of the hub's repository, None for a local model
    """

    directory: Path
    source: str | None = None
    commit: str | None = None


def find_base(
    known: KnownBase, *, named: str | None = None, near: Path | None = None, weights: bool = True
) -> FoundBase:
    """The base model of a run, from wherever one looks: where it was when the run began, or `named` instead.

    A local model is looked for in its place of then, and below the current directory and those around `near`
    (the run's directory), where its path may fit if everything was moved together; the hub is never asked for
    it. A hub model is taken at the commit that the run had.

    Raises:
        InputError: as `locate`; it is in none of these places.
    """
    if named is not None:
        return found_at(named, locate(named, weights=weights))
    if known.source is None:
        kept = Path(known.directory) if known.directory else None
        if kept and kept.is_dir() and (not weights or _has_weights(kept)):
            return FoundBase(kept, commit=known.commit)
        return found_at(known.path, locate(known.path, known.commit or known.revision, weights=weights))
    below = [] if near is None else near.resolve().parents
    places = [Path(known.source), *(root / known.path for root in (Path.cwd(), *below))]
    for place in places:
        if place.exists():
            return found_at(str(place), locate(str(place), weights=weights))
    raise InputError(
        f"it was at {known.source}, where nothing is now; nor is there any {known.path} below {Path.cwd()}."
    )


def found_at(path: str, directory: Path) -> FoundBase:
    """What is known of the place of a base that was named `path` and located at `directory`."""
    local = expand(path)
    if local.exists():
        return FoundBase(directory, source=str(local.resolve()))
    return FoundBase(directory, commit=directory.name if directory.parent.name == "snapshots" else None)


def _has_weights(directory: Path) -> bool:
    try:
        return bool(weight_files(directory))
    except InputError:
        return False


def locate(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The checkpoint directory of `path`: a hub id (downloaded once), directory or .gguf (converted once).

    `weights=False` leaves a hub model's weights where they are, for commands that read only its
    configuration and tokenizer. Raises InputError if there is no such model, it is not a checkpoint of
    a transformers model, or the hub refuses it or cannot be reached.
    """
    if not path.strip():
        raise InputError("model.path is empty: give a hub id, a checkpoint directory or a .gguf file.")
    local = expand(path)
    if local.is_dir():
        _check_directory(local)
        if weights:
            weight_files(local)
        return local
    if local.suffix.lower() == ".gguf" and local.is_file():
        return converted_gguf(local)
    if local.exists():
        raise InputError(f"'{path}' is a file; a model is a hub id, a directory or a .gguf file.")
    if looks_local(path):
        refuse_missing(path)
    return _hub_directory(path, revision, weights)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in name order; safetensors go before pickled ones.

    Raises InputError if there are none, a shard is missing, or an index names a file outside the directory.
    """
    directory = Path(directory)
    for single in (SAFETENSORS, PICKLED):
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            files = [directory / name for name in shard_names(index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError(
                    f"{directory}: {len(missing)} of the {len(files)} weight files that {index.name} lists "
                    f"are missing, first {missing[0]}. Download or copy the checkpoint again."
                )
            return files
    raise InputError(
        f"{directory} holds no weights: expected {SAFETENSORS} or {SAFETENSORS}.index.json. "
        + _contents(directory)
    )


def shard_names(index: Path) -> list[str]:
    """The file names an index (`*.index.json`) lists, sorted. One that leads outside is refused."""
    content = _read_json(index)
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise InputError(f"{index}: expected a 'weight_map' from tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise InputError(
                f"{index}: the weight file name '{name}' leads out of the model's directory; refused."
            )
    return names


def read_config(directory: Path) -> dict:
    """A checkpoint's config.json as it stands. Raises InputError unless it is JSON with a `model_type`."""
    path = Path(directory) / "config.json"
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path} names no 'model_type', so it is not a transformers model's configuration.")
    return config


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return content


def refuse_lfs_pointers(directory: Path) -> None:
    """Raises InputError for a directory that was cloned without Git LFS."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.stat().st_size < _LARGEST_POINTER:
            refuse_lfs_pointer(path)


def _check_directory(directory: Path) -> None:
    refuse_lfs_pointers(directory)
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"{directory} holds a PEFT adapter (adapter_config.json), not a model. Give the base model's "
            f"directory or hub id; 'linchain import {directory} --out RUN' makes a run of the adapter, which "
            "eval, generate and merge take."
        )
    if (directory / "config.json").is_file():
        read_config(directory)
        return
    if (directory / "run.json").is_file() or (directory / "chain.json").is_file():
        raise InputError(
            f"{directory} is a run or an adapter, not a base model. Its base stands in recipe.yaml under "
            "model.path; 'linchain merge' writes a checkpoint that can serve as one."
        )
    quantised = sorted(path.name for path in directory.glob("*.gguf"))
    if quantised:
        raise InputError(
            f"{directory} holds no config.json but GGUF files; give one of them: {directory / quantised[0]}"
        )
    raise InputError(f"{directory} is not a checkpoint: it has no config.json. {_contents(directory)}")


def _contents(directory: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in directory.iterdir())
    if not names:
        return "The directory is empty."
    return f"Found: {some(names, 8)}."


def looks_local(path: str) -> bool:
    """Whether a name is meant as a path, which the hub is never asked for.

    A hub id is `name` or `organisation/name`. What lies below a directory that is here, or below one that is
    called as such directories are, is a path, as are a link that is here and anything that cannot be a hub
    id.
    """
    if not HUB_ID.fullmatch(path) or path.lower().endswith(LOCAL_SUFFIXES):
        return True
    folder, slash, _ = path.partition("/")
    if Path(folder).is_symlink():  # also one to a disk that is not there now
        return True
    return bool(slash) and (folder.lower() in LOCAL_FOLDERS or Path(folder).is_dir())


def refuse_missing(path: str, more: Iterable[str] = (), what: str = "model") -> NoReturn:
    """Raises InputError for a path of a `what` that is not there, with the nearest of what is, or of
    `more`."""
    local = expand(path)
    missing = local
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [str(entry) for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    siblings = [entry for entry in siblings if entry != str(missing)]  # a link that leads nowhere
    part = broken_link(local) or ("" if missing == local else f" ({missing} does not exist)")
    hint = did_you_mean(str(missing), [*siblings, *more])
    raise InputError(
        f"There is no {what} at '{path}'{part}, and it looks like a path, so the hub was not asked.{hint}"
    )


# The hub


def _hub_directory(repo: str, revision: str | None, weights: bool) -> Path:
    """Downloads what a model needs, small files first: an unusable model is refused before its weights."""
    with hub_problems(MODEL, repo, revision):
        fetch = hub_fetcher(repo, revision)
        directory = fetch(SMALL_FILES)
        _check_directory(directory)
        if weights:
            _fetch_weights(directory, fetch)
    return directory


def hub_fetcher(repo: str, revision: str | None) -> Callable[[list[str]], Path]:
    """What downloads files of a hub model, by patterns for those at its top, and says in which directory they
    are then: all of one commit. For use within `hub_problems`."""
    from huggingface_hub import snapshot_download

    commit = _resolve_commit(repo, revision)

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=commit or revision,
                local_files_only=commit is None,
                etag_timeout=HUB_TIMEOUT,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )

    return fetch


def _fetch_weights(directory: Path, fetch: Callable[[list[str]], None]) -> None:
    for single in (SAFETENSORS, PICKLED):
        index = directory / f"{single}.index.json"
        fetch(shard_names(index) if index.is_file() else [single])
        if index.is_file() or (directory / single).is_file():
            break
    weight_files(directory)


def _resolve_commit(repo: str, revision: str | None) -> str | None:
    """The commit to use, or None when the hub cannot be reached and an earlier download must do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().repo_info(repo, revision=revision, timeout=HUB_TIMEOUT).sha
    except OfflineModeIsEnabled:
        return None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return None
        raise
    except (HTTPError, ConnectionError, TimeoutError):
        if cached_ids(MODEL, repo):
            logger.warning("The Hugging Face hub cannot be reached; using the earlier download of %s.", repo)
        return None
