"""W0 + ΔW, tensor by tensor, with memory for a few blocks.

`plan_merge` decides, before anything is written, which file tensor every adapted module's weight is;
`new_tensors` describes the merged checkpoint; `shards.write_checkpoint` writes it. Sums are made in
float64, block by block of rows, and rounded once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linchain_cli.chain import Adapter, ChainTensors, fold_into_a, is_transposed, misfit, parameter_name
from linchain_cli.errors import InputError, LinchainError, did_you_mean
from linchain_cli.export.rounding import round_once
from linchain_cli.export.shards import Block, NewTensor
from linchain_cli.model.buffers import buffers
from linchain_cli.model.checkpoint import FLOAT_TYPES, TYPE_NAMES, Checkpoint, StoredTensor
from linchain_cli.model.names import Conversion, NameMap, Piece, map_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK_ELEMENTS = 1 << 18  # 2 MB as float64: a core's cache holds a block through all steps of its sum


@dataclass(frozen=True)
class Target:
    """One adapted module: its path, the parameter that its weight is, its chain, and whether the weight is
    stored as (d_in, d_out), as Conv1D does. Of routed experts, whose tensors have a dimension more, it is one
    of their matrices of all experts."""

    path: str
    parameter: str
    chain: ChainTensors
    transposed: bool

    def expert(self, index: int) -> Target:
        """The same of one expert's matrix."""
        return replace(self, chain=ChainTensors(*(tensor[index] for tensor in self.chain)))

    def piece(self, piece: Piece) -> Target:
        """The same of some rows of one expert's matrix, as a file holds them."""
        A, links, B = self.expert(piece.expert).chain
        rows = slice(piece.first, piece.first + piece.count)
        chain = ChainTensors(A[:, rows], links, B) if self.transposed else ChainTensors(A, links, B[rows])
        return replace(self, chain=chain, transposed=self.transposed != piece.transposed)


@dataclass(frozen=True)
class ConvertedTargets:
    """File tensors that transformers converts on loading, and the adapted modules among what comes out.

    `pieces` are the file tensors that are rows of single experts' matrices, where all of them are: their sums
    are made one by one, as of any other tensor.
    """

    conversion: Conversion
    targets: tuple[Target, ...]
    pieces: dict[str, Piece] | None = None


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do to each tensor of the base: `plain` by checkpoint key, `converted` by group, with
    the pieces of experts among both; the rest is copied. A classifier's `head` comes behind them, by name."""

    base: Checkpoint
    names: NameMap
    scaling: float
    plain: dict[str, Target]
    converted: tuple[ConvertedTargets, ...]
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def converted_keys(self) -> dict[str, ConvertedTargets]:
        """The checkpoint keys that a conversion takes, by which adapted modules' weights come about."""
        return {key: group for group in self.converted for key in group.conversion.keys}


def plan_merge(base: Checkpoint, adapter: Adapter, model: PreTrainedModel) -> MergePlan:
    """Finds each adapted module's weight in the base's files. `model` is the base's, on the meta device.

    Raises:
        InputError: a module or its weight is not there, has another shape, is shared with another module, is
        stored quantised, or comes out of a conversion that a sum cannot be carried through. The message names
        it.
    """
    names = map_names(model, base.shapes)
    modules = dict(model.named_modules())
    plain: dict[str, Target] = {}
    groups: dict[tuple[str, ...], ConvertedTargets] = {}
    for path, chain in adapter.tensors.items():
        target = _target(modules, path, chain)
        _refuse_tied(names, target)
        if target.parameter in names.renamed:
            key = names.renamed[target.parameter]
            _check_stored(base.tensors[key], target)
            plain[key] = target
        elif target.parameter in names.converted:
            conversion = names.converted[target.parameter]
            before = groups.get(conversion.keys)
            groups[conversion.keys] = ConvertedTargets(
                conversion, (*(before.targets if before else ()), target)
            )
        else:
            raise InputError(
                f"{base.directory}: no tensor of the checkpoint is the weight of '{path}'."
                + did_you_mean(target.parameter, base.tensors)
            )
    converted = [_with_pieces(base, group) for group in groups.values()]
    for group in converted:
        by_name = {target.parameter: target for target in group.targets}
        for key, piece in (group.pieces or {}).items():
            if piece.parameter in by_name:
                plain[key] = by_name[piece.parameter].piece(piece)
                _check_stored(base.tensors[key], plain[key])
    head = adapter.head.tensors if adapter.head else {}
    return MergePlan(base, names, adapter.config.scaling, plain, tuple(converted), head)


