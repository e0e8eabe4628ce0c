"""Memory: how much fits into a micro-batch, and what is done and said when something did not."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object

from linchain_cli.chain import folded
from linchain_cli.data.batches import step_rows, steps_per_epoch
from linchain_cli.errors import LinchainError
from linchain_cli.machine import available_memory, is_out_of_memory, resident_bytes
from linchain_cli.recipe import Recipe
from linchain_cli.training.job import Job
from linchain_cli.training.processes import sum_over_processes, together

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# The share of free memory that may be planned with; the rest is for fragmentation and other processes.
USABLE = 0.9
GIB = 2**30
_POLL_SECONDS = 0.001
_FEW = 8  # tokens
_EPOCHS_AHEAD = 100  # of longer runs: by then rows of all lengths have met


def find_tokens(job: Job, note: Callable[[str], None]) -> int:
    """How many tokens of a micro-batch fit, padding included, up to those of the longest rows that make up a
    process's share of the global batch; one row in any case.

    It is measured on the longest rows: first what a few tokens cost, then one row, then twice as many each
    time, as long as the two measurements before say that there is room. So nothing runs out. All processes
    find the same. What a first step takes outside of torch's allocator (kernels, NCCL's buffers) is taken
    before the room is measured.
    """
    data, world = job.data.train, job.accelerator.num_processes
    share = math.ceil(min(job.recipe.training.global_batch_size, len(data)) / world)
    longest = np.argsort(-data.lengths.astype(np.int64), kind="stable")[:share]
    few = job.objective.beginnings(job.objective.collate(data, longest[:1], job.base.pad_id), _FEW)
    together(job.accelerator, lambda: _forward_and_backward(job, few))
    sum_over_processes(job.accelerator, job.optimizer.sums)  # all zero
    before, room = _in_use(job.device), USABLE * _room(job)

    def measured(size: int) -> tuple[float, float]:
        """Bytes that `size` rows need (0: a few tokens), and those there are: the worst process's."""
        batch = job.objective.collate(data, longest[:size], job.base.pad_id) if size else few
        need = together(job.accelerator, lambda: _peak_of(job, batch)) - before
        found = gather_object([(need, room)])
        return max(need for need, _ in found), min(room for _, room in found)

    size, (last, _), (need, limit) = 1, measured(0), measured(1)
    per_row = max(1.0, need - last)
    while size < share and need + per_row * (min(2 * size, share) - size) <= limit:
        bigger = min(2 * size, share)
        last, (need, limit) = need, measured(bigger)
        per_row = max(1.0, (need - last) / (bigger - size))
        size = bigger
    rows = min(share, max(1.0, size + (limit - need) / per_row))
    tokens = int(rows * int(data.lengths[longest[0]]))
    note(
        f"training.micro_batch_size: auto is {tokens:,} tokens, as many as {rows:.1f} of the {share} longest"
        f" rows per step and process (each takes about {per_row / GIB:.2f} of {limit / GIB:.2f} GiB)"
    )
    return tokens


