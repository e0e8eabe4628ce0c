"""One evaluation from tasks to results: encode, batch, share among processes, continue, summarise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers

from linchain_cli import __version__
from linchain_cli.chain import chain_layers, folded
from linchain_cli.data.encoding import encode_prompt, encode_responses
from linchain_cli.data.rows import RowError, Template
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.evaluation.likelihood import OptionScorer
from linchain_cli.evaluation.options import OptionTree, build_tree
from linchain_cli.evaluation.progress import Progress
from linchain_cli.evaluation.results import Prediction, Results, fingerprint, summarise
from linchain_cli.evaluation.store import ResultStore
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.evaluations import FORMAT_VERSION, Evaluation
from linchain_cli.model.products import fast_products
from linchain_cli.storage import sha256_bytes, tensor_bytes

ProtocolName = Literal["likelihood", "generate"]
BEAMS = 4
# Tokens of a batch by device, where "cuda" stands for all but CPUs. A CPU's cores are busy long before, so
# that larger batches only have more padding: SmolLM2-135M scores 9.7 rows per second with 256, 12.9 with 512,
# 11.0 with 2,048.
BATCH_TOKENS = {
    "likelihood": {"cpu": 512, "cuda": 16384},
    "generate": {"cpu": 2048, "cuda": 16384},
}


class Job(Protocol):
    """The rows of one task under one protocol: batches of row positions, and the predictions of one batch."""

    task: Task
    batches: list[list[int]]

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        """The predictions of one of `batches`."""


class LikelihoodJob:
    """Scores the options behind the answer prefix; the best one is the prediction, of equals the first."""

    def __init__(self, model, tokenizer, template: Template, task: Task, batch_tokens: int):
        self.task = task
        trees = [_option_tree(tokenizer, template, task, row) for row in task.rows]
        self._scorer = OptionScorer(model, trees, batch_tokens)
        self.batches = self._scorer.batches

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        predictions = []
        for position, scores in zip(batch, self._scorer.scores(batch), strict=True):
            row = self.task.rows[position]
            if not all(map(math.isfinite, scores)):
                raise LinchainError(
                    f"{self.task.name}, row {row.index + 1}: the model's scores are {scores}:"
                    " its weights are damaged or its precision is too low"
                )
            by_option = dict(zip(row.options, scores, strict=True))
            prediction = max(by_option, key=by_option.__getitem__)
            predictions.append(_prediction(self.task, row, prediction, {"scores": by_option}))
        return predictions


def _option_tree(tokenizer, template: Template, task: Task, row: TaskRow) -> OptionTree:
    with _place(task, row):
        responses = [task.prefix + option for option in row.options]
        prompt, continuations = encode_responses(tokenizer, template, row.fields, responses)
        return build_tree([prompt + tokens for tokens in continuations], tokenizer.eos_token_id)


class GenerationJob:
    """Lets the model write and reads the answer off its text."""

    def __init__(self, model, tokenizer, template: Template, task: Task, batch_tokens: int, beams: int):
        from linchain_cli.evaluation.generation import Generator

        self.task, self._tokenizer = task, tokenizer
        prompts = []
        for row in task.rows:
            with _place(task, row):
                prompts.append(encode_prompt(tokenizer, template, row.fields))
        self._generator = Generator(model, tokenizer, prompts, beams, task.max_new_tokens, batch_tokens)
        self.batches = self._generator.batches

    def run(self, batch: Sequence[int]) -> list[Prediction]:
        predictions = []
        for position, tokens in zip(batch, self._generator.generate(batch), strict=True):
            row = self.task.rows[position]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            prediction = self.task.rule.extract(text, row.options)
            predictions.append(_prediction(self.task, row, prediction, {"text": text}))
        return predictions


@contextlib.contextmanager
def _place(task: Task, row: TaskRow) -> Iterator[None]:
    """Names the row in what its encoding complains about."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{task.source}, row {row.index + 1}: the template wants a column {error}") from None
    except (RowError, ValueError) as error:
        raise InputError(f"{task.source}, row {row.index + 1}: {error}") from None


def _prediction(task: Task, row: TaskRow, prediction: str | None, found: Mapping[str, Any]) -> Prediction:
    correct = task.rule.is_correct(prediction, row.answer)
    return {
        "index": row.index,
        "task": task.name,
        "prediction": prediction,
        "answer": row.answer,
        "correct": correct,
        **found,
    }


