"""The rows of one task under one protocol, as batches that are run one after the other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from linchain_cli.data.encoding import encode_prompt, encode_responses, text_encoder
from linchain_cli.data.formats import RowFormats
from linchain_cli.data.rows import Rendered, RowError, Template
from linchain_cli.data.templates import closing_token
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.evaluation.answers import Reading, within_turn
from linchain_cli.evaluation.fewshot import with_examples
from linchain_cli.evaluation.likelihood import OptionScorer
from linchain_cli.evaluation.options import OptionTree, build_tree, loss_tree
from linchain_cli.evaluation.reasoning import Reasoning
from linchain_cli.evaluation.results import Prediction
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.machine import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ProtocolName = Literal["likelihood", "generate"]
NormaliseName = Literal["none", "bytes", "tokens"]


@dataclass(frozen=True)
class Setup:
    """What all jobs of an evaluation have in common, but for the template, which a task may bring."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    batch_tokens: int
    beams: int = 1
    normalise: NormaliseName = "none"
    straddles: bool | None = None


class EvaluationJob(Protocol):
    """The rows of one task under one protocol: batches of row positions, and the predictions of one batch."""

    task: Task
    batches: list[list[int]]

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        """The predictions of one of `batches`."""


def make_job(setup: Setup, task: Task, protocol: ProtocolName) -> EvaluationJob:
    """The task's rows under the protocol; a task of losses has one of its own."""
    setup = replace(setup, template=with_examples(setup.template, task))
    if task.rule.kind == "loss":
        return LossJob(setup, task)
    return LikelihoodJob(setup, task) if protocol == "likelihood" else GenerationJob(setup, task)


class LikelihoodJob:
    """Scores the options behind the answer prefix; the best one is the prediction, of equals the first."""

    def __init__(self, setup: Setup, task: Task):
        self.task, self._normalise = task, setup.normalise
        self._by_length = task.free_text or setup.normalise != "none"
        scored = [_scored_options(setup, task, row, self._by_length) for row in task.rows]
        self._lengths = [lengths for _, lengths in scored]
        self._scorer = OptionScorer(setup.model, [tree for tree, _ in scored], setup.batch_tokens)
        self.batches = self._scorer.batches

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        predictions = []
        for position, scores in zip(batch, self._scorer.scores(batch), strict=True):
            row = self.task.rows[position]
            _refuse_infinite(self.task, row, scores)
            ways = dict.fromkeys((self._normalise, "none", "bytes") if self._by_length else ("none",))
            readings = {way: self._best(row, scores, self._lengths[position], way) for way in ways}
            by_option = dict(zip(row.options, scores, strict=True))
            predictions.append(_prediction(self.task, row, readings, {"scores": by_option}))
        return predictions

    def _best(self, row: TaskRow, scores: Sequence[float], tokens: Sequence[int], way: str) -> Reading:
        lengths = {
            "none": [1] * len(scores),
            "bytes": [len(option.encode()) for option in row.options],
            "tokens": tokens,
        }[way]
        shares = [score / length for score, length in zip(scores, lengths, strict=True)]
        best = row.options[shares.index(max(shares))]
        return Reading(best, best == row.answer)


def _scored_options(
    setup: Setup, task: Task, row: TaskRow, by_length: bool
) -> tuple[OptionTree, Sequence[int]]:
    """The tree of a row's options, and the number of tokens of each.

    Scores that are divided by a length need all of an option's tokens, also those that options share.
    """
    template, tokenizer = setup.template, setup.tokenizer
    end = closing_token(template, tokenizer)
    lead, _ = template.frame
    responses = [lead + task.prefix + option for option in row.options]
    with _place(task, row):
        if not by_length:
            prompt, continuations = encode_responses(tokenizer, template, row.fields, responses)
            return build_tree([prompt + tokens for tokens in continuations], end), ()
        split = [
            text_encoder(tokenizer).prompt_and_answer(
                _spanning(template.complete(row.fields, response), option), template.adds_bos
            )
            for response, option in zip(responses, row.options, strict=True)
        ]
        start = min(len(prompt) for prompt, _ in split)
        tree = build_tree([prompt + answer for prompt, answer in split], end, start)
        return tree, [len(answer) for _, answer in split]


def _spanning(rendered: Rendered, option: str) -> Rendered:
    """The text with the option alone as its span, and not what stands in front of it."""
    end = rendered.spans[-1][1]
    return Rendered(rendered.text, [(max(rendered.spans[-1][0], end - len(option)), end)])


