"""Checkpoints as they are published in fewer bits, read as the bfloat16 weights that they stand for.

What a weight stands for is a formula over its stored parts, the same on every device, for which no kernel is
needed. It is computed in float32 and rounded to bfloat16 once. Whatever reads a checkpoint's values sees the
restored weights: training, rounding to 4 bit, merging and its proof. Hashes are of the stored bytes.

    fp8            weight (8-bit float) · scale of its block, row or tensor: weight_scale_inv (DeepSeek-V3,
                   Qwen3) or weight_scale
    mxfp4          E2M1 values, two in a byte, low half first, times 2^(scale - 127) for each 32 of them (OCP
                   Microscaling Formats 1.0); gpt-oss stores its experts' matrices transposed
    gptq           (q - zero) · scale by group of inputs; an int32 holds 32 / bits consecutive inputs of q, or
                   consecutive outputs of the zeros, which are stored less one (gptq_v2: as they are)
    awq            the same (gemm version), an int32 holding the outputs 0 2 4 6 1 3 5 7, zeros as they are
    bitsandbytes   4 bit: bitsandbytes' own formula; 8 bit: weight · scale of its row / 127
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linchain_cli.errors import InputError
from linchain_cli.model.checkpoint import Checkpoint, StoredTensor, bytes_of, open_checkpoint
from linchain_cli.model.files import read_config

Restore = Callable[[int, int], Tensor]  # (first, count) -> those rows of the weight

_AT_ONCE = 1 << 24  # elements that are restored at a time
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 its eight outputs lie
# What lies beside a float8 weight for kernels that round activations as well.
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub")


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A weight that its checkpoint holds in fewer bits, as if it held bfloat16."""

    restore: Restore | None = field(default=None, repr=False)

    @property
    def is_in_file(self) -> bool:
        return False

    def read_into(self, target: memoryview, first: int = 0) -> None:
        """Fills `target` with the restored weight's bytes from byte `first` on."""
        row_bytes = self.nbytes // self.shape[0]
        step = max(1, 2 * _AT_ONCE // row_bytes)
        end = math.ceil((first + len(target)) / row_bytes)
        for row in range(first // row_bytes, end, step):
            data = bytes_of(self.restore(row, min(step, end - row)).to(torch.bfloat16).contiguous())
            place = row * row_bytes - first
            data = data[max(0, -place) : len(target) - place]
            target[max(0, place) : max(0, place) + len(data)] = data

    def matrix(self, index: int) -> StoredTensor:
        """As of any tensor; restored once, for all the blocks that it will be read in."""
        values = self.part(index, 1)[0]
        return StoredTensor(self.key, self.type, values.shape, values.nbytes, self.path, values=values)


def _packed(key: str, shape: Iterable[int], part: StoredTensor, restore: Restore) -> PackedTensor:
    size = torch.Size(shape)
    return PackedTensor(key, "BF16", size, 2 * size.numel(), part.path, restore=restore)


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a config.json that says how its weights were quantised; None if they were not."""
    parts = (raw, *(part for part in raw.values() if isinstance(part, dict)))
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    return found if found is None or isinstance(found, dict) else {"quant_method": str(found)}


def quantization_method(raw: Mapping[str, Any], directory: Path) -> str | None:
    """What a config.json calls the form of its weights, if they are quantised in one that can be restored.

    Raises:
        InputError: they are quantised in another one.
    """
    settings = quantization_of(raw)
    if settings is None:
        return None
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # whose first configurations did not name it
    problem = _problem(method, settings)
    if method in _RESTORERS and problem is None:
        return method
    raise InputError(
        f"{directory}: the weights are quantised in a form that linchain cannot restore"
        f" ({problem or method or 'unknown method'}). It reads full precision, fp8, mxfp4, GPTQ with 2, 4 or"
        " 8 bits, AWQ (gemm) and bitsandbytes: most models are published in one of these as well."
    )


def _problem(method: str | None, settings: Mapping[str, Any]) -> str | None:
    if method == "gptq" and settings.get("bits") not in (2, 4, 8):
        return f"gptq with {settings.get('bits')} bits"
    if method == "gptq" and settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return f"gptq as {settings['checkpoint_format']}"
    if method == "awq" and settings.get("bits", 4) != 4:
        return f"awq with {settings['bits']} bits"
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        return f"awq as {settings['version']}"
    return None


def open_weights(directory: Path) -> Checkpoint:
    """`open_checkpoint`, with weights that are quantised restored under the names that full ones have.

    Raises:
        InputError: as `open_checkpoint` does, or a part of a quantised weight is missing or does not fit.
    """
    checkpoint = open_checkpoint(directory)
    if not (Path(directory) / "config.json").is_file():
        return checkpoint
    raw = read_config(directory)
    method = quantization_method(raw, directory)
    if method is None:
        return checkpoint
    try:
        tensors = _RESTORERS[method](checkpoint.tensors, quantization_of(raw))
    except KeyError as error:
        raise InputError(f"{directory}: {error.args[0]} of a quantised weight is missing") from error
    return replace(checkpoint, tensors=tensors)


class _Last(threading.local):
    """What a thread read last for a weight that it restores in pieces, each of which needs all of it."""

    def __init__(self) -> None:
        self._key: Any = None
        self._values: tuple[Tensor, ...] = ()

    def of(self, key: Any, read: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `read` returned for `key`, read anew if another key was asked for since."""
        if self._key != key:
            self._key, self._values = None, ()  # freed before the next is read
            self._values, self._key = read(), key
        return self._values


_last = _Last()


def _whole(*parts: StoredTensor) -> tuple[Tensor, ...]:
    key = tuple((part.path, part.key) for part in parts)
    return _last.of(key, lambda: tuple(part.tensor() for part in parts))


# --- 8-bit floats


def _fp8(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
    block = settings.get("weight_block_size")
    found, left_out = {}, set()
    for key, stored in tensors.items():
        if stored.type not in _FLOAT8:
            found[key] = stored
            continue
        names = (f"{key}_scale_inv", f"{key}_scale")
        scale = next((tensors[name] for name in names if name in tensors), None)
        if scale is None:
            raise KeyError(names[0])
        left_out.update((*names, *(key.removesuffix("weight") + name for name in _OF_ACTIVATIONS)))
        restored = _float8_rows(stored, scale, _steps(stored, scale, block))
        found[key] = _packed(key, stored.shape, stored, restored)
    return {key: stored for key, stored in found.items() if key not in left_out}


def _steps(stored: StoredTensor, scale: StoredTensor, block: Any) -> tuple[int, int]:
    """How many rows and columns of a matrix share a scale."""
    sizes = stored.shape[-2:]
    grid = (*scale.shape, 1) if len(scale.shape) == 1 else (1, 1, *scale.shape)[-2:]
    if block and all(math.ceil(size / step) == n for size, step, n in zip(sizes, block, grid, strict=True)):
        return tuple(block)
    if all(n and size % n == 0 for size, n in zip(sizes, grid, strict=True)):
        return tuple(size // n for size, n in zip(sizes, grid, strict=True))
    raise InputError(
        f"{stored.path}: {stored.key} has {tuple(stored.shape)} values and {tuple(scale.shape)} scales, which"
        " do not go together"
    )


def _float8_rows(stored: StoredTensor, scale: StoredTensor, steps: tuple[int, int]) -> Restore:
    down, across = steps

    def restore(first: int, count: int) -> Tensor:
        values = stored.part(first, count).float()
        scales = scale.tensor()
        if scales.dtype == torch.uint8:  # exponents alone
            scales = torch.ldexp(torch.ones(()), scales.int() - 127)
        scales = scales.float()
        scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
        rows = torch.arange(values.shape[-2])
        if values.dim() > 2:  # experts, of which each has scales of its own
            scales = scales[first : first + count]
        else:
            rows = rows + first
        columns = torch.arange(values.shape[-1])
        return values * scales.index_select(-2, rows // down).index_select(-1, columns // across)

    return restore


# --- mxfp4


def _mxfp4(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
    found = {}
    for key, stored in tensors.items():
        if key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" in tensors:
            continue
        if not key.endswith("_blocks"):
            found[key] = stored
            continue
        name = key.removesuffix("_blocks")
        scale = tensors[f"{name}_scales"]
        experts, rows, groups, width = stored.shape
        found[name] = _packed(name, (experts, 2 * groups * width, rows), stored, _mxfp4_rows(stored, scale))
    return found


def _mxfp4_rows(stored: StoredTensor, scale: StoredTensor) -> Restore:
    signed = torch.tensor([*_E2M1, *(-value for value in _E2M1)])

    def restore(first: int, count: int) -> Tensor:
        packed, exponents = stored.part(first, count), scale.part(first, count).int() - 127
        halves = torch.stack([packed & 15, packed >> 4], dim=-1)
        values = torch.ldexp(signed[halves.int()], exponents[..., None, None])
        return values.reshape(*packed.shape[:2], -1).transpose(1, 2)

    return restore


# --- 2, 4 and 8-bit integers by group of inputs


def _grouped(rows: Callable[..., Restore]) -> Callable[..., dict[str, StoredTensor]]:
    """Restores `X.weight` out of `X.qweight`, `X.qzeros`, `X.scales` and, if there is one, `X.g_idx`."""

    def restore(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
        found, parts = {}, ("qweight", "qzeros", "scales", "g_idx")
        for key, stored in tensors.items():
            module, _, name = key.rpartition(".")
            if name not in parts or f"{module}.qweight" not in tensors:
                found[key] = stored
            elif name == "qweight":
                zeros, scales = (tensors[f"{module}.{part}"] for part in parts[1:3])
                groups = tensors.get(f"{module}.g_idx")
                inputs = stored.shape[0] * (32 // settings["bits"] if rows is _gptq_rows else 1)
                outputs = stored.shape[1] * (1 if rows is _gptq_rows else 8)
                _check_groups(stored, zeros, scales, groups, inputs, outputs, settings)
                restored = rows(stored, zeros, scales, groups, settings)
                found[f"{module}.weight"] = _packed(f"{module}.weight", (outputs, inputs), stored, restored)
        return found

    return restore


def _check_groups(
    stored: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
    inputs: int,
    outputs: int,
    settings: Mapping[str, Any],
) -> None:
    """Raises InputError for parts of other sizes: some tools round each module to bits of its own."""
    count = math.ceil(inputs / _group_size(inputs, settings))
    expected = [
        (zeros, (count, outputs * settings.get("bits", 4) // 32)),
        (scales, (count, outputs)),
        *([(groups, (inputs,))] if groups is not None else ()),
    ]
    for part, shape in expected:
        if tuple(part.shape) != shape:
            raise InputError(
                f"{part.path}: {part.key} is {tuple(part.shape)}; with {stored.key} {tuple(stored.shape)} and"
                f" what config.json says of the quantization it has to be {shape}"
            )


def _group_size(inputs: int, settings: Mapping[str, Any]) -> int:
    size = settings.get("group_size", 128)
    return size if size > 0 else inputs


def _gptq_rows(
    stored: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
    settings: Mapping[str, Any],
) -> Restore:
    bits, less = settings["bits"], int(settings.get("checkpoint_format", "gptq") == "gptq")
    shifts, mask = torch.arange(0, 32, bits, dtype=torch.int32), (1 << bits) - 1

    def restore(first: int, count: int) -> Tensor:
        packed, packed_zeros, scale, *group = _whole(*filter(None, (stored, zeros, scales, groups)))
        q = (packed[:, None, first : first + count] >> shifts[None, :, None]) & mask
        q = q.reshape(-1, count)
        zero = ((packed_zeros[:, :, None] >> shifts) & mask).flatten(1)[:, first : first + count] + less
        of_input = group[0].long() if group else torch.arange(len(q)) // _group_size(len(q), settings)
        return (q - zero[of_input]).T * scale[:, first : first + count].float()[of_input].T

    return restore


def _awq_rows(
    stored: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
    settings: Mapping[str, Any],
) -> Restore:
    shifts = 4 * torch.tensor(_AWQ_PLACES, dtype=torch.int32)

    def restore(first: int, count: int) -> Tensor:
        packed, packed_zeros, scale = _whole(stored, zeros, scales)
        begin, end = first // 8, math.ceil((first + count) / 8)
        own = slice(first - 8 * begin, first - 8 * begin + count)
        q, zero = (
            ((each[:, begin:end, None] >> shifts) & 15).flatten(1)[:, own] for each in (packed, packed_zeros)
        )
        of_input = torch.arange(len(q)) // _group_size(len(q), settings)
        return (q - zero[of_input]).T * scale[:, first : first + count].float()[of_input].T

    return restore


# --- bitsandbytes


def _bitsandbytes(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    parts: dict[str, dict[str, StoredTensor]] = {}  # by weight: what its 4-bit form consists of
    for key, stored in tensors.items():
        weight, dot, name = key.partition(".weight.")
        if dot:
            parts.setdefault(f"{weight}.weight", {})[name] = stored
    found = {}
    for key, stored in tensors.items():
        module, _, name = key.rpartition(".")
        scale = tensors.get(f"{module}.SCB")
        if key in parts:
            found[key] = _packed(key, *_four_bit(stored, parts[key]))
        elif name == "weight" and scale is not None:
            found[key] = _packed(key, stored.shape, stored, _int8_rows(stored, scale))
        elif ".weight." not in key and not (scale is not None and name in ("SCB", "weight_format")):
            found[key] = stored
    return found


def _int8_rows(stored: StoredTensor, scale: StoredTensor) -> Restore:
    def restore(first: int, count: int) -> Tensor:
        return stored.part(first, count).float() * (scale.part(first, count).float() / 127)[:, None]

    return restore


def _four_bit(
    stored: StoredTensor, parts: Mapping[str, StoredTensor]
) -> tuple[torch.Size, StoredTensor, Restore]:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    def state() -> QuantState:
        values = {name: part.tensor() for name, part in parts.items()}
        return QuantState.from_dict(values, torch.device("cpu"))

    def restore(first: int, count: int) -> Tensor:
        (weight,) = _last.of(
            (stored.path, stored.key), lambda: (dequantize_4bit(stored.tensor(), state()).bfloat16(),)
        )
        return weight[first : first + count]

    return state().shape, stored, restore


_RESTORERS: dict[str, Callable[..., dict[str, StoredTensor]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _grouped(_gptq_rows),
    "awq": _grouped(_awq_rows),
    "bitsandbytes": _bitsandbytes,
}
