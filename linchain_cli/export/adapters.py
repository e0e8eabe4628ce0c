"""`linchain export` from adapter to receipt: an adapter in another tool's format, read back and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from linchain_cli import storage
from linchain_cli.chain import Adapter
from linchain_cli.export.card import Origin, model_card
from linchain_cli.export.classifier import Loading, outputs_of
from linchain_cli.export.gguf_lora import ADAPTER_FILE, write_gguf
from linchain_cli.export.modelfile import MODEL_FILE, modelfile
from linchain_cli.export.output import check_output, staged_output
from linchain_cli.export.peft import write_peft
from linchain_cli.export.receipts import CARD_FILE, ExportReceipt, ReceiptAdapter, ReceiptBase, hash_files
from linchain_cli.model.config import auto_class
from linchain_cli.records import record_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["peft", "gguf"]
WRITERS = {"peft": write_peft, "gguf": write_gguf}


def export_adapter(
    adapter: Adapter,
    model: PreTrainedModel,
    out: Path,
    kind: Kind,
    origin: Origin,
    *,
    overwrite: bool = False,
    keep: Sequence[Path] = (),
    template: str | Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    loading: Loading | None = None,
) -> ExportReceipt:
    """Writes `adapter` to `out` in the format `kind`, proven.

    Args:
        model: the base, on the meta device.
        keep: paths that the output may not touch.
        template: the recipe's `data.template`, for Ollama; None where it is not known.
        files: what else goes there, by name.
        loading: what the base of a classifier is loaded with.

    Raises:
        InputError: the output cannot be written, the adapter does not fit the model, or the format cannot
        hold it. LinchainError: what was read back is off. Either way nothing is left of the output.
    """
    target = check_output(out, ExportReceipt, overwrite=overwrite, sources=keep)
    with staged_output(target, ExportReceipt, overwrite=overwrite) as staging:
        base = origin.base
        named = {"path": base.path, "revision": base.revision} if base else {}
        proof = WRITERS[kind](replace(adapter, base={**adapter.base, **named}), model, staging)
        if kind == "gguf":
            text = modelfile(base, template, ADAPTER_FILE)
            storage.write_durable(staging / MODEL_FILE, text.encode())
        for name, content in (files or {}).items():
            storage.write_durable(staging / name, content)
        receipt = ExportReceipt(
            kind=kind,
            base=ReceiptBase(
                name=base and base.name,
                revision=base and base.revision,
                hash_expected=adapter.base.get("hash"),
            ),
            adapter=ReceiptAdapter.of(adapter),
            files=hash_files(staging),
            modules=proof.modules,
            largest_error=proof.largest_error,
            largest_error_module=proof.largest_error_module,
            not_proven=list(proof.not_proven),
            load_with=dict(loading.arguments) if loading else {},
        )
        found = f"within {proof.largest_error:.2g} of the chain's (relative, Frobenius)"
        facts = {"ΔW of every module, read back": found}
        loaded_by = auto_class(model.config, outputs_of(adapter.head)).__name__
        card = model_card(kind, adapter, origin, facts, loaded_by, loading).encode()
        storage.write_durable(staging / CARD_FILE, card)
        receipt = replace(receipt, card=storage.sha256_bytes(card))
        storage.write_durable(staging / receipt.FILE, record_bytes(receipt))
    return receipt
