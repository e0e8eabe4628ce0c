"""One prompt and what a model writes behind it, handed over piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linchain_cli.data.encoding import common_prefix, encode_prompt
from linchain_cli.data.rows import Row, RowError, Template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.evaluate import evaluating
from linchain_cli.evaluation.generation import Generator, generate, stop_tokens
from linchain_cli.evaluation.jobs import before_stop
from linchain_cli.evaluation.reasoning import Reasoning
from linchain_cli.evaluation.tryout import continues_from_cache, refuse_broken
from linchain_cli.model.limits import limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Show = Callable[[str], None]
_HALF_A_CHARACTER = "\ufffd"
_OF_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is found.

    temperature: 0 takes the likeliest tokens; above it they are drawn, the more freely the higher
    top_p: draws from the likeliest tokens that together have this probability
    beams: of a search for the likeliest answer; with more than one nothing is drawn
    stop: texts before which an answer ends
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.beams > 1 and self.temperature > 0:
            raise InputError(
                "beams search for the likeliest answer and a temperature draws one: give one of them."
            )
        if not all(self.stop):
            raise InputError("an answer cannot end before an empty text: name one, such as --stop '###'.")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError("top-p goes with a temperature: --temperature 0.7 --top-p 0.9, for instance.")


@dataclass(frozen=True)
class Said:
    """An answer. Tokens are counted without the one that ends it.

    stop_reason: `end` (a token that ends answers), `stop_text`, or `length`
    parts: its reasoning, and what it says behind that or None if the reasoning does not end; None where the
        template does not write them apart
    """

    text: str
    stop_reason: Literal["end", "stop_text", "length"]
    prompt_tokens: int
    tokens: int
    parts: tuple[str, str | None] | None = None


class Speaker:
    """A model that is asked through one template.

    What it has read stays in its cache: a prompt that begins as the last prompt and answer did, as in a
    conversation, is read from where it leaves them.

    Args:
        straddles: how the prompts that were trained on ended, as for `encode_prompt`.
        warn: is told what the user should know of a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        straddles: bool | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._straddles, self._warn = straddles, warn
        self._ends = stop_tokens(model, tokenizer, template)
        self._reasoning = Reasoning(tokenizer, template) if template.thinking else None
        self._limits = limits(model)
        self._cache: Any = None
        self._cached: list[int] = []
        with evaluating(model):
            refuse_broken(model)

    def say(self, row: Row, sampling: Sampling, show: Show = lambda piece: None) -> Said:
        """What the model writes behind the row's prompt, white space around it left out.

        Args:
            row: the columns that the template's prompt asks for.
            show: is handed the text in pieces, as soon as each is certain.

        Raises:
            InputError: the template cannot write the prompt, or the model cannot read it.
        """
        prompt = self._encode(row)
        room = sampling.max_new_tokens
        if self._limits.table:
            room = min(room, self._limits.positions - len(prompt))
        text = _Text(self._decoded, sampling.stop, show)
        with evaluating(self.model):
            if sampling.beams > 1:
                generator = Generator(self.model, self._ends, [prompt], sampling.beams, room, len(prompt))
                found = generator.generate([0])[0]
                ended = len(found) < room
                for token in found:
                    text.add(token)
            else:
                ended = self._stream(prompt, room, sampling, text)
        text.close()
        reason = "stop_text" if text.stopped else "end" if ended else "length"
        return Said(
            text.whole, reason, len(prompt), len(text.tokens), self._parts(row, text.tokens, sampling.stop)
        )

    def _decoded(self, tokens: Sequence[int]) -> str:
        if self._reasoning is not None:
            return self._reasoning.shown(tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _parts(self, row: Row, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, str | None] | None:
        if self._reasoning is None:
            return None
        thought, answer = self._reasoning.parts(tokens, self.template.prompt(row))
        if answer is None:
            return before_stop(thought, stop).strip(), None
        return thought.strip(), before_stop(answer, stop).strip()

    def _encode(self, row: Row) -> list[int]:
        try:
            self.template.prompt(row).encode()  # what came in as no UTF-8 cannot be written as such
            prompt = encode_prompt(self.tokenizer, self.template, row, straddles=self._straddles)
        except RowError as error:
            raise InputError(f"template {self.template.name}: {error}") from None
        except UnicodeEncodeError:
            raise InputError("the prompt is no text in UTF-8") from None
        self._limits.check_ids(prompt, self.tokenizer, "the prompt")
        if warning := self._limits.check_length(len(prompt) + 1, "the prompt has", "ask with fewer words"):
            self._warn(warning)
        return prompt

    def _stream(self, prompt: list[int], room: int, sampling: Sampling, text: _Text) -> bool:
        """Writes into `text`; returns whether an end token came."""
        take = _Take(self._ends, text)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # An answer that is cut off by an exception leaves a cache of which nobody knows what it holds.
        cache, self._cache = self._usable_cache(prompt), None
        found, cache = generate(
            self.model,
            prompt,
            self._ends,
            cache=cache,
            stopping_criteria=StoppingCriteriaList([take]),
            max_new_tokens=room,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
        )
        # What other layers have read cannot be told from them, nor gone on from with several tokens.
        if cache is not None and all(type(layer) in _OF_ATTENTION for layer in cache.layers):
            self._cache, self._cached = cache, [*prompt, *found][: cache.get_seq_length()]
        return take.ended

    def _usable_cache(self, prompt: list[int]) -> Any:
        """The cache of what this prompt begins with, or None."""
        if self._cache is None or not continues_from_cache(self.model):
            return None
        same = common_prefix([self._cached, prompt[:-1]])  # one token at least has to be read
        if surplus := len(self._cached) - same:
            # A window has forgotten what it would have to go back to.
            if same == 0 or any(type(layer) is not DynamicLayer for layer in self._cache.layers):
                return None
            self._cache.crop(-surplus)
        return self._cache


class _Take(StoppingCriteria):
    """Hands each new token over; stops when the text does."""

    def __init__(self, ends: Sequence[int], text: _Text):
        self._ends, self._text = set(ends), text
        self.ended = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        token = int(input_ids[0, -1])
        self.ended = token in self._ends
        if not self.ended:
            self._text.add(token)
        return torch.full((1,), self._text.stopped, dtype=torch.bool, device=input_ids.device)


class _Text:
    """The text of tokens, shown as far as no further token changes it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], show: Show):
        self._decode, self._stop, self._show = decode, stop, show
        self._shown = ""
        self.tokens: list[int] = []
        self.whole, self.stopped = "", False

    def add(self, token: int) -> None:
        if self.stopped:
            return
        self.tokens.append(token)
        decoded = self._decode(self.tokens)
        cut = before_stop(decoded, self._stop)
        self.stopped = cut != decoded
        self.whole = cut.strip()
        self._show_up_to(self.whole[: self._certain(cut.lstrip())])

    def close(self) -> None:
        """Shows what was held back."""
        self._show_up_to(self.whole)

    def _certain(self, text: str) -> int:
        """The characters that stay: not the white space at the end, half a character, or what may become a
        stop text."""
        begun = [
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        ]
        kept = text[: len(text) - max(begun, default=0)]
        return len(kept.rstrip(_HALF_A_CHARACTER).rstrip())

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
