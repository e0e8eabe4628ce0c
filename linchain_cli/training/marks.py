"""Special tokens that answers hold, as `<|eot_id|>`, and that the base never learned to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from linchain_cli.chain import Chain
from linchain_cli.data.store import EncodedRows
from linchain_cli.model.head import untrained_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_LOOKED_AT = 200


def untrained_marks(
    model: nn.Module, layers: Mapping[str, Chain], rows: EncodedRows, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """A warning, where the model's output head learned nothing for special tokens that some of the rows teach
    it to write, and has no chain among `layers` which would learn it."""
    head = model.get_output_embeddings()
    if head is None or head in layers.values():
        return
    answers = (rows[index] for index in range(0, len(rows), max(1, len(rows) // _ROWS_LOOKED_AT)))
    written = np.unique(np.concatenate([ids[supervised] for ids, supervised in answers])).tolist()
    special = {token: mark for mark, token in tokenizer.get_added_vocab().items()}
    marks = [special[token] for token in untrained_tokens(model, [t for t in written if t in special])]
    if not marks:
        return
    remedy = "Take the base's chat version, or a template with other marks (data.chat.template)"
    if head.weight is not model.get_input_embeddings().weight:  # a shared weight gets no chain
        name = next(name for name, module in model.named_modules() if module is head)
        remedy += f", or give the head a chain, too (adapter.target_modules: [all-linear, {name}])"
    yield (
        f"the base was never taught to write {', '.join(marks)}: its output head knows no such token, and"
        f" chains before the head hardly change that, so answers may not end. {remedy}"
    )
