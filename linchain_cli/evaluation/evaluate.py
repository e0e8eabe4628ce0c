"""One evaluation from tasks to results: encode, batch, share among processes, continue, summarise."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from linchain_cli import __version__
from linchain_cli.chain import chain_layers, folded
from linchain_cli.data.fingerprint import tokenizer_sha256
from linchain_cli.data.rows import Template
from linchain_cli.evaluation.jobs import EvaluationJob, Halving, NormaliseName, ProtocolName, Setup, make_job
from linchain_cli.evaluation.measuring import Measuring, gather
from linchain_cli.evaluation.progress import FinishedRows
from linchain_cli.evaluation.questions import check_questions, task_template
from linchain_cli.evaluation.results import Results, fingerprint, summarise
from linchain_cli.evaluation.task import Task
from linchain_cli.model.computed import computed_sha256
from linchain_cli.model.limits import limits
from linchain_cli.model.products import fast_products
from linchain_cli.result_files import FORMAT_VERSION, Evaluation
from linchain_cli.storage import sha256_bytes, tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BEAMS = 4
# Tokens of a batch by device, where "cuda" stands for all but CPUs. A CPU's cores are busy long before, so
# that larger batches only have more padding: SmolLM2-135M scores 9.7 rows per second with 256, 12.9 with 512,
# 11.0 with 2,048.
BATCH_TOKENS = {
    "likelihood": {"cpu": 512, "cuda": 16384},
    "generate": {"cpu": 2048, "cuda": 16384},
}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tasks: Sequence[Task],
    *,
    name: str,
    protocol: ProtocolName = "likelihood",
    beams: int = BEAMS,
    normalise: NormaliseName = "none",
    limit: int | None = None,
    straddles: bool | None = None,
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
        normalise: what the likelihood protocol divides an option's log-probability by.
        straddles: how the prompts that were trained on ended, as for `encode_prompt`.
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
        LinchainError: the processes do not hold the same adapter, rows and settings.
    """
    of_protocol = {"beams": beams} if protocol == "generate" else {"normalise": normalise}
    of_base = base_sha256, tokenizer_sha256(tokenizer), quantization
    setting = setting_of(model, template, name, protocol, limit, *of_base, **of_protocol)
    batch_tokens = batch_tokens or _batch_tokens(model, protocol)
    setup = Setup(model, tokenizer, template, batch_tokens, beams, normalise, straddles)
    own = {task.name: task_template(task, template, tokenizer) for task in tasks}
    fingerprints = {task.name: fingerprint(setting, task, _asked_through(own[task.name])) for task in tasks}
    measuring = Measuring(setting, fingerprints, out)
    rank, world = measuring.rank, measuring.world
    turn_of, shares = (rank, world) if share else (0, 1)
    missing = [task for task in tasks if not measuring.knows(task.name)]
    for warning in check_questions(tokenizer, template, missing, protocol, limits(model)):
        if rank == 0:
            logger.warning("warning: %s", warning)
    unfinished = {task.name: fingerprints[task.name] for task in missing}
    place = measuring.directory if share else None
    progress = FinishedRows(place, unfinished) if place else None
    done = dict(progress.done) if progress else {}
    total = sum(len(task.rows) for task in tasks)
    known = total - sum(len(task.rows) for task in missing)
    if on_progress and known + len(done):
        on_progress("continuing", known + len(done), total)
    passed, halving = known, Halving(spread=not share)
    with evaluating(model):
        for turn, job, batch in _batches(setup, own, missing, protocol):
            passed += len(batch)  # by whatever process
            keys = [(job.task.name, job.task.rows[position].index) for position in batch]
            if turn % shares != turn_of or all(key in done for key in keys):
                continue
            predictions = halving.run(job.run, batch)
            done.update(zip(keys, predictions, strict=True))
            if progress:
                progress.append(predictions)
            if on_progress:
                on_progress(job.task.name, passed, total)
    if not missing:
        return measuring.results()
    found = gather(list(done.values()), shares)
    results = measuring.results(summarise(missing, found, setting, fingerprints))
    if progress and rank == 0:
        progress.remove()
    return results


def _asked_through(template: Template) -> str:
    """What tells templates apart: also by what stands around an answer, which is scored with it."""
    return template.fingerprint + "".join(template.frame)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
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
    setup: Setup, templates: Mapping[str, Template], tasks: Sequence[Task], protocol: ProtocolName
) -> Iterator[tuple[int, EvaluationJob, list[int]]]:
    """All batches in order, numbered over all tasks. The same on every process, whatever is done already."""
    number = 0
    for task in tasks:
        job = make_job(replace(setup, template=templates[task.name]), task, protocol)
        for batch in job.batches:
            yield number, job, batch
            number += 1


def _batch_tokens(model: PreTrainedModel, protocol: ProtocolName) -> int:
    by_device = BATCH_TOKENS[protocol]
    return by_device.get(model.get_input_embeddings().weight.device.type, by_device["cuda"])


def setting_of(
    model: PreTrainedModel,
    template: Template,
    name: str,
    protocol: str,
    limit: int | None,
    base_sha256: str | None,
    tokenizer_sha256: str | None,
    quantization: str,
    *,
    beams: int | None = None,
    normalise: NormaliseName | None = None,
) -> Evaluation:
    """The setting of an evaluation of a loaded model; no task is measured in it yet."""
    return Evaluation(
        format_version=FORMAT_VERSION,
        model=name,
        protocol=protocol,
        beams=beams,
        normalise=normalise,
        template=template.name,
        template_sha256=template.fingerprint,
        dtype=str(model.dtype).split(".")[-1],
        quantization=quantization,
        limit=limit,
        base_sha256=base_sha256,
        config_sha256=computed_sha256(model.config),
        tokenizer_sha256=tokenizer_sha256,
        adapter_sha256=_adapter_hash(model),
        versions={
            "linchain": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        tasks={},
    )


def _adapter_hash(model: PreTrainedModel) -> str | None:
    """SHA-256 over the values of the model's chains, as that of the adapter's file; None without any."""
    chains = {
        f"{path}.{name}": value
        for path, chain in chain_layers(model).items()
        for name, value in chain.named_parameters(recurse=False)
    }
    return sha256_bytes(tensor_bytes(chains)) if chains else None
