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
from pathlib import Path

import torch

from linchain_cli.errors import LinchainError
from linchain_cli.export.checkpoint import BLOCK_BYTES, StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Answers of a kernel or file system that cannot copy between two files by itself; anything else is a real
# failure.
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written. `data` is the stored tensor to copy as it is, or yields functions that make one
    block of the new one each, in order; they are called in several threads."""

    key: str
    type: str
    shape: torch.Size
    nbytes: int
    data: StoredTensor | Callable[[], Iterable[Callable[[], torch.Tensor]]]


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
    """Threads that make blocks while earlier ones are written. Each computes alone: blocks are small enough
    for a core's cache, and threads that wait for each other within one cost more than they bring."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], torch.Tensor]], ahead: int
) -> Iterator[torch.Tensor]:
    """The jobs' results in order, with at most `ahead` of them under way."""
    under_way: deque[Future[torch.Tensor]] = deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(job))
            if len(under_way) >= ahead:
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
    ordered = sorted(tensors, key=lambda tensor: -math.gcd(tensor.nbytes // max(tensor.shape.numel(), 1), 8))
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
        _write_all(file, len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            if isinstance(tensor.data, StoredTensor):
                _copy(tensor.data, file, progress)
                continue
            written = 0
            for block in _in_order(pool, tensor.data(), 2 * torch.get_num_threads()):
                data = memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())
                _write_all(file, data)
                written += len(data)
                progress(len(data))
            if written != tensor.nbytes:
                raise LinchainError(
                    f"{tensor.key}: {written} bytes were made where {tensor.nbytes} were announced"
                )


def _write_all(file, data) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _copy(tensor: StoredTensor, file, progress: Callable[[int], None]) -> None:
    """Copies a stored tensor's bytes to the end of `file`, inside the kernel where it can do that."""
    if tensor.values is not None:
        for first in range(0, tensor.nbytes, BLOCK_BYTES):
            data = tensor.read(first, min(BLOCK_BYTES, tensor.nbytes - first))
            _write_all(file, data)
            progress(len(data))
        return
    with open(tensor.path, "rb", buffering=0) as source:
        source.seek(tensor.start)
        left = tensor.nbytes
        while left:
            sent = _send(source, file, min(left, 8 * BLOCK_BYTES))
            if not sent:
                raise LinchainError(f"{tensor.path} ends within tensor {tensor.key}")
            left -= sent
            progress(sent)


def _send(source, target, count: int) -> int:
    """Moves up to `count` bytes from one file's position to the other's; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), count)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    data = source.read(count)
    _write_all(target, data)
    return len(data)
