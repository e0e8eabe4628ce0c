"""Documents, one behind the other, as training rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from linchain_cli.data.encoding import EncodedText


class Packer:
    """Cuts documents, one behind the other, into rows of `length` tokens; the last row may be shorter.

    A document begins with the tokenizer's own first tokens and ends with the end-of-sequence token, as it
    was encoded. Nothing is lost: together the rows are all tokens in order. A row's first token is not
    supervised, because there is nothing in the row to predict it from."""

    def __init__(self, length: int):
        self._length = length
        self._waiting: list[np.ndarray] = []
        self._tokens = 0

    def rows(self, documents: Iterable[EncodedText]) -> Iterator[EncodedText]:
        """The rows that these documents complete."""
        for document in documents:
            self._waiting.append(document.input_ids)
            self._tokens += len(document.input_ids)
            if self._tokens >= self._length:
                tokens = np.concatenate(self._waiting)
                whole = self._tokens // self._length * self._length
                yield from map(_learned, tokens[:whole].reshape(-1, self._length))
                self._waiting, self._tokens = [tokens[whole:]], self._tokens - whole

    def rest(self) -> Iterator[EncodedText]:
        """What is left, as a last row. Of a single token nothing could be learned."""
        if self._tokens > 1:
            yield _learned(np.concatenate(self._waiting))
        self._waiting, self._tokens = [], 0


def _learned(input_ids: np.ndarray) -> EncodedText:
    supervised = np.ones(len(input_ids), dtype=bool)
    supervised[0] = False
    return EncodedText(input_ids, supervised, 0, len(input_ids))