def evaluate(
    model,
    tokenizer,
    template: Template,
    tasks: Sequence[Task],
    *,
    name: str,
    protocol: ProtocolName = "likelihood",
    beams: int = BEAMS,
    limit: int | None = None,
    batch_tokens: int | None = None,
    base_sha256: str | None = None,
    quantization: str = "none",
    out: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    share: bool = True,
) -> Results:
    """Evaluates a loaded model (on whichever device it is, its chain layers folded) on tasks.

    Args:
        name: how the result names the model.
        limit: how many rows of each task were loaded at most: results of other limits are other results.
        base_sha256: what tells the base from others, as `quantization` does: they go into the result and
            decide whether an earlier or interrupted evaluation is one of the same model.
        out: where the result goes, a directory or a .json file. With it, finished rows are kept on disk from
            batch to batch, a stopped evaluation of the same model, rows and setting continues, tasks that
            were measured so before are not measured again, and the result is added to what is there.
        on_progress: called with the task's name, the rows done and all rows, after each batch.
        share: under torch.distributed the processes share the batches, each returns all results, and the
            first one writes. Otherwise each process runs all batches, which a model that is spread over
            them needs.

    Returns:
        The results of these tasks; `path` is the file that holds them, perhaps among others.

    Raises:
        InputError: a task cannot be evaluated under this protocol, a row cannot be encoded, or nothing can be
            written at `out`.
    """
    setting = _setting(model, template, tasks, name, protocol, beams, limit, base_sha256, quantization)
    own = {task.name: _own_template(task, template, tokenizer) for task in tasks}
    fingerprints = {task.name: fingerprint(setting, task, own[task.name].fingerprint) for task in tasks}
    rank, world = _rank_and_world()
    turn_of, shares = (rank, world) if share else (0, 1)
    store = ResultStore(out, setting) if out is not None else None
    earlier = store.measured(fingerprints) if store else None
    missing = [task for task in tasks if earlier is None or task.name not in earlier.summary.tasks]
    progress = Progress(store.directory, _only(fingerprints, missing)) if store and share else None
    done = dict(progress.done) if progress else {}
    total = sum(len(task.rows) for task in tasks)
    known = total - sum(len(task.rows) for task in missing)
    if on_progress and known + len(done):
        on_progress("continuing", known + len(done), total)
    try:
        with _evaluating(model):
            for turn, job, batch in _batches(model, tokenizer, own, missing, setting, batch_tokens):
                keys = [(job.task.name, job.task.rows[position].index) for position in batch]
                if turn % shares != turn_of or all(key in done for key in keys):
                    continue
                predictions = _run(job, batch)
                done.update(zip(keys, predictions, strict=True))
                if progress:
                    progress.append(predictions)
                if on_progress:
                    on_progress(job.task.name, known + len(done), total)
    finally:
        if progress:
            progress.close()
    if not missing:
        return replace(earlier.of_tasks(fingerprints), known=tuple(fingerprints))
    results = summarise(missing, _gather(list(done.values()), shares), setting, fingerprints)
    path = earlier.path if earlier else None
    if store and rank == 0:
        path = store.add(results).path
        if progress:
            progress.remove()
    known_tasks = tuple(earlier.summary.tasks) if earlier else ()
    results = results.with_tasks_of(earlier) if earlier else results
    return replace(results.of_tasks(fingerprints), path=path, known=known_tasks)


def _only(fingerprints: Mapping[str, str], tasks: Sequence[Task]) -> dict[str, str]:
    return {task.name: fingerprints[task.name] for task in tasks}


def _own_template(task: Task, template: Template, tokenizer) -> Template:
    return template if task.template in (None, template.name) else get_template(task.template, tokenizer)


def _run(job: Job, batch: Sequence[int]) -> list[Prediction]:
    """A batch's predictions; one that does not fit into the GPU's memory is halved until it does."""
    try:
        return job.run(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise LinchainError(f"a single row does not fit into the GPU's memory: {error}") from error
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return _run(job, batch[:middle]) + _run(job, batch[middle:])


def answer(
    model, tokenizer, template: Template, prompt: str, *, beams: int = 1, max_new_tokens: int = 256
) -> str:
    """What the model writes when `prompt` goes through the template as an instruction."""
    from linchain_cli.evaluation.generation import Generator

    tokens = encode_prompt(tokenizer, template, {"instruction": prompt, "input": ""})
    with _evaluating(model):
        generator = Generator(model, tokenizer, [tokens], beams, max_new_tokens, len(tokens))
        return tokenizer.decode(generator.generate([0])[0], skip_special_tokens=True).strip()


@contextlib.contextmanager
def _evaluating(model) -> Iterator[None]:
    """Eval mode (dropout off), no gradients, chains folded; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    chains = folded(model) if chain_layers(model) else contextlib.nullcontext()
    try:
        with torch.inference_mode(), chains, fast_products(model):
            yield
    finally:
        model.train(was_training)


def _batches(
    model, tokenizer, templates, tasks, setting, batch_tokens
) -> Iterator[tuple[int, Job, list[int]]]:
    """All batches in order, numbered over all tasks. The same on every process, whatever is done already."""
    if batch_tokens is None:
        by_device = BATCH_TOKENS[setting.protocol]
        batch_tokens = by_device.get(model.get_input_embeddings().weight.device.type, by_device["cuda"])
    number = 0
    for task in tasks:
        own = templates[task.name]
        if setting.protocol == "likelihood":
            job: Job = LikelihoodJob(model, tokenizer, own, task, batch_tokens)
        else:
            job = GenerationJob(model, tokenizer, own, task, batch_tokens, setting.beams)
        for batch in job.batches:
            yield number, job, batch
            number += 1


def _setting(model, template, tasks, name, protocol, beams, limit, base_sha256, quantization) -> Evaluation:
    for task in tasks:
        if protocol == "likelihood" and task.rule.kind != "options":
            raise InputError(
                f"{task.name} has no options whose likelihood could be compared: use --protocol generate"
            )
    return Evaluation(
        format_version=FORMAT_VERSION,
        model=name,
        protocol=protocol,
        beams=beams if protocol == "generate" else None,
        template=template.name,
        template_sha256=template.fingerprint,
        dtype=str(model.dtype).split(".")[-1],
        quantization=quantization,
        limit=limit,
        base_sha256=base_sha256,
        adapter_sha256=_adapter_hash(model),
        versions={
            "linchain": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        tasks={},
    )


def _adapter_hash(model) -> str | None:
    """SHA-256 over the values of the model's chains, as that of the adapter's file; None without any."""
    chains = {
        f"{path}.{name}": value
        for path, chain in chain_layers(model).items()
        for name, value in chain.named_parameters(recurse=False)
    }
    return sha256_bytes(tensor_bytes(chains)) if chains else None


def _rank_and_world() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gather(predictions: list[Prediction], world: int) -> list[Prediction]:
    """The rows of all processes, on each of them."""
    if world == 1:
        return predictions
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, predictions)
    return [prediction for part in parts for prediction in part]