class GenerationJob:
    """Lets the model write and reads the answer off its text, behind what it thought before."""

    def __init__(self, setup: Setup, task: Task):
        from linchain_cli.evaluation.generation import Generator, stop_tokens

        self.task, self._tokenizer = task, setup.tokenizer
        self._reasoning = Reasoning(setup.tokenizer, setup.template)
        prompts = [_prompt(setup, task, row) for row in task.rows]
        self._asked = [setup.template.prompt(row.fields) for row in task.rows]
        ends = stop_tokens(setup.model, setup.tokenizer, setup.template)
        self._generator = Generator(
            setup.model, ends, prompts, setup.beams, task.max_new_tokens, setup.batch_tokens
        )
        self.batches = self._generator.batches

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        predictions = []
        for position, tokens in zip(batch, self._generator.generate(batch), strict=True):
            row, asked = self.task.rows[position], self._asked[position]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            _, answer = self._reasoning.parts(tokens, asked)
            answer = answer or ""
            said = before_stop(answer, self.task.stop)
            readings = self.task.rule.readings(within_turn(said, asked), row.options, row.answer)
            found = {"text": text[: len(text) - len(answer)] + said}
            predictions.append(_prediction(self.task, row, readings, found))
        return predictions


def _prompt(setup: Setup, task: Task, row: TaskRow) -> list[int]:
    with _place(task, row):
        return encode_prompt(setup.tokenizer, setup.template, row.fields, straddles=setup.straddles)


class LossJob:
    """Scores each row's own text as training would learn it, with the end of the answer."""

    def __init__(self, setup: Setup, task: Task):
        self.task = task
        trees = [_loss_tree(setup, task, row) for row in task.rows]
        self._tokens = [sum(map(len, tree.options)) for tree in trees]
        self._scorer = OptionScorer(setup.model, trees, setup.batch_tokens)
        self.batches = self._scorer.batches

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        predictions = []
        for position, scores in zip(batch, self._scorer.scores(batch), strict=True):
            row = self.task.rows[position]
            _refuse_infinite(self.task, row, scores)
            count = self._tokens[position]
            found = {
                "index": row.index,
                "task": self.task.name,
                "loss": -sum(scores) / count,
                "tokens": count,
            }
            predictions.append(found)
        return predictions


def _loss_tree(setup: Setup, task: Task, row: TaskRow) -> OptionTree:
    with _place(task, row):
        rendered = setup.template.render(RowFormats(setup.template.layouts).row(row.fields))
        encoded = text_encoder(setup.tokenizer).encode(rendered, adds_bos=setup.template.adds_bos)
        return loss_tree([(one.input_ids.tolist(), one.supervised.tolist()) for one in encoded])


def texts_of(setup: Setup, task: Task, row: TaskRow, protocol: ProtocolName) -> tuple[Sequence[int], int]:
    """The tokens that a row has the model read, of all its options, and how many its longest text has."""
    if task.rule.kind != "loss" and protocol == "generate":
        prompt = _prompt(setup, task, row)
        return prompt, len(prompt)
    if task.rule.kind == "loss":
        tree = _loss_tree(setup, task, row)
    else:
        tree, _ = _scored_options(setup, task, row, task.free_text or setup.normalise != "none")
    return tree.tokens, 1 + max(tree.depths)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _refuse_infinite(task: Task, row: TaskRow, scores: Sequence[float]) -> None:
    if not all(map(math.isfinite, scores)):
        raise LinchainError(
            f"{task.name}, row {row.index + 1}: the model's scores are {scores}:"
            " its weights are damaged or its precision is too low"
        )


@contextlib.contextmanager
def _place(task: Task, row: TaskRow) -> Iterator[None]:
    """Names the row in what its encoding complains about."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{task.source}, row {row.index + 1}: the template wants a column {error}") from None
    except (RowError, ValueError) as error:
        raise InputError(f"{task.source}, row {row.index + 1}: {error}") from None


def _prediction(
    task: Task, row: TaskRow, readings: Mapping[str, Reading], found: Mapping[str, Any]
) -> Prediction:
    (_, counted), *others = readings.items()
    prediction = {
        "index": row.index,
        "task": task.name,
        "prediction": counted.prediction,
        "answer": row.answer,
        "correct": counted.correct,
        **found,
    }
    if others:
        prediction["readings"] = {
            name: {"prediction": one.prediction, "correct": one.correct} for name, one in others
        }
    return prediction


@dataclass
class Halving:
    """Runs batches one after the other. One that does not fit into memory is run in halves, or in halves of
    these, and so are those behind it, which are as large: each would be computed up to where it fails.

    Not in a model that is `spread` over processes: they take part in each other's batches, and one that went
    through other parts than the rest would hand them weights of other blocks, which nobody would notice.
    """

    spread: bool = False
    parts: int = 1  # of a batch

    def run(self, run: Callable[[Sequence[int]], list[Prediction]], batch: Sequence[int]) -> list[Prediction]:
        """A batch's predictions, as `run` gives them for a part of it.

        Raises:
            LinchainError: not even a single row fits, or a batch of a spread model does not.
        """
        import torch

        found: list[Prediction] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + math.ceil(len(batch) / self.parts)]
            try:
                found += run(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.spread:
                    raise LinchainError(
                        "a batch does not fit into memory, and a base that is spread over processes cannot"
                        f" read it in halves ({error}). training.parallel=shard and"
                        " training.offload_base=true leave more room, also with --resume"
                    ) from error
                if len(part) == 1:
                    raise LinchainError(f"a single row does not fit into memory: {error}") from error
            # Behind the handler, because what it caught holds all that was computed.
            self.parts *= 2
            torch.cuda.empty_cache()
        return found
