"""`linchain merge` from plan to receipt: written into a staging directory, its tensors proven there, given
its name, and then tried as a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from linchain_cli import storage
from linchain_cli.chain import Adapter
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.export.card import Origin, PublishedBase, model_card
from linchain_cli.export.classifier import (
    Loading,
    as_classifier,
    changes,
    classifier_config,
    empty_base,
    loading_of,
    outputs_of,
)
from linchain_cli.export.companions import write_companions
from linchain_cli.export.model_proof import prove_model
from linchain_cli.export.output import check_disk, check_factors, check_output, staged_output, stops_with
from linchain_cli.export.receipts import (
    CARD_FILE,
    MergeReceipt,
    ReceiptAdapter,
    ReceiptBase,
    ReceiptPart,
    hash_files,
)
from linchain_cli.export.shards import write_checkpoint
from linchain_cli.export.sums import MergePlan, new_tensors, plan_merge
from linchain_cli.export.tensor_proof import TensorProof, prove_tensors
from linchain_cli.model.checkpoint import Checkpoint, companion_files
from linchain_cli.model.config import auto_class
from linchain_cli.model.files import read_config
from linchain_cli.model.hashing import refuse_other_base
from linchain_cli.model.packed import open_weights, quantization_method
from linchain_cli.records import record_bytes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeOptions:
    """What of a merge can be chosen.

    dtype: recast every floating-point tensor, None keeps each one's stored type
    max_shard_bytes: largest weight file
    overwrite: replace what an earlier merge wrote to the output directory
    allow_other_base: take a base that the adapter was not trained on
    name: what messages call the adapter
    prompts: token ids of the prompts whose logits are compared; empty skips that half of the proof
    quantization: how the run had rounded its base; its logits are compared as well
    chat_template: what the adapter was trained with, where it is not the base's own
    max_length: the tokens that a classifier's rows were cut to; None where nobody knows
    files: further files of the checkpoint, by name, in place of the base's where it has them
    parts, sum_error: of an adapter that is a weighted sum, as the receipt has them
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    allow_other_base: bool = False
    name: str = "the adapter"
    prompts: Sequence[Sequence[int]] = ()
    quantization: str = "none"
    chat_template: str | None = None
    max_length: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    parts: Sequence[ReceiptPart] = ()
    sum_error: float | None = None


@dataclass(frozen=True)
class MergeResult:
    """Where the merged checkpoint is, and its receipt."""

    directory: Path
    receipt: MergeReceipt


def merge_checkpoint(
    base_directory: Path,
    adapter: Adapter,
    out: Path,
    options: MergeOptions,
    origin: Origin,
    *,
    keep: Sequence[Path] = (),
    progress: Progress = lambda phase, done, total: None,
) -> MergeResult:
    """Merges `adapter` into the checkpoint at `base_directory` and writes the result to `out`, proven.

    `keep` are further paths that the output may not touch. `progress` is called with the phase's name, how
    much of it is done and how much there is.

    Raises:
        InputError: the output cannot be written, the base is not the one that was trained on, or a module
        cannot be merged. LinchainError: the disk is too small, or a tensor is not what it should be. Either
        way nothing is left of the output. LinchainError, too, where the model that came of proven tensors
        does not work: it stays, and its receipt says so.
    """
    target = check_output(out, MergeReceipt, overwrite=options.overwrite, sources=[base_directory, *keep])
    base = open_weights(base_directory)
    restored = quantization_method(read_config(base_directory), base_directory)
    model = empty_base(base_directory, adapter.head)
    stored, config, told = base, None, []
    if loading := loading_of(model, adapter.head, base_directory, options.max_length):
        stored, left_out = as_classifier(base, model, adapter.head)
        config = classifier_config(model, outputs_of(adapter.head), base_directory)
        told = changes(config, left_out, loading)
    plan = plan_merge(stored, adapter, model)
    check_factors(adapter)
    tensors = new_tensors(plan, options.dtype)
    companions = companion_files(base_directory)
    total = sum(tensor.nbytes for tensor in tensors)
    check_disk(target, total + sum(path.stat().st_size for path in companions))
    found_hash = refuse_other_base(
        base_directory, adapter.base.get("hash"), options.name, allow=options.allow_other_base
    )
    origin = origin if origin.base else replace(origin, base=PublishedBase.at(base_directory))
    loaded_by = auto_class(model.config, outputs_of(adapter.head)).__name__
    write_card = _CardWriter(adapter, origin, loaded_by, loading)
    with staged_output(target, MergeReceipt, overwrite=options.overwrite) as staging:
        write_checkpoint(staging, tensors, options.max_shard_bytes, _counter("writing", total, progress))
        told += write_companions(
            companions,
            base_directory,
            staging,
            options.dtype,
            restored=restored,
            own=options.files,
            config=config,
            tokenizer=loading.settings if loading else {},
        )
        if options.chat_template is not None:
            (staging / "chat_template.jinja").write_bytes(options.chat_template.encode())
            told.append("the chat template is the one that the adapter was trained with")
        proof = prove_tensors(plan, staging, options.dtype, _counter("proving", total, progress))
        receipt = _receipt(plan, adapter, origin.base, found_hash, proof, told, options)
        receipt = replace(receipt, files=hash_files(staging, proof.hashes))
        receipt = write_card(staging, receipt)
        storage.write_durable(staging / receipt.FILE, record_bytes(receipt))
    if options.prompts:
        with stops_with(f"stopped; {target} is complete, its tensors are proven, its logits are not"):
            receipt = _try_model(base, adapter, target, options, receipt, write_card, progress)
    return MergeResult(target, receipt)