def _target(modules: Mapping[str, nn.Module], path: str, chain: ChainTensors) -> Target:
    from transformers.pytorch_utils import Conv1D

    if why := misfit(modules, path, chain.A, chain.B):
        raise InputError(f"the adapter does not fit this base: {why}")
    holder = modules[path if path in modules else path.rpartition(".")[0]]
    transposed = isinstance(holder, Conv1D) or is_transposed(holder)
    return Target(path, parameter_name(modules, path), chain, transposed)


def _refuse_tied(names: NameMap, target: Target) -> None:
    if others := names.tied.get(target.parameter):
        raise InputError(
            f"'{target.path}' shares its weight with {', '.join(others)}: merging into one would change the"
            " other."
            " Train without this target, or use a base whose embeddings are not tied."
        )


def _check_stored(tensor: StoredTensor, target: Target) -> None:
    if tensor.type not in FLOAT_TYPES:
        raise InputError(
            f"{tensor.path.name}: {tensor.key} is stored as {tensor.type}, not as a floating-point matrix."
            " Merge into the original full-precision checkpoint (--base)."
        )
    A, _, B = target.chain
    d_out, d_in = B.shape[-2], A.shape[-1]
    if tensor.shape != (*A.shape[:-2], *((d_in, d_out) if target.transposed else (d_out, d_in))):
        raise InputError(
            f"{tensor.path.name}: {tensor.key} is {tuple(tensor.shape)}, but the adapter was trained on"
            f" {d_in} → {d_out}"
        )


def _with_pieces(base: Checkpoint, group: ConvertedTargets) -> ConvertedTargets:
    """The group with its pieces, if it consists of such.

    Raises:
        InputError: no sum can be carried through its conversion.
    """
    keys = group.conversion.keys
    odd = [key for key in keys if base.tensors[key].type not in FLOAT_TYPES]
    try:
        if odd:
            raise LinchainError(f"{odd[0]} is stored as {base.tensors[odd[0]].type}")
        if pieces := group.conversion.pieces(base.shapes):
            return replace(group, pieces=pieces)
        group.conversion.element_sources(base.shapes)
        return group
    except LinchainError as error:
        raise InputError(
            f"'{group.targets[0].path}' cannot be merged: {error}. Train without this target, or serve the"
            " adapter unmerged ('linchain export --format peft')."
        ) from error


def new_tensors(plan: MergePlan, dtype: torch.dtype | None = None) -> list[NewTensor]:
    """The merged checkpoint, in the base's order. `dtype` recasts every floating-point tensor; None keeps
    each one's type."""
    sums = _ConvertedSums(plan)
    result = []
    for key, stored in plan.base.tensors.items():
        recast = dtype is not None and stored.type in FLOAT_TYPES and FLOAT_TYPES[stored.type] != dtype
        kind = TYPE_NAMES[dtype] if recast else stored.type
        size = stored.shape.numel() * FLOAT_TYPES[kind].itemsize if recast else stored.nbytes
        data = stored
        if key in plan.plain:
            data = _Sum(stored, plan.plain[key], plan.scaling, FLOAT_TYPES[kind])
        elif key in sums:
            data = sums.for_key(key, FLOAT_TYPES[kind])
        elif recast:
            data = _Recast(stored, FLOAT_TYPES[kind])
        result.append(NewTensor(key, kind, stored.shape, size, data))
    kind = head_type(plan, dtype)
    for key, tensor in plan.head.items():
        size = tensor.numel() * FLOAT_TYPES[kind].itemsize
        result.append(NewTensor(key, kind, tensor.shape, size, _Given(key, tensor, FLOAT_TYPES[kind])))
    return result


def head_type(plan: MergePlan, dtype: torch.dtype | None) -> str:
    """The type that a head is stored in: what the merge recasts to, or that of most of the base."""
    if dtype is not None:
        return TYPE_NAMES[dtype]
    sizes: Counter[str] = Counter()
    for stored in plan.base.tensors.values():
        if stored.type in FLOAT_TYPES:
            sizes[stored.type] += stored.nbytes
    return sizes.most_common(1)[0][0] if sizes else TYPE_NAMES[torch.float32]


@dataclass(frozen=True)
class _Given:
    """A tensor that the adapter brings, as one block."""

    key: str
    tensor: Tensor
    dtype: torch.dtype

    def __call__(self) -> Iterator[Block]:
        yield self.tensor.numel(), lambda: _rounded(self.tensor.double(), self.dtype, self.key)


