"""What can go wrong with the Hugging Face hub, for models and data sets alike: one message for each, with the
way out."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.storage import NO_ROOM


@dataclass(frozen=True)
class HubKind:
    """A kind of what the hub holds.

    page, cache: what comes before its name in an address and in the hub's cache
    revision_key: where a recipe names its revision
    otherwise: what one can do without the hub
    """

    word: str
    page: str
    cache: str
    revision_key: str
    otherwise: str


MODEL = HubKind("model", "", "models--", "model.revision", "or give the path of a checkpoint directory")
DATA_SET = HubKind(
    "data set",
    "datasets/",
    "datasets--",
    "data.revision",
    "or give the path of a .json, .jsonl, .csv or .parquet file",
)


@contextlib.contextmanager
def hub_problems(kind: HubKind, name: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises, also deep within another library's error, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = _explained(kind, name, revision, list(causes_of(error)))
        if message is None:
            raise
        raise InputError(message) from error


def _explained(kind: HubKind, name: str, revision: str | None, chain: list[BaseException]) -> str | None:
    from huggingface_hub import constants, errors

    def caused_by(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in chain if isinstance(cause, kinds)), None)

    what, log_in = f"The {kind.word} '{name}'", "log in with 'hf auth login' or set HF_TOKEN"
    if caused_by(errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{kind.page}{name}"
        return (
            f"{what} is gated. Accept its terms at {page}, then {log_in} to a token of that account,"
            f" {kind.otherwise}."
        )
    if caused_by(errors.DisabledRepoError):
        return f"The hub has disabled access to the {kind.word} '{name}'. Choose another, {kind.otherwise}."
    if caused_by(errors.RevisionNotFoundError):
        return f"{what} has no revision '{revision}' on the hub. Check {kind.revision_key}."
    if caused_by(errors.RepositoryNotFoundError):
        return unknown_on_hub(kind, name)
    if caused_by(errors.HFValidationError):
        return f"'{name}' is neither a directory here nor a valid hub id (organisation/name)."
    if refused := caused_by(errors.HfHubHTTPError):
        status = refused.response.status_code if refused.response is not None else "no status"
        way = f"L{log_in[1:]}" if status in (401, 403) else "Try again later"
        return f"The hub refused the {kind.word} '{name}' (HTTP {status}). {way}, {kind.otherwise}."
    if caused_by(errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError):
        why = (
            "HF_HUB_OFFLINE is set; unset it to download"
            if constants.HF_HUB_OFFLINE or caused_by(errors.OfflineModeIsEnabled)
            else f"the hub ({constants.ENDPOINT}) cannot be reached; check the network or the proxy"
        )
        state = "only in part" if cached_ids(kind, name) else "not"
        hint = did_you_mean(name, cached_ids(kind))
        return f"{what} is {state} on this machine, and {why}, {kind.otherwise}.{hint}"
    store = caused_by(OSError)
    if store and store.errno in (errno.EACCES, errno.EPERM, errno.EROFS, *NO_ROOM):
        return (
            f"{what} cannot be stored in {store.filename or constants.HF_HOME}: {store.strerror}. Set HF_HOME"
            f" to a directory that can be written and has room, {kind.otherwise}."
        )
    return None


def unknown_on_hub(kind: HubKind, name: str) -> str:
    """What to say where the hub knows no such name, or does not say so to everybody."""
    return (
        f"The hub has no {kind.word} '{name}' that you may see. Check the spelling; if it is private, log in"
        f" with 'hf auth login' or set HF_TOKEN; {kind.otherwise}.{did_you_mean(name, cached_ids(kind))}"
    )


def cached_ids(kind: HubKind, name: str | None = None) -> list[str]:
    """Hub ids with an earlier download in the hub's cache; with `name`, that one only."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob(f"{kind.cache}*/snapshots")
    ids = [folder.parent.name.removeprefix(kind.cache).replace("--", "/") for folder in folders]
    return [found for found in ids if name is None or found == name]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