def _counter(phase: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    return add


def _try_model(
    base: Checkpoint,
    adapter: Adapter,
    target: Path,
    options: MergeOptions,
    receipt: MergeReceipt,
    write_card: _CardWriter,
    progress: Progress,
) -> MergeReceipt:
    """Tries the finished checkpoint as a model, and adds what came of it to its receipt and its card."""
    try:
        found = prove_model(
            base, adapter, target, options.prompts, options.quantization, partial(progress, "trying")
        )
    except Stopped:
        raise
    except LinchainError as error:
        failed = replace(receipt, not_proven=[f"FAILED: {error}"])
        _rewrite(target, write_card(target, failed))
        raise LinchainError(
            f"{target} was written and its tensors are W0 + ΔW, but as a model it fails: {error}"
            f" Do not serve it. {target / receipt.FILE} says so, too."
        ) from error
    receipt = replace(
        receipt,
        logits=found.logits,
        quantized=found.quantized,
        generated=found.generated,
        not_proven=list(found.not_proven),
    )
    receipt = write_card(target, receipt)
    _rewrite(target, receipt)
    return receipt


def _rewrite(target: Path, receipt: MergeReceipt) -> None:
    storage.write_atomic(target / receipt.FILE, record_bytes(receipt))


@dataclass(frozen=True)
class _CardWriter:
    """Writes the model card beside a receipt. One that cannot be written costs no checkpoint: the receipt
    that is returned says so."""

    adapter: Adapter
    origin: Origin
    auto_class: str
    loading: Loading | None = None

    def __call__(self, directory: Path, receipt: MergeReceipt) -> MergeReceipt:
        try:
            facts = _facts(receipt)
            card = model_card("merged", self.adapter, self.origin, facts, self.auto_class, self.loading)
        except Exception as error:  # it shows what others wrote: recipes, evaluations
            reason = f"no model card: {type(error).__name__}: {error}"
            return replace(receipt, not_proven=[*receipt.not_proven, reason])
        storage.write_atomic(directory / CARD_FILE, card)
        return replace(receipt, card=storage.sha256_bytes(card.encode()))


def _receipt(
    plan: MergePlan,
    adapter: Adapter,
    base: PublishedBase,
    found_hash: str,
    proof: TensorProof,
    changes: list[str],
    options: MergeOptions,
) -> MergeReceipt:
    """The receipt of a checkpoint whose tensors are proven."""
    converted = plan.converted_keys
    reason = "the comparison was cut off before its end" if options.prompts else "left out (--no-proof)"
    return MergeReceipt(
        base=ReceiptBase(
            name=base.name,
            revision=base.revision,
            hash=found_hash,
            hash_expected=adapter.base.get("hash"),
        ),
        adapter=ReceiptAdapter.of(adapter),
        dtype=None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        files=dict(proof.hashes),
        tensors={
            "total": len(plan.base.tensors) + len(plan.head),
            "changed": len(proof.changed),
            "untouched": proof.untouched,
            "renamed": sum(
                target.parameter != key and key not in converted for key, target in plan.plain.items()
            ),
            "converted": len(converted),
            **({"head": len(plan.head)} if plan.head else {}),
        },
        largest_ulp=proof.largest_ulp,
        largest_ulp_tensor=max(proof.changed, key=proof.changed.__getitem__),
        changed=proof.changed,
        changes=changes,
        not_proven=[f"logits and generation: {reason}"],
        parts=list(options.parts),
        sum_error=options.sum_error,
    )


def _facts(receipt: MergeReceipt) -> dict[str, str]:
    """The receipt in lines for the model card."""
    facts = {
        "tensors": f"{receipt.tensors['changed']} changed, at most {receipt.largest_ulp:.3f} ulp from the"
        f" float64 sum; {receipt.tensors['untouched']} as in the base",
    }
    if receipt.parts:
        facts["the sum of the adapters"] = f"within {receipt.sum_error:.2g} (relative, Frobenius)"
    if logits := receipt.logits:
        facts["logits of merged against adapted model"] = f"{logits} ({logits.dtype})"
    if receipt.generated:
        facts["transformers' `generate`"] = "runs with the settings of this directory"
    if receipt.changes:
        facts["changed beside the weights"] = "; ".join(receipt.changes)
    if receipt.not_proven:
        facts["not shown"] = "; ".join(receipt.not_proven)
    return facts