def within_budget(job: Job, run: Callable[[], _T]) -> _T:
    """What `run` gives, which goes through micro-batches as the job cuts them. Where memory runs out, the
    budget of `micro_batch_size: auto` is halved, and it is called again.

    Raises:
        RuntimeError, MemoryError: memory ran out with the recipe's own number of rows, with micro-batches
            that are no larger than the longest row, or in a base spread over processes, which take part in
            each other's micro-batches.
    """
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and _halve(job)):
                raise
        # Behind the handler, because what it caught holds all that was computed.
        job.optimizer.zero_grad()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def _halve(job: Job) -> bool:
    """Halves the budget of tokens, to no less than the longest row; whether that was any less."""
    state, data = job.state, job.data
    longest = max(int(rows.lengths.max()) for rows in (data.train, data.validation) if rows is not None)
    if state.micro_batch_tokens is None or state.micro_batch_tokens <= longest or job.base.sharded:
        return False
    state.micro_batch_tokens = max(longest, state.micro_batch_tokens // 2)
    logger.warning(
        "Out of memory: micro-batches have up to %s tokens from here on.", f"{state.micro_batch_tokens:,}"
    )
    return True


def _peak_of(job: Job, batch: Any) -> int:
    """The most memory in use during a forward and a backward pass."""
    with _peak(job.device) as peak:
        _forward_and_backward(job, batch)
    return peak.bytes


def _forward_and_backward(job: Job, batch: Any) -> None:
    """What a micro-batch takes, with nothing left of it: no gradient, no number that the run computes."""
    with folded(job.model), job.dropping_out():
        job.objective.add_gradients(job.model, batch, 1.0, job.device)
    job.optimizer.zero_grad()


def run_heaviest(job: Job) -> None:
    """Runs the largest micro-batches that lie ahead, so that memory ends a run now and not at their step.

    Room for the optimizer's state, which comes with the first step, is held meanwhile.
    """
    held = torch.empty(_state_to_come(job), dtype=torch.uint8, device=job.device)
    within_budget(job, lambda: _run_heaviest(job))
    del held


def _run_heaviest(job: Job) -> None:
    training, state, data = job.recipe.training, job.state, job.data.train
    ahead, world = range(state.step, job.total_steps), job.accelerator.num_processes
    size, tokens = state.micro_batch_size, state.micro_batch_tokens
    batch = training.global_batch_size

    def in_all(part: np.ndarray) -> int:
        return int(data.lengths[part].sum())

    def with_padding(part: np.ndarray) -> int:
        return len(part) * int(data.lengths[part].max(initial=0))

    for step in heaviest_steps(data.lengths, job.recipe.seed, batch, size, ahead, world, tokens, data.starts):
        parts = job.micro_batches(step_rows(len(data), job.recipe.seed, batch, step, data.starts), data)
        largest = [max(parts, key=in_all)]
        if tokens is not None:  # on every process, because all take part in each
            largest.append(max(parts, key=with_padding))
        for part in largest:
            _forward_and_backward(job, job.objective.collate(data, part, job.base.pad_id))


def heaviest_steps(
    lengths: np.ndarray,
    seed: int,
    global_batch: int,
    micro_batch: int | None,
    ahead: range,
    world: int = 1,
    tokens: int | None = None,
    starts: np.ndarray | None = None,
) -> list[int]:
    """The steps of `ahead` with the first process's largest micro-batches: that with most tokens, and that
    with most positions if short rows are padded (where it is another step).

    Args:
        lengths: each row's tokens, (rows,) int32.
        micro_batch, tokens, starts: as `micro_batches` takes them. Of conversations that became several rows
            the micro-batches are taken for ones that are sorted by length alone.
    """
    count, per_epoch = len(lengths), steps_per_epoch(len(lengths), global_batch)
    last = min(ahead.stop, ahead.start + _EPOCHS_AHEAD * per_epoch)
    sizes = [np.empty((2, 0), dtype=np.int64)]
    for epoch in range(ahead.start // per_epoch, math.ceil(last / per_epoch)):
        order = step_rows(count, seed, count, epoch, starts)  # an epoch as one step: its whole order
        of_epoch = _largest_parts(lengths[order].astype(np.int64), global_batch, micro_batch, tokens, world)
        steps = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)
        sizes.append(of_epoch[:, (steps >= ahead.start) & (steps < last)])
    in_all, positions = np.concatenate(sizes, axis=1)
    return sorted({ahead[int(each.argmax())] for each in (in_all, positions)}) if len(in_all) else []


def _largest_parts(
    lengths: np.ndarray, global_batch: int, micro_batch: int | None, tokens: int | None, world: int
) -> np.ndarray:
    """(2, steps): tokens and padded positions of the first process's largest micro-batches; `lengths` are in
    an epoch's order.
    """
    full = len(lengths) // global_batch * global_batch
    found = []
    for steps in (lengths[:full].reshape(-1, global_batch), lengths[None, full:]):
        if steps.size:
            share = -np.sort(-steps, axis=1)[:, ::world]
            if tokens is None:
                rows = math.ceil(share.shape[1] / math.ceil(share.shape[1] / micro_batch))
                found.append([share[:, :rows].sum(axis=1), rows * share[:, 0]])
            else:
                found.append(_largest_by_tokens(share, tokens))
    return np.concatenate(found, axis=1)


def _largest_by_tokens(share: np.ndarray, tokens: int) -> np.ndarray:
    """As `_largest_parts`, of rows sorted by length, (steps, rows), cut by `tokens`."""
    count = share.shape[1]
    up_to = np.pad(share.cumsum(axis=1), ((0, 0), (1, 0)))  # tokens of the first n rows
    steps, start = np.arange(len(share)), np.zeros(len(share), dtype=np.int64)
    most = np.zeros((2, len(share)), dtype=np.int64)
    while (start < count).any():
        longest = share[steps, np.minimum(start, count - 1)]
        end = np.minimum(count, start + np.maximum(1, tokens // longest))
        most = np.maximum(most, [up_to[steps, end] - up_to[steps, start], (end - start) * longest])
        start = end
    return most


class _Peak:
    bytes = 0


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """Measures the most memory in use in the block: the allocator's on CUDA, else the process's, polled."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, _in_use(device))
            done.wait(_POLL_SECONDS)

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _room(job: Job) -> int:
    """Bytes free for activations, once the optimizer's state is there."""
    return _free(job.device) - _state_to_come(job)


def _state_to_come(job: Job) -> int:
    """Bytes of the optimizer's state at most, which the first step allocates."""
    return 0 if job.state.step else 2 * 4 * sum(parameter.numel() for parameter in job.parameters.values())


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return available_memory()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@contextlib.contextmanager
def explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turns running out of memory into numbers and the recipe's keys that need less.

    Raises:
        LinchainError: memory ran out in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LinchainError(f"out of memory: {_numbers(str(error), device)} {_remedies(recipe)}") from error


def _numbers(message: str, device: torch.device) -> str:
    """What was asked for and what was free, out of torch's message."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", message)
    free = re.search(r"of which ([\d.]+ [KMGT]?i?B) is free", message)
    text = _readable(asked[1]) if asked else "more"
    left = free[1] if free else f"{_free(device) / GIB:.2f} GiB"
    return f"{text} were asked for on {device}, where {left} were free."


def _readable(size: str) -> str:
    return f"{int(size.split()[0]) / GIB:.2f} GiB" if size.endswith("bytes") else size


def _remedies(recipe: Recipe) -> str:
    """What needs less: first what leaves the result as it is, so that a run can go on with it."""
    training = recipe.training
    size = training.micro_batch_size or "the default"
    same = [
        (size != 1, f"a smaller training.micro_batch_size (now {size})"),
        (not training.gradient_checkpointing, "training.gradient_checkpointing=true"),
        (
            training.gradient_checkpointing and not training.offload_activations,
            "training.offload_activations=true on a GPU",
        ),
    ]
    other = [
        (True, f"a smaller data.max_length (now {recipe.data.max_length})"),
        (recipe.model.quantization == "none", "model.quantization=nf4"),
        (recipe.model.dtype == "float32", "model.dtype=auto"),
        (training.parallel == "replicate", "training.parallel=shard on several GPUs"),
    ]
    kept, changed = (", ".join(text for applies, text in options if applies) for options in (same, other))
    first = f"What needs less and leaves the result as it is, also with --resume: {kept}. " if kept else ""
    return f"{first}What needs less and makes it another run: {changed}."
