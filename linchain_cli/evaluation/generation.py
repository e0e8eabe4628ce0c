"""Beam search for many prompts: finished rows leave the batch, prompts are read once and not once per beam.

The search is that of transformers' `generate` (length penalty 1, `early_stopping=False`, no sampling, no
processors), which the tests hold it to. There every beam reads the whole prompt, and a batch runs until its
last row is done; here the prompt's keys and values are computed once and spread over the beams, and a row is
dropped as soon as none of its beams can improve on what it has finished. One beam is greedy search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linchain_cli.data.rows import Template
from linchain_cli.data.templates import end_tokens
from linchain_cli.errors import InputError
from linchain_cli.evaluation.likelihood import plan_batches
from linchain_cli.evaluation.tryout import (
    continues_from_cache,
    ignores_padding,
    refuse_broken,
    takes_positions,
)
from linchain_cli.model.attention import attention_window
from linchain_cli.model.flat_rows import in_one_copy
from linchain_cli.model.logits import cache_name, last_logits, with_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD = 0
# Cached tokens (prompt and answer of every beam) for each token that a batch may read at once.
CACHED_PER_TOKEN = 4


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The tokens that end an answer: those that the template taught, and those of the model's generation
    config.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in [*end_tokens(template, tokenizer), *own] if token is not None})


class Generator:
    """Continues prompts (lists of tokens) by at most `max_new_tokens` tokens with `beams` beams, up to one of
    the tokens `ends`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ends: Sequence[int],
        prompts: Sequence[Sequence[int]],
        beams: int,
        max_new_tokens: int,
        batch_tokens: int,
    ):
        self.model, self.prompts, self.beams, self.max_new_tokens = model, prompts, beams, max_new_tokens
        self.device = model.get_input_embeddings().weight.device
        self.ends = list(ends)
        refuse_broken(model)
        self._own_search = continues_from_cache(model)
        # What a batch holds in its caches is the prompt and the answer, once per beam.
        lengths = [beams * (len(prompt) + max_new_tokens) for prompt in prompts]
        self.batches = plan_batches(lengths, CACHED_PER_TOKEN * batch_tokens)
        longest = max(map(len, prompts)) + max_new_tokens
        if not (self._own_search and longest <= attention_window(model) and ignores_padding(model)):
            self.batches = [same for batch in self.batches for same in self._of_one_length(batch)]

    def _of_one_length(self, batch: Sequence[int]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index in batch:
            groups.setdefault(len(self.prompts[index]), []).append(index)
        return list(groups.values())

    @torch.inference_mode()
    def generate(self, batch: Sequence[int]) -> list[list[int]]:
        """The answers of one of `self.batches`, each without the token that ends it."""
        prompts = [self.prompts[index] for index in batch]
        answers = self._search(prompts) if self._own_search else self._transformers(prompts)
        return [self._without_end(answer) for answer in answers]

    def _without_end(self, answer: Sequence[int]) -> list[int]:
        end = next((position for position, token in enumerate(answer) if token in self.ends), len(answer))
        return list(answer[:end])

    def _transformers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """transformers' own search, for caches that cannot be spread over beams; prompts of one length."""
        try:
            found, _ = _generate(
                self.model,
                prompts,
                self.ends,
                num_beams=self.beams,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        except ValueError as error:
            raise InputError(
                f"{type(self.model).__name__} cannot generate with {self.beams} beams: {error}"
            ) from error
        return found

    def _search(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        reader = _Reader(self.model, prompts)
        search = BeamSearch(len(prompts), self.beams, self.max_new_tokens, self.ends, self.device)
        logits = reader.read_prompts()
        while True:
            parents, tokens = search.advance(logits)
            if parents is None:
                return search.answers()
            logits = reader.read_tokens(None if search.in_place else parents, tokens, search.rows)


def generate(
    model: PreTrainedModel, prompt: Sequence[int], ends: Sequence[int], *, cache: Any = None, **options: Any
) -> tuple[list[int], Any]:
    """transformers' own continuation of one prompt: the new tokens, their end included, and the cache of all
    that was read.

    Args:
        cache: of the first tokens of `prompt`; it is continued in place.
        options: of `generate` and of its GenerationConfig.
    """
    found, cache = _generate(model, [prompt], ends, cache, **options)
    return found[0], cache


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    cache: Any = None,
    **options: Any,
) -> tuple[list[list[int]], Any]:
    """`generate` for prompts of one length. The settings are those that are given alone: transformers would
    fill in the model's (a repetition penalty, for instance), which the search of this module never asks."""
    from transformers import GenerationConfig

    criteria = options.pop("stopping_criteria", None)
    settings = GenerationConfig(
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else PAD,
        return_dict_in_generate=True,
        **options,
    )
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=criteria,
            **with_cache(cache),
        )
    finally:
        model.generation_config = own
    return output.sequences[:, ids.shape[1] :].tolist(), output.get(cache_name())


class _Reader:
    """Feeds tokens to the model and keeps its cache, mask and positions in step with the search.

    Prompts are padded on the left; the mask hides the padding, and positions do not count it.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]):
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self._takes_positions = takes_positions(model)
        # The host knows who is padded: it need not ask the device for every token.
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        longest = max(self._prompt_lengths)
        self._padded = min(self._prompt_lengths) < longest
        ids = torch.full((len(prompts), longest), PAD)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        lengths = torch.tensor(self._prompt_lengths)
        mask = (torch.arange(longest) >= longest - lengths.unsqueeze(1)).long()
        sent = in_one_copy({"ids": ids, "lengths": lengths, "mask": mask}, self.device)
        self._prompts, self._lengths, self._mask = sent.values()
        self._cache: Any = None

    def read_prompts(self) -> torch.Tensor:
        """Logits (rows, vocabulary) behind each prompt."""
        return self._read(self._prompts, (self._mask.cumsum(-1) - 1).clamp(min=0))

    def read_tokens(
        self, parents: torch.Tensor | None, tokens: torch.Tensor, rows: Sequence[int]
    ) -> torch.Tensor:
        """Logits behind `tokens` (n,), each continuing the sequence `parents[i]` of the last read, or with
        None the i-th one; all of them continue the prompts `rows`."""
        self._padded = min(self._prompt_lengths[row] for row in rows) < max(self._prompt_lengths)
        if parents is not None:
            self._cache.batch_select_indices(parents)
            self._lengths, self._mask = self._lengths[parents], self._mask[parents]
        seen = torch.ones(len(tokens), 1, dtype=torch.long, device=self.device)
        self._mask = torch.cat([self._mask, seen], dim=1)
        positions = self._lengths.unsqueeze(1)
        self._lengths = self._lengths + 1
        return self._read(tokens.unsqueeze(1), positions)

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # Without padding no mask is needed, and without one attention takes its faster path. Positions are
        # the usual ones then, and transformers would look whether they are those of packed rows.
        mask = self._mask if self._padded else None
        usual = mask is None and self._cache is None
        inputs = {"position_ids": positions} if self._takes_positions and not usual else {}
        logits, self._cache = last_logits(self.model, ids, self._cache, attention_mask=mask, **inputs)
        return logits


class BeamSearch:
    """The bookkeeping of beam search over rows that leave when they are done. It never sees the model.

    A finished answer's score is its log-probability over its length, its end token counted. A row is done
    when it has `beams` finished answers and its best running beam, at its present length, scores no better
    than the worst of them; with one beam, when that is finished. `rows` are those that are not; `in_place`
    says whether the last step left every sequence where it was, so that no cache has to be copied.
    """

    def __init__(self, rows: int, beams: int, max_new_tokens: int, ends: Sequence[int], device: torch.device):
        self._beams, self._max_new_tokens = beams, max_new_tokens
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._width = max(2, 1 + len(ends)) * beams
        self.rows = list(range(rows))
        self.in_place = False
        self._places = torch.arange(rows, device=device)  # `rows`, on the device
        self._scores = torch.zeros(rows, 1, device=device)
        self._tokens = torch.zeros(rows, 1, 0, dtype=torch.long, device=device)
        self._finished = torch.full((rows, beams), -torch.inf, device=device)
        # Each row's best answer and, in the last column, its length.
        self._answers = torch.zeros(rows, max_new_tokens + 1, dtype=torch.long, device=device)

    def answers(self) -> list[list[int]]:
        """Each row's best answer, its end token included."""
        return [tokens[:length] for *tokens, length in self._answers.tolist()]

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Takes one step, given logits (running rows x beams, vocabulary) behind every running beam.

        Returns which of these sequences go on and with which token, both (n,), or (None, None) at the end.
        `rows` are those that they belong to.
        """
        rows, beams, step = self._tokens.shape
        totals = torch.log_softmax(logits.float(), dim=-1).view(rows, beams, -1) + self._scores.unsqueeze(-1)
        vocabulary = totals.shape[-1]
        totals, picked = totals.view(rows, -1).topk(min(self._width, beams * vocabulary), dim=-1)
        parents, tokens = picked // vocabulary, picked % vocabulary
        sequences = torch.cat([_pick(self._tokens, parents), tokens.unsqueeze(-1)], dim=-1)
        ended = torch.isin(tokens, self._ends)
        if step + 1 == self._max_new_tokens:
            self._finish(totals, sequences, torch.ones_like(ended))
            return None, None
        self._finish(totals, sequences, ended)

        running, order = totals.masked_fill(ended, -torch.inf).topk(self._beams, dim=-1)
        # The step's only meeting of host and device.
        done = self._done(running[:, 0], step + 1).tolist()
        keep = [row for row, is_done in enumerate(done) if not is_done]
        if not keep:
            return None, None
        self.rows = [self.rows[row] for row in keep]
        self.in_place = self._beams == 1 and len(keep) == rows
        places = in_one_copy(torch.tensor(keep), logits.device)
        kept = (self._places, running, self._finished, order, sequences, parents, tokens)
        self._places, self._scores, self._finished, order, sequences, parents, tokens = (
            each.index_select(0, places) for each in kept
        )
        self._tokens = _pick(sequences, order)
        flat = places.unsqueeze(-1) * beams + parents.gather(1, order)
        return flat.flatten(), tokens.gather(1, order).flatten()

    def _finish(self, totals: torch.Tensor, sequences: torch.Tensor, ended: torch.Tensor) -> None:
        """Enters the candidates that ended; only the best `beams` of all candidates count."""
        totals, ended = totals[:, : self._beams], ended[:, : self._beams]
        length = sequences.shape[-1]
        scores = (totals / length).masked_fill(~ended, -torch.inf)
        best, which = scores.max(dim=-1)
        found = nn.functional.pad(
            _pick(sequences, which.unsqueeze(-1)).squeeze(1), (0, self._max_new_tokens - length)
        )
        found = nn.functional.pad(found, (0, 1), value=length)
        better = (best > self._finished[:, 0]).unsqueeze(-1)
        before = self._answers.index_select(0, self._places)
        self._answers.index_copy_(0, self._places, torch.where(better, found, before))
        self._finished = torch.cat([self._finished, scores], dim=-1).topk(self._beams, dim=-1).values

    def _done(self, best_running: torch.Tensor, length: int) -> torch.Tensor:
        worst = self._finished[:, -1]
        if self._beams == 1:
            return worst > -torch.inf
        return (worst > -torch.inf) & (best_running / length <= worst)


def _pick(sequences: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Of sequences (rows, beams, length) those that `which` (rows, n) names: (rows, n, length)."""
    return sequences.gather(1, which.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))
