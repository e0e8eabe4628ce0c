"""The proof of a merge's tensors: what was written, read back from the disk and compared with what was
trained.

Every untouched one must be the base's bit for bit (or its recast), every touched one at most one unit in the
last place from W0 + ΔW in float64. The sum is computed anew, by `chain.delta_weight`, not by the code that
wrote it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from linchain_cli.chain import delta_weight
from linchain_cli.errors import LinchainError
from linchain_cli.export.rounding import ulps
from linchain_cli.export.sums import ConvertedTargets, MergePlan, Target, matrices
from linchain_cli.model.checkpoint import BLOCK_BYTES, FLOAT_TYPES, Checkpoint, StoredTensor, open_checkpoint
from linchain_cli.model.names import Conversion

BLOCK_ELEMENTS = 1 << 20
LARGEST_ULP = 1.0


@dataclass(frozen=True)
class TensorProof:
    """What the comparison of the written tensors found.

    changed: checkpoint key -> largest distance from the float64 sum in ulp, for every touched tensor; of a
        head's tensors from what was trained
    untouched: how many tensors are the base's (recast, if the merge recast them)
    hashes: file name -> SHA-256 of the written weight file
    """

    changed: dict[str, float]
    untouched: int
    hashes: dict[str, str]

    @property
    def largest_ulp(self) -> float:
        return max(self.changed.values(), default=0.0)


def prove_tensors(
    plan: MergePlan,
    directory: Path,
    dtype: torch.dtype | None,
    progress: Callable[[int], None] = lambda count: None,
) -> TensorProof:
    """Compares the checkpoint in `directory` with the plan it was written from.

    Raises:
        LinchainError: a tensor is missing, surplus, of another shape or type, or off. The message names it.
    """
    hashes = {path.name: _hash_from_disk(path) for path in sorted(Path(directory).glob("*.safetensors"))}
    written = open_checkpoint(directory)
    _check_listing(plan, written, dtype)
    groups = plan.converted_keys
    changed: dict[str, float] = {}
    for key, stored in plan.base.tensors.items():
        if key in groups:
            if key not in changed:
                changed.update(_converted_distances(plan, groups[key], written))
        elif key in plan.plain:
            changed[key] = _distance(stored, written.tensors[key], plan.plain[key], plan.scaling)
        else:
            _compare_untouched(stored, written.tensors[key])
        progress(written.tensors[key].nbytes)
    untouched = len(plan.base.tensors) - len(changed)
    for key, tensor in plan.head.items():
        stored = written.tensors[key]
        changed[key] = _checked(ulps(stored.tensor(), tensor.double()), key)
        progress(stored.nbytes)
    return TensorProof(changed, untouched, hashes)


def _hash_from_disk(path: Path) -> str:
    """SHA-256 of a file's content as the disk has it: its pages in memory are dropped first, where the system
    lets us."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_listing(plan: MergePlan, written: Checkpoint, dtype: torch.dtype | None) -> None:
    base = plan.base
    if base.tensors.keys() | plan.head.keys() != written.tensors.keys():
        odd = sorted((base.tensors.keys() | plan.head.keys()) ^ written.tensors.keys())
        raise LinchainError(
            f"the merged checkpoint does not hold the base's tensors: {len(odd)} differ (e.g. {odd[0]})"
        )
    for key, tensor in plan.head.items():
        if written.tensors[key].shape != tensor.shape:
            raise LinchainError(f"merged tensor {key} is {tuple(written.tensors[key].shape)}, not the head's")
    for key, stored in base.tensors.items():
        new = written.tensors[key]
        wanted = dtype if dtype is not None and stored.type in FLOAT_TYPES else FLOAT_TYPES.get(stored.type)
        if (
            new.shape != stored.shape
            or FLOAT_TYPES.get(new.type) != wanted
            or (wanted is None and new.type != stored.type)
        ):
            raise LinchainError(
                f"merged tensor {key} is {new.type} {tuple(new.shape)}, the base's {stored.type}"
                f" {tuple(stored.shape)}"
            )


