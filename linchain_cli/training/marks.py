"""Special tokens that answers hold, as `<|eot_id|>`, and that the base never learned to write."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from linchain_cli.data.store import EncodedRows
from linchain_cli.model.head import head_path, head_weight, untrained_tokens
from linchain_cli.model.names import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_LOOKED_AT = 200


def untrained_marks(
    model: nn.Module,
    directory: Path,
    adapted: Collection[str],
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[str]:
    """A warning, where the output head learned nothing for special tokens that some of the rows teach the
    model to write, and has no chain which would learn it.

    Args:
        directory: the base's checkpoint, which `model` (also on the meta device) is of.
        adapted: the paths of the modules with a chain.
    """
    head = head_path(model)
    if head is None or head in adapted:
        return
    answers = (rows[index] for index in range(0, len(rows), max(1, len(rows) // _ROWS_LOOKED_AT)))
    written = np.unique(np.concatenate([ids[supervised] for ids, supervised in answers])).tolist()
    special = {token: mark for mark, token in tokenizer.get_added_vocab().items()}
    if not (written := [token for token in written if token in special]):
        return
    weight = head_weight(model, directory)
    marks = [] if weight is None else [special[token] for token in untrained_tokens(weight, written)]
    if not marks:
        return
    remedy = "Take the base's chat version, or a template with other marks (data.chat.template)"
    if f"{head}.weight" not in tied_names(model):  # a shared weight gets no chain
        remedy += f", or give the head a chain, too (adapter.target_modules: [all-linear, {head}])"
    yield (
        f"the base was never taught to write {', '.join(marks)}: its output head knows no such token, and"
        f" chains before the head hardly change that, so answers may not end. {remedy}"
    )
