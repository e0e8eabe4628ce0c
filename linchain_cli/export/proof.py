"""The proof: what was written, read back from the disk and compared with what was trained.

Tensors: every untouched one must be the base's bit for bit (or its recast), every touched one at most one
unit in the last place from W0 + ΔW in float64. The sum is computed anew, by `chain.delta_weight`, not by the
code that wrote it. Logits: the adapted model and the written checkpoint, as transformers loads it, read the
same prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linchain_cli.chain import Adapter, attach, delta_weight, disabled
from linchain_cli.errors import LinchainError
from linchain_cli.export.rounding import ulps
from linchain_cli.export.sums import ConvertedTargets, MergePlan, Target
from linchain_cli.model.checkpoint import BLOCK_BYTES, FLOAT_TYPES, Checkpoint, StoredTensor, open_checkpoint
from linchain_cli.model.loading import default_device, load_model

BLOCK_ELEMENTS = 1 << 20
LARGEST_ULP = 1.0
READ_POSITIONS = 16  # the last ones of each prompt, so that logits of a large vocabulary stay small


@dataclass(frozen=True)
class TensorProof:
    """What the comparison of the written tensors found.

    changed: checkpoint key -> largest distance from the float64 sum in ulp, for every touched tensor
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
    _check_listing(plan.base, written, dtype)
    groups = {key: group for group in plan.converted for key in group.conversion.keys}
    changed: dict[str, float] = {}
    for key, stored in plan.base.tensors.items():
        if key in plan.plain:
            changed[key] = _distance(stored, written.tensors[key], plan.plain[key], plan.scaling)
        elif key in groups:
            if key not in changed:
                changed.update(_converted_distances(plan, groups[key], written))
        else:
            _compare_untouched(stored, written.tensors[key])
        progress(written.tensors[key].nbytes)
    return TensorProof(changed, len(plan.base.tensors) - len(changed), hashes)


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


def _check_listing(base: Checkpoint, written: Checkpoint, dtype: torch.dtype | None) -> None:
    if base.tensors.keys() != written.tensors.keys():
        odd = sorted(base.tensors.keys() ^ written.tensors.keys())
        raise LinchainError(
            f"the merged checkpoint does not hold the base's tensors: {len(odd)} differ (e.g. {odd[0]})"
        )
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
    else:
        blocks = stored.row_blocks(BLOCK_ELEMENTS) if stored.shape and stored.nbytes else ()
        pairs = ((stored.rows(*block), written.rows(*block)) for block in blocks)
        equal = all(torch.equal(old.to(new.dtype), new) for old, new in pairs)
    if not equal:
        raise LinchainError(f"tensor {stored.key}, which no adapter touches, differs from the base's")


def _distance(stored: StoredTensor, written: StoredTensor, target: Target, scaling: float) -> float:
    """The largest distance in ulp of a touched tensor from its float64 sum."""
    largest = 0.0
    for first, count in stored.row_blocks(BLOCK_ELEMENTS):
        exact = stored.rows(first, count).double() + _delta_rows(target, scaling, first, count)
        largest = max(largest, _checked(ulps(written.rows(first, count), exact), written.key))
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
    transformers' converter."""
    conversion = group.conversion
    old = conversion.to_model({key: plan.base.tensors[key].tensor() for key in conversion.keys})
    new = conversion.to_model({key: written.tensors[key].tensor() for key in conversion.keys})
    targets = {target.parameter: target for target in group.targets}
    largest = 0.0
    for name, before in old.items():
        exact = before.double()
        if name in targets:
            chain, transposed = targets[name].chain, targets[name].transposed
            delta = delta_weight(*chain, plan.scaling, torch.float64)
            exact = exact + (delta.T if transposed else delta)
        largest = max(largest, _checked(ulps(new[name], exact), conversion.keys[0]))
    return dict.fromkeys(conversion.keys, largest)