def _compare_untouched(stored: StoredTensor, written: StoredTensor) -> None:
    same = stored.type == written.type
    if same:
        blocks = range(0, stored.nbytes, BLOCK_BYTES)
        equal = all(
            stored.read(first, min(BLOCK_BYTES, stored.nbytes - first))
            == written.read(first, min(BLOCK_BYTES, stored.nbytes - first))
            for first in blocks
        )
    elif not stored.shape:
        equal = torch.equal(stored.tensor().to(FLOAT_TYPES[written.type]), written.tensor())
    else:
        blocks = stored.row_blocks(BLOCK_ELEMENTS) if stored.nbytes else ()
        pairs = ((stored.rows(*block), written.rows(*block)) for block in blocks)
        equal = all(torch.equal(old.to(new.dtype), new) for old, new in pairs)
    if not equal:
        raise LinchainError(f"tensor {stored.key}, which no adapter touches, differs from the base's")


def _distance(stored: StoredTensor, written: StoredTensor, target: Target, scaling: float) -> float:
    """The largest distance in ulp of a touched tensor from its float64 sum."""
    largest = 0.0
    for index, (old, of_one) in enumerate(matrices(stored, target)):
        new = written if old is stored else written.matrix(index)
        for first, count in old.row_blocks(BLOCK_ELEMENTS):
            exact = old.rows(first, count).double() + _delta_rows(of_one, scaling, first, count)
            largest = max(largest, _checked(ulps(new.rows(first, count), exact), written.key))
    return largest


def _delta_rows(target: Target, scaling: float, first: int, count: int) -> Tensor:
    """Rows `first` to `first + count` of ΔW as the file has it, in float64."""
    A, links, B = target.chain
    rows = slice(first, first + count)
    if target.transposed:
        return delta_weight(A[:, rows], links, B, scaling, torch.float64).T
    return delta_weight(A, links, B[rows], scaling, torch.float64)


def _checked(distances: Tensor, key: str) -> float:
    """The largest of `distances`; LinchainError where one is beyond the bound or no number at all."""
    largest = float(distances.max()) if distances.numel() else 0.0
    if not largest <= LARGEST_ULP:
        raise LinchainError(
            f"merged tensor {key} is off: {largest:.3g} ulp from W0 + ΔW where at most {LARGEST_ULP:g} is"
            " allowed"
        )
    return largest


def _converted_distances(plan: MergePlan, group: ConvertedTargets, written: Checkpoint) -> dict[str, float]:
    """The same for converted tensors, compared as the model will see them: both files go through
    transformers' converter, the pieces of each expert by themselves."""
    targets = {target.parameter: target for target in group.targets}
    found: dict[str, float] = {}
    for conversion, expert in _parts(group):
        old = conversion.to_model({key: plan.base.tensors[key].tensor() for key in conversion.keys})
        new = conversion.to_model({key: written.tensors[key].tensor() for key in conversion.keys})
        largest = 0.0
        for name, before in old.items():
            exact = before.double()
            if name in targets:
                target = targets[name] if expert is None else targets[name].expert(expert)
                delta = delta_weight(*target.chain, plan.scaling, torch.float64)
                exact = exact + (delta.mT if target.transposed else delta)
            largest = max(largest, _checked(ulps(new[name], exact), conversion.keys[0]))
        found |= dict.fromkeys(conversion.keys, largest)
    return found


def _parts(group: ConvertedTargets) -> Iterator[tuple[Conversion, int | None]]:
    """The conversion of each expert's pieces, which stacks them to (1, rows, columns), or of the whole
    group."""
    if group.pieces is None:
        yield group.conversion, None
        return
    keys: dict[int, list[str]] = defaultdict(list)
    for key, piece in group.pieces.items():
        keys[piece.expert].append(key)
    for expert, of_expert in sorted(keys.items()):
        yield group.conversion.only(of_expert), expert
