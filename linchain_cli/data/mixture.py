"""Which encoded rows are trained on and which validate: rows held out of the sources, and sources by their
weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from linchain_cli.data.store import EncodedRows, EncodedStore
from linchain_cli.errors import InputError

_AUTO_VALIDATION = 120
MOST_SOURCES = 20  # that have a loss of their own


def hold_out(store: EncodedStore, rows: int | str, seed: int) -> tuple[EncodedRows, EncodedRows | None]:
    """(training rows, validation rows): `rows` of the sources' rows, chosen by `seed`, are in the second
    alone.

    `rows` is a number, a share such as "5%" or "auto", which is 120 and at most a tenth. The training rows
    that one row of a source became stay together, so that what is validated on was not trained on."""
    number = _number(rows, store.num_groups)
    if number == 0:
        return EncodedRows(store), None
    if number >= store.num_groups:
        raise InputError(
            f"data.validation: {number} rows cannot be held out of {store.num_groups}. Choose fewer, or 0 "
            "for no validation (with training.keep=last)."
        )
    # RandomState's streams are frozen: the same rows in every NumPy version.
    order = np.random.RandomState(seed).permutation(np.arange(store.num_groups, dtype=np.int32))
    held_out = np.sort(order[:number])
    groups = store.groups()
    if groups is not None:
        held_out = np.flatnonzero(np.isin(groups, held_out)).astype(np.int32)
    return EncodedRows(store, without=held_out), EncodedRows(store, only=held_out)


def _number(rows: int | str, of: int) -> int:
    if rows == "auto":
        return min(_AUTO_VALIDATION, max(1, of // 10))
    if isinstance(rows, str):
        share = float(rows.removesuffix("%")) / 100
        return max(1, round(share * of)) if share else 0
    return rows


def rows_by_source(
    rows: EncodedRows | None, names: Sequence[str], sizes: Sequence[int]
) -> dict[str, np.ndarray]:
    """Which of some rows of a store are each source's, by what tells its name from the others'. Nothing where
    all are one source's, or there are more than `MOST_SOURCES` of them.

    `sizes` are the rows that each source has in the store.
    """
    if rows is None or not 1 < len(names) <= MOST_SOURCES:
        return {}
    source = np.searchsorted(np.cumsum(sizes), rows.store_rows(), side="right")
    found = {name: np.flatnonzero(source == at) for at, name in enumerate(_short(names))}
    found = {name: part for name, part in found.items() if len(part)}
    return found if len(found) > 1 else {}


def _short(names: Sequence[str]) -> list[str]:
    """Of paths the last parts, as many as tell them apart (boolq/train.json), in characters that experiment
    trackers take. Equal ones are numbered."""
    parts = [re.sub(r"[^\w./-]+", "_", name).strip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(each[-length:]) for each in parts]
        if len(set(short)) == len(set(names)):
            break
    return [
        name if short.count(name) == 1 else f"{name}-{short[: at + 1].count(name)}"
        for at, name in enumerate(short)
    ]


def weighted(rows: EncodedRows, sizes: Sequence[int], weights: Sequence[float], seed: int) -> EncodedRows:
    """Training rows of which each occurs as often in an epoch as its source's weight says: with 2 twice,
    with 0.5 a half of them (chosen by `seed`, the same one in every epoch).

    `sizes` are the rows that each source has in the store.
    """
    if all(weight == 1 for weight in weights):
        return rows
    present = rows.store_rows()
    chosen, start = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        own = present[(present >= start) & (present < start + size)]
        start += size
        whole, part = divmod(weight, 1)
        chosen += [own] * int(whole)
        order = np.random.RandomState([seed, number]).permutation(own)
        chosen.append(np.sort(order[: round(part * len(own))]))
    only = np.concatenate(chosen)
    if not len(only):
        raise InputError("data.train: with these weights no row is left to train on.")
    return EncodedRows(rows.store, only=only)
