"""Tokens and their supervision, found by character offsets of the full text.

A text is tokenised once, as a whole: tokenising prompt and answer apart gives other tokens where they meet.
A token is supervised if it holds any character of a supervised span, for that is what a model has to write
itself: the evaluation prompt is the row's tokens before the first supervised one. So a token that straddles
the boundary (" the", where the prompt ends in the space) is cut off the prompt, learned, and counted.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from linchain_cli.data.rows import Rendered, Row, Template
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

# Stand for an answer that is not known yet, where tokens depend on how it begins: a word, which joins a blank
# in front of it, and what stays apart from one.
_OPENINGS = ("the", "1", "\u4e8c")


@dataclass(frozen=True)
class EncodedText:
    """One row's tokens: `input_ids` (length,) int32, `supervised` (length,) bool.

    Of a row with a label, `target` is that (a class's number, or the number itself), and `segments` (length,)
    uint8 which of its texts each token is of, where the model is told.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    straddling: int  # tokens that lie on both sides of a span's boundary
    full_length: int  # tokens before truncation
    segments: np.ndarray | None = None
    target: float | None = None

    @property
    def truncated(self) -> bool:
        return self.full_length > len(self.input_ids)


class ControlTokens:
    """The tokens of a tokenizer that mean more than their letters (`</s>`, `<|im_end|>`, `[SEP]`), looked for
    in what users wrote.

    There they are encoded as these tokens, too, as other trainers and servers do by default: whoever asks the
    model with the same text asks it with the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(filter(None, names | set(tokenizer.all_special_tokens)), key=len, reverse=True)
        self._beginnings = tuple({name[0] for name in names})
        self._any = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def find(self, row: Any) -> str | None:
        """The first one in any text of a row."""
        for text in _texts(row):
            # Most texts hold not even the first character of one, and that is found faster.
            if any(character in text for character in self._beginnings) and (found := self._any.search(text)):
                return found.group()
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


class TextEncoder:
    """Encodes rendered rows with a private copy of a fast tokenizer: no padding, no truncation, full offsets.

    `prefix_ids` are the tokens that the tokenizer itself puts in front of a text (BOS); what it would put
    behind (some add EOS) is left away, because a row gets its one `eos_id` here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        from tokenizers import Tokenizer

        serialized = serialized_tokenizer(tokenizer)
        # Trimmed offsets leave a token's leading space out, and with it whether the token straddles.
        self._tokenizer = Tokenizer.from_str(
            serialized.replace('"trim_offsets":true', '"trim_offsets":false')
        )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.control_tokens = ControlTokens(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        probe = self._tokenizer.encode("a")
        own = probe.special_tokens_mask
        self.prefix_ids = probe.ids[: own.index(0) if 0 in own else 0]

    def encode(
        self,
        rows: Sequence[Rendered],
        *,
        adds_bos: bool,
        max_length: int | None = None,
        train_on_inputs: bool = False,
    ) -> list[EncodedText]:
        """Encodes rows on all cores. Truncates from the right to `max_length` tokens, EOS included."""
        encodings = self.tokenize([row.text for row in rows])
        return [
            self._encode_row(row, encoding, adds_bos, max_length, train_on_inputs)
            for row, encoding in zip(rows, encodings, strict=True)
        ]

    def tokenize(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """The bare tokens of each text, with offsets."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _encode_row(
        self,
        row: Rendered,
        encoding: tokenizers.Encoding,
        adds_bos: bool,
        max_length: int | None,
        train_on_inputs: bool,
    ) -> EncodedText:
        ids = encoding.ids
        supervised, straddling = supervised_tokens(encoding.offsets, row.spans, len(row.text))
        prefix = self._prefix(ids, adds_bos)
        ends = row.ends and self.eos_id is not None and (not ids or ids[-1] != self.eos_id)
        suffix = [self.eos_id] if ends else []

        input_ids = np.array(prefix + ids + suffix, dtype=np.int32)
        supervised = np.concatenate((np.zeros(len(prefix), bool), supervised, np.ones(len(suffix), bool)))
        kept = slice(max_length)
        if train_on_inputs:
            # Of a row whose answer is wholly cut off the prompt alone is no more learned than without this.
            supervised[:] = supervised[1:max_length].any()
        supervised[:1] = False  # nothing comes before the first token to predict it from
        straddling = int(np.count_nonzero(straddling[: max(0, len(input_ids[kept]) - len(prefix))]))
        return EncodedText(input_ids[kept], supervised[kept], straddling, len(input_ids))

    def _prefix(self, ids: list[int], adds_bos: bool) -> list[int]:
        """The tokenizer's leading tokens, unless the text was written with them."""
        if not adds_bos or ids[: len(self.prefix_ids)] == self.prefix_ids:
            return []
        return self.prefix_ids

    def prompt_and_answer(self, rendered: Rendered, adds_bos: bool) -> tuple[list[int], list[int]]:
        """Splits a row with one span into the tokens before the answer and those that hold any of it."""
        encoding = self.tokenize([rendered.text])[0]
        supervised, _ = supervised_tokens(encoding.offsets, rendered.spans, len(rendered.text))
        cut = int(supervised.argmax()) if supervised.any() else len(supervised)
        return self._prefix(encoding.ids, adds_bos) + encoding.ids[:cut], encoding.ids[cut:]


def supervised_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens hold a character of a span, and which of them reach over its boundary: (tokens,) bool
    each.

    `offsets` are each token's (start, end) characters in a text of `length` characters.
    """
    pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = pairs[:, 0], np.maximum(pairs[:, 1], pairs[:, 0] + 1)
    supervised = np.zeros(len(pairs), dtype=bool)
    straddling = np.zeros(len(pairs), dtype=bool)
    for start, end in spans:
        inside = (ends > start) & (starts < end)
        supervised |= inside
        straddling |= inside & ((starts < start) | (ends > end) & (end < length))
    return supervised, straddling


def serialized_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fast tokenizer as JSON. Raises InputError for one without offsets (a slow tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which supervision needs. Use a model "
            "with a fast tokenizer (a tokenizer.json)."
        )
    return backend.to_str()


_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, TextEncoder]] = (
    weakref.WeakKeyDictionary()
)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The tokenizer's encoder, made once (and again after tokens were added)."""
    size, encoder = _encoders.get(tokenizer, (None, None))
    if size != len(tokenizer) or encoder.eos_id != tokenizer.eos_token_id:
        encoder = TextEncoder(tokenizer)
        _encoders[tokenizer] = (len(tokenizer), encoder)
    return encoder


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    row: Row,
    *,
    straddles: bool | None = None,
) -> list[int]:
    """The evaluation prompt's tokens: a prefix of the training row's, cut before a token that straddles the
    boundary.

    Where the prompt is cut can depend on how the answer begins, if it ends in a blank: it is cut as for the
    row's own answer. Without one, `straddles` says whether the answers that were trained on began with a
    token that held the prompt's end (as most words do): the prompt is cut as theirs was. Nothing of any
    answer is in the prompt.
    """
    if own := template.response(row):
        return encode_responses(tokenizer, template, row, [own])[0]
    lead, _ = template.frame
    prompts = [encode_responses(tokenizer, template, row, [lead + opening])[0] for opening in _OPENINGS]
    return max(prompts, key=len) if straddles is False else min(prompts, key=len)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, template: Template, row: Row, responses: Iterable[str]
) -> tuple[list[int], list[list[int]]]:
    """The prompt's tokens that all `responses` share, and each response's tokens behind them (no EOS).

    Prompt and continuation together are the tokens of the full text, as in training.
    """
    encoder = text_encoder(tokenizer)
    split = [encoder.prompt_and_answer(template.complete(row, text), template.adds_bos) for text in responses]
    shared = common_prefix([prompt for prompt, _ in split])
    return split[0][0][:shared], [prompt[shared:] + answer for prompt, answer in split]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with in common."""
    first, last = min(sequences), max(sequences)
    for index, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return index
    return min(len(first), len(last))