@dataclass(frozen=True)
class LogitProof:
    """How far the logits of two models lie apart, over `positions` rows of logits read from `prompts`
    prompts.

    adapter_effect and adapter_effect_mean are the differences that switching the adapter off makes: what
    there was to lose.
    """

    prompts: int
    positions: int
    dtype: str
    largest_difference: float
    mean_difference: float
    top1_agreement: float
    adapter_effect: float
    adapter_effect_mean: float

    @property
    def adapter_lost(self) -> bool:
        """Whether the merged model lost more than half of what the adapter does, as rounding of a small ΔW
        can."""
        return self.mean_difference > self.adapter_effect_mean / 2


@torch.inference_mode()
def read_logits(model, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Logits (n, vocabulary) in float32 on the CPU at the last `READ_POSITIONS` positions of each prompt, one
    by one."""
    from linchain_cli.model.logits import logits_at

    device = model.get_input_embeddings().weight.device
    for prompt in prompts:
        positions = torch.zeros(1, len(prompt), dtype=torch.bool)
        positions[:, -READ_POSITIONS:] = True
        with logits_at(model, positions):
            output = model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=False)
        yield output.logits[0].float().cpu()


def compare_logits(
    adapted: Sequence[Tensor], merged: Sequence[Tensor], base: Sequence[Tensor], dtype: str
) -> LogitProof:
    """Compares logits prompt by prompt.

    Raises:
        LinchainError: the merged model gives no finite number where the adapted one does.
    """
    differences, effects, agreements = [], [], []
    for ours, theirs, bare in zip(adapted, merged, base, strict=True):
        differences.append((ours - theirs).abs())
        effects.append((ours - bare).abs())
        agreements.append(ours.argmax(-1) == theirs.argmax(-1))
        if not torch.isfinite(differences[-1]).all():
            raise LinchainError("the logits of the merged model are not finite where the adapted model's are")
    difference, effect, agreement = torch.cat(differences), torch.cat(effects), torch.cat(agreements)
    return LogitProof(
        prompts=len(differences),
        positions=len(agreement),
        dtype=dtype,
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agreement.double().mean()),
        adapter_effect=float(effect.max()),
        adapter_effect_mean=float(effect.mean()),
    )


def prove_logits(
    base: Checkpoint,
    adapter: Adapter,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    quantization: str = "none",
) -> dict[str, Any] | None:
    """Logits of adapted and merged model, one model in memory at a time; None where none fits.

    `quantization` is how the run had rounded its base: the adapter on that base is compared as well.
    """
    device = default_device()
    dtype = _proof_dtype(base, device)
    if dtype is None:
        return None
    adapted, bare = _adapted_logits(base.directory, adapter, prompts, dtype, "none", device)
    model = load_model(merged, dtype=dtype, device=device, attention="eager")
    ours = list(read_logits(model, prompts))
    del model
    result = _as_json(compare_logits(adapted, ours, bare, dtype))
    if quantization != "none":
        rounded, bare = _adapted_logits(base.directory, adapter, prompts, dtype, quantization, device)
        comparison = _as_json(compare_logits(rounded, ours, bare, dtype))
        result["quantized"] = {"quantization": quantization, **comparison}
    return result


def _as_json(proof: LogitProof) -> dict[str, Any]:
    return {**asdict(proof), "adapter_lost": proof.adapter_lost}


def _adapted_logits(directory: Path, adapter: Adapter, prompts, dtype: str, quantization: str, device):
    """Logits of the base with the adapter, and of the bare base."""
    model = load_model(directory, dtype=dtype, device=device, quantization=quantization, attention="eager")
    attach(model, adapter)
    adapted = list(read_logits(model, prompts))
    with disabled(model):
        bare = list(read_logits(model, prompts))
    return adapted, bare


def _proof_dtype(base: Checkpoint, device: torch.device) -> str | None:
    """float32 if a model of it fits into the memory that is free, else bfloat16 if that does, else None."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available_memory()
    parameters = sum(shape.numel() for shape in base.shapes.values())
    for name, width in (("float32", 4), ("bfloat16", 2)):
        if parameters * width <= 0.8 * free:
            return name
    return None


def _available_memory() -> int:
    """Bytes that a process may take without swapping, as Linux estimates them; elsewhere, the pages that are
    free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
