"""What a model can read: which tokens have an embedding, and how many positions there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPARE = 8  # rows that a table of positions may have beyond those that count (OPT has two)


@dataclass(frozen=True)
class Limits:
    """`embeddings` are the rows of the input embeddings: ids from 0 to one less can be read.

    `positions` are the tokens that the model was made for, None where its configuration names no number.
    `table` says that there are no others: one token more is an error, while rotations and biases go on.
    """

    embeddings: int
    positions: int | None = None
    table: bool = False

    def check_length(self, longest: int, what: str, remedy: str) -> str | None:
        """Compares a number of tokens with `positions`.

        Args:
            longest: tokens.
            what: whose they are, as a sentence begins: "the longest row has".
            remedy: how to have fewer, as it ends; {positions} stands for how many there may be.

        Returns:
            A warning where the model reads on, None where all fit.

        Raises:
            InputError: the model has no such position.
        """
        if self.positions is None or longest <= self.positions:
            return None
        remedy = remedy.format(positions=self.positions)
        if self.table:
            raise InputError(
                f"{what} {longest:,} tokens, and the model has {self.positions:,} positions: {remedy}"
            )
        return (
            f"{what} {longest:,} tokens, and the model was made for {self.positions:,}: it reads on, and may"
            f" understand nothing there; {remedy}"
        )

    def check_ids(self, ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, what: str) -> None:
        """Raises InputError for a token without an embedding; `what` it stands in begins the message."""
        highest = max(ids)
        if highest >= self.embeddings:
            raise InputError(
                f"{what}: the token {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, and"
                f" the model's embeddings end at {self.embeddings - 1}"
            )


def limits(model: nn.Module) -> Limits:
    """The limits of a loaded model, or of an empty one on the meta device."""
    embedding = model.get_input_embeddings()
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "mpt":  # the biases of its attention are made for so many
        return Limits(embedding.weight.shape[0], config.max_seq_len, table=True)
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return Limits(embedding.weight.shape[0])
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding:
            if count <= module.num_embeddings < count + _SPARE:
                return Limits(embedding.weight.shape[0], count - _reserved(module, count), table=True)
    # GPT-J, CodeGen and CTRL look sines up in a buffer.
    table = any(buffer.dim() == 2 and len(buffer) == count for buffer in model.buffers())
    return Limits(embedding.weight.shape[0], count, table)


def _reserved(table: nn.Embedding, count: int) -> int:
    """Positions that no token gets: RoBERTa's tables begin behind the padding's."""
    if table.padding_idx is None or table.num_embeddings > count:
        return 0
    return table.padding_idx + 1