@dataclass(frozen=True)
class _Sum:
    """W0 + ΔW in blocks of rows: float64 sums, rounded once to `dtype`."""

    stored: StoredTensor
    target: Target
    scaling: float
    dtype: torch.dtype

    def __call__(self) -> Iterator[Block]:
        for stored, target in matrices(self.stored, self.target):
            left, right = factors(target, self.scaling)
            for first, count in stored.row_blocks(BLOCK_ELEMENTS):
                yield count * right.shape[1], partial(self._rows, stored, left, right, first, count)

    def _rows(self, stored: StoredTensor, left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
        total = _as_float64(stored.rows(first, count))
        return _rounded(total.addmm_(left[first : first + count], right), self.dtype, stored.key)


def matrices(stored: StoredTensor, target: Target) -> Iterator[tuple[StoredTensor, Target]]:
    """The matrices of a tensor, with their chains: itself, or each expert's."""
    if target.chain.A.dim() == 2:
        yield stored, target
        return
    for index in range(stored.shape[0]):
        yield stored.matrix(index), target.expert(index)


def factors(target: Target, scaling: float) -> tuple[Tensor, Tensor]:
    """L (..., rows, r) and R (..., r, columns) in float64 with L·R = ΔW as the file has it: transposed for a
    Conv1D."""
    A, links, B = (tensor.double() for tensor in target.chain)
    folded = fold_into_a(A, links, scaling)
    return (folded.mT, B.mT) if target.transposed else (B, folded)


@dataclass(frozen=True)
class _Recast:
    """An untouched tensor in another floating-point type, in blocks of rows."""

    stored: StoredTensor
    dtype: torch.dtype

    def __call__(self) -> Iterator[Block]:
        if not self.stored.shape:
            yield 1, lambda: _rounded(self.stored.tensor().double(), self.dtype, self.stored.key)
            return
        width = self.stored.shape[1:].numel()
        for first, count in self.stored.row_blocks(BLOCK_ELEMENTS):
            yield count * width, partial(self._rows, first, count)

    def _rows(self, first: int, count: int) -> Tensor:
        return _rounded(_as_float64(self.stored.rows(first, count)), self.dtype, self.stored.key)


def _as_float64(values: Tensor) -> Tensor:
    return buffers.take("sum", values.shape, torch.float64).copy_(values)


def _rounded(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    result = round_once(values, dtype, buffers.take("rounded", values.shape, dtype))
    if dtype == torch.float16 and not torch.isfinite(result).all():
        raise LinchainError(
            f"{key}: a value is beyond float16's range (65504 at most). Merge with --dtype bfloat16 or"
            " float32."
        )
    return result


class _ConvertedSums:
    """Sums for tensors that transformers converts on loading. One group at a time is held in memory."""

    def __init__(self, plan: MergePlan):
        self._plan = plan
        self._groups = {key: group for key, group in plan.converted_keys.items() if group.pieces is None}
        self._lock = threading.Lock()
        self._held: ConvertedTargets | None = None
        self._sums: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._groups

    def for_key(self, key: str, dtype: torch.dtype) -> Callable[[], list[Block]]:
        """The new values of one file tensor, as one block."""

        def whole() -> Tensor:
            group = self._groups[key]
            with self._lock:
                if self._held is not group:
                    self._held, self._sums = group, _converted_sums(self._plan, group)
                total = self._sums[key]
            return _rounded(total, dtype, key)

        return lambda: [(self._plan.base.tensors[key].shape.numel(), whole)]


def _converted_sums(plan: MergePlan, group: ConvertedTargets) -> dict[str, Tensor]:
    """W0 + ΔW in float64 for every file tensor of a group: each element of ΔW goes to where its parameter's
    came from."""
    conversion = group.conversion
    stored = [plan.base.tensors[key] for key in conversion.keys]
    flat = torch.cat([tensor.tensor().double().reshape(-1) for tensor in stored])
    sources = conversion.element_sources(plan.base.shapes)
    for target in group.targets:
        left, right = factors(target, plan.scaling)
        flat[sources[target.parameter].reshape(-1)] += (left @ right).reshape(-1)
    sizes = [tensor.shape.numel() for tensor in stored]
    return {t.key: part.reshape(t.shape) for t, part in zip(stored, flat.split(sizes), strict=True)}
