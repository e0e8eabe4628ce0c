"""Checkpoints on disk, tensor by tensor: the headers of the weight files, and byte ranges of their data.

A safetensors file is eight bytes (the header's length, little endian), the header (JSON: name -> type, shape
and byte range), and the data. Ranges are read rather than mapped, so that memory stays at a few blocks: the
pages of a map count as the process's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from linchain_cli.errors import InputError, LinchainError, first_line
from linchain_cli.model.buffers import buffers
from linchain_cli.model.files import weight_files

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
TYPES = FLOAT_TYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLED_TYPES = {dtype: name for name, dtype in TYPES.items()}

_LARGEST_HEADER = 100_000_000  # what the safetensors library itself accepts
BLOCK_BYTES = 8 << 20


_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".ot",
)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(values.view(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its safetensors type name, and the bytes that hold it, row-major.

    The bytes lie in `path` from `start` on; a pickled checkpoint's lie in `values` instead.
    """

    key: str
    type: str
    shape: torch.Size
    nbytes: int
    path: Path
    start: int = 0
    values: torch.Tensor | None = field(default=None, repr=False)

    @property
    def is_in_file(self) -> bool:
        """Whether its bytes are those of `path` from `start` on."""
        return self.values is None

    def read(self, first: int = 0, count: int | None = None) -> bytearray:
        """`count` bytes from byte `first` of the tensor on; all of them by default."""
        data = bytearray(self.nbytes - first if count is None else count)
        self.read_into(memoryview(data), first)
        return data

    def read_into(self, target: memoryview, first: int = 0) -> None:
        """Fills `target` with the tensor's bytes from byte `first` on."""
        if self.values is not None:
            flat = self.values.contiguous().reshape(-1).view(torch.uint8)
            target[:] = memoryview(flat[first : first + len(target)].numpy())
            return
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first)
            while done < len(target):
                got = file.readinto(target[done:])
                if not got:
                    raise LinchainError(f"{self.path} ends within tensor {self.key}")
                done += got

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count` (along the first dimension) of a floating-point tensor, in its own
        type.

        They lie in memory that the same thread's next call uses again.
        """
        shape = torch.Size((count, *self.shape[1:]))
        rows = buffers.take("rows", shape, FLOAT_TYPES[self.type])
        self.read_into(bytes_of(rows), first * (self.nbytes // self.shape[0]))
        return rows

    def tensor(self) -> torch.Tensor:
        """The whole tensor, in its own type.

        Raises:
            InputError: it is of a type that linchain does not know.
        """
        return self.part(0, self.shape[0]) if self.shape else self._read(self.shape, 0)

    def part(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count`, in memory of their own. Raises as `tensor` does."""
        return self._read(
            torch.Size((count, *self.shape[1:])), first * (self.nbytes // max(self.shape[0], 1))
        )

    def _read(self, shape: torch.Size, first: int) -> torch.Tensor:
        if self.type not in TYPES:
            raise InputError(f"{self.path}: tensor {self.key} has type {self.type}, which is not supported")
        values = torch.empty(shape, dtype=TYPES[self.type])
        self.read_into(bytes_of(values), first)
        return values

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As a slice of the safetensors library is read: `stored[...]` is the whole tensor."""
        return self.tensor()[index]

    def matrix(self, index: int) -> StoredTensor:
        """One of the tensors that lie along the first dimension: an expert's matrix."""
        size = self.nbytes // self.shape[0]
        if self.values is not None:
            return replace(self, shape=self.shape[1:], nbytes=size, values=self.values[index])
        return replace(self, shape=self.shape[1:], nbytes=size, start=self.start + index * size)

    def row_blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of blocks of about so many `elements`, in order."""
        step = max(1, elements * self.shape[0] // max(self.shape.numel(), 1))
        for first in range(0, self.shape[0], step):
            yield first, min(step, self.shape[0] - first)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint directory: every tensor by its key, in the order of the files."""

    directory: Path
    tensors: dict[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Key -> shape."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each once."""
        return tuple(dict.fromkeys(tensor.path for tensor in self.tensors.values()))


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the headers of a checkpoint's weight files (safetensors or pickled, single or sharded).

    Raises:
        InputError: there are none, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(Path(directory)):
        tensors.update(read_tensors(path))
    return Checkpoint(Path(directory), tensors)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one weight file by key.

    Raises:
        InputError: it is damaged.
    """
    return read_header(path) if path.suffix == ".safetensors" else _read_pickled(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by key, in the order of their data.

    Raises:
        InputError: the header is damaged, or the file is shorter than it says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header's length is impossible")
            header = json.loads(file.read(length))
        tensors = []
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = torch.Size(entry["shape"])
                tensors.append(
                    StoredTensor(key, entry["dtype"], shape, end - begin, path, 8 + length + begin)
                )
        tensors.sort(key=lambda tensor: tensor.start)
        for tensor in tensors:
            _check_range(tensor, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return {tensor.key: tensor for tensor in tensors}


def _check_range(tensor: StoredTensor, data_start: int, file_size: int) -> None:
    if not data_start <= tensor.start <= tensor.start + tensor.nbytes <= file_size:
        raise ValueError(f"tensor {tensor.key} reaches beyond the end of the file")
    dtype = FLOAT_TYPES.get(tensor.type)
    if dtype is not None and tensor.nbytes != tensor.shape.numel() * dtype.itemsize:
        raise ValueError(
            f"tensor {tensor.key} has {tensor.nbytes} bytes, which is not {tuple(tensor.shape)} of"
            f" {tensor.type}"
        )


def _read_pickled(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a pickled checkpoint, mapped rather than read where the file allows it; no pickled code
    is run."""
    import pickle

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before PyTorch 1.6: cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as plain weights, and code in it is never run ({first_line(error)})."
            " Convert it to safetensors where it came from, or use a safetensors version of the model."
        ) from error
    tensors = {}
    for key, value in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(value, torch.Tensor):
            if value.dtype not in _PICKLED_TYPES:
                raise InputError(f"{path}: tensor {key} has type {value.dtype}, which is not supported")
            kind, size = _PICKLED_TYPES[value.dtype], value.numel() * value.element_size()
            tensors[key] = StoredTensor(key, kind, value.shape, size, path, values=value)
    if not tensors:
        raise InputError(f"{path} holds no tensors by name")
    return tensors


def companion_files(directory: Path) -> list[Path]:
    """What lies beside the weights and belongs to the model: configurations, tokenizer, chat templates,
    licence.

    Left out are weights in any format, hidden files, code (it is never run), other folders, and the README,
    which describes the base and not what comes of it.
    """
    directory = Path(directory)
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHT_SUFFIXES)
        and path.suffix != ".py"
        and path.stem.lower() != "readme"
    ]
    return found + sorted((directory / "additional_chat_templates").glob("*.jinja"))
