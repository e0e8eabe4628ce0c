"""Writing a checkpoint's weight files: shards of known sizes, tensor by tensor, and the index.

Sizes are known beforehand, so each file begins with its finished header and its data follow as they are made:
copied inside the kernel where a tensor stays as it is, in blocks from a few threads where one is new.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from linchain_cli.errors import LinchainError
from linchain_cli.model.checkpoint import BLOCK_BYTES, StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Answers of a kernel or file system that cannot copy between two files by itself; anything else is a real
# failure.
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM}


# The number of elements that follow in row-major order, and what makes them, in whichever thread. What it
# returns is written before the thread makes the next one, and may then be overwritten.
Block = tuple[int, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `data` is the stored tensor to copy as it is, or yields the new one's
    blocks."""

    key: str
    type: str
    shape: torch.Size
    nbytes: int
    data: StoredTensor | Callable[[], Iterable[Block]]


def plan_shards(tensors: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Cuts the tensors, in their order, into shards of at most `max_bytes` of data; a larger tensor gets its
    own."""
    shards: list[list[NewTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_checkpoint(
    directory: Path,
    tensors: Sequence[NewTensor],
    max_bytes: int,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Writes weight files (and the index, where there are several) into `directory`; returns the weight
    files.

    `progress` is called with the number of data bytes written since its last call.
    """
    shards = plan_shards(tensors, max_bytes)
    count = len(shards)
    names = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    with _workers() as pool:
        for name, shard in zip(names, shards, strict=True):
            _write_file(directory / name, shard, pool, progress)
    if count > 1:
        places = ((tensor.key, name) for name, shard in zip(names, shards, strict=True) for tensor in shard)
        index = {
            "metadata": {
                "total_parameters": sum(tensor.shape.numel() for tensor in tensors),
                "total_size": sum(tensor.nbytes for tensor in tensors),
            },
            "weight_map": dict(sorted(places)),
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / name for name in names]


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that make, write and copy blocks. Each computes alone: blocks are small enough for a core's
    cache, and threads that wait for each other within one cost more than they bring."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def _all_done(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], int]]) -> Iterator[int]:
    """The jobs' results, with a few of them under way at a time. The first error ends it."""
    under_way: deque[Future[int]] = deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(job))
            if len(under_way) >= 2 * torch.get_num_threads():
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _write_file(
    path: Path, tensors: Sequence[NewTensor], pool: ThreadPoolExecutor, progress: Callable[[int], None]
) -> None:
    # Wide types first, so that every tensor starts at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: -math.gcd(_element_size(tensor), 8))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": tensor.type,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_at(file.fileno(), len(encoded).to_bytes(8, "little") + encoded, 0)
        for written in _all_done(pool, _jobs(ordered, file.fileno(), 8 + len(encoded))):
            progress(written)


def _element_size(tensor: NewTensor) -> int:
    return tensor.nbytes // max(tensor.shape.numel(), 1)


def _jobs(tensors: Iterable[NewTensor], target: int, start: int) -> Iterator[Callable[[], int]]:
    """Everything there is to write behind a file's header; each job returns how many bytes it wrote."""
    for tensor in tensors:
        if isinstance(tensor.data, StoredTensor):
            for first in range(0, tensor.nbytes, BLOCK_BYTES):
                count = min(BLOCK_BYTES, tensor.nbytes - first)
                yield partial(_copy, tensor.data, first, count, target, start + first)
        else:
            place = start
            for elements, make in tensor.data():
                size = elements * _element_size(tensor)
                yield partial(_make, tensor.key, make, size, target, place)
                place += size
            if place != start + tensor.nbytes:
                made = place - start
                raise LinchainError(f"{tensor.key}: its blocks have {made} bytes, not {tensor.nbytes}")
        start += tensor.nbytes


def _make(key: str, make: Callable[[], torch.Tensor], size: int, target: int, place: int) -> int:
    block = make()
    data = block.contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes != size:
        raise LinchainError(f"{key}: a block of {data.nbytes} bytes was made where {size} were announced")
    _write_at(target, data, place)
    return size


def _write_at(target: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, place)
        view, place = view[written:], place + written


def _copy(tensor: StoredTensor, first: int, count: int, target: int, place: int) -> int:
    """Copies bytes of a stored tensor, inside the kernel where it can do that."""
    done = 0
    if tensor.is_in_file and hasattr(os, "copy_file_range"):
        with open(tensor.path, "rb", buffering=0) as source:
            while done < count:
                sent = _send(source.fileno(), tensor.start + first + done, count - done, target, place + done)
                if sent is None:
                    break
                if not sent:
                    raise LinchainError(f"{tensor.path} ends within tensor {tensor.key}")
                done += sent
    if done < count:
        _write_at(target, tensor.read(first + done, count - done), place + done)
    return count


def _send(source: int, first: int, count: int, target: int, place: int) -> int | None:
    """Bytes that the kernel copied from file to file; None where it cannot do that here."""
    try:
        return os.copy_file_range(source, target, count, first, place)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return None
