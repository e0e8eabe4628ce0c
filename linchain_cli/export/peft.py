"""A chain as a plain LoRA of the same rank, in PEFT's file format, which vLLM and others read as well.

The links disappear into A: A' = Wn…W1·A, in float64 and rounded once to float32, so that B·A' is the chain's
ΔW to rounding, and a chain of depth 0 is written bit for bit. α and r stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linchain_cli import storage
from linchain_cli.chain import Adapter, ChainTensors, delta_weight, linear_shape, with_depth
from linchain_cli.errors import InputError, LinchainError, did_you_mean
from linchain_cli.export.output import check_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
LARGEST_ERROR = (
    1e-6  # ‖written − trained‖ / ‖trained‖ of a module's ΔW; float32 rounding of A' gives some 3e-8
)


@dataclass(frozen=True)
class PeftProof:
    """What the written files are, and the largest relative error (Frobenius) of any module's ΔW, read back
    from them."""

    hashes: dict[str, str]
    modules: int
    largest_error: float
    largest_error_module: str


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The LoRA's tensors as PEFT names them: lora_A.weight (r, d_in) and lora_B.weight (d_out, r),
    float32."""
    tensors = {}
    for path, chain in with_depth(adapter, 0).tensors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = chain.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = chain.B
    return tensors


def peft_config(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """adapter_config.json: exact module paths as targets, `fan_in_fan_out` where they are GPT-2's Conv1D.

    Raises:
        InputError: `model` (on the meta device will do) lacks one of the adapter's modules.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for path, chain in adapter.tensors.items():
        if path not in modules or linear_shape(modules[path]) != (chain.A.shape[1], chain.B.shape[0]):
            raise InputError(
                f"the adapter's module '{path}' ({chain.A.shape[1]} → {chain.B.shape[0]}) is not in"
                f" {type(model).__name__}:"
                f" it was trained on another model.{did_you_mean(path, modules)}"
            )
    alpha = adapter.config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.get("path"),
        "revision": adapter.base.get("revision"),
        "inference_mode": True,
        "r": adapter.config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.tensors),
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in adapter.tensors),
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def write_peft(adapter: Adapter, model: PreTrainedModel, directory: Path) -> PeftProof:
    """Writes the two files into `directory`, reads them back and compares every ΔW with the chain's.

    Raises:
        InputError: the adapter does not fit `model`, or its training diverged.
        LinchainError: what was read back is off.
    """
    check_factors(adapter)
    config = peft_config(adapter, model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = storage.tensor_bytes(peft_tensors(adapter), {"format": "pt"})
    storage.write_durable(directory / WEIGHTS_FILE, data)
    storage.write_durable(directory / CONFIG_FILE, storage.json_bytes(config))
    return prove_peft(adapter, directory)


def prove_peft(adapter: Adapter, directory: Path) -> PeftProof:
    """Compares the files in `directory` with the adapter they were made from, module by module, in
    float64."""
    from safetensors.torch import load_file

    tensors = load_file(directory / WEIGHTS_FILE)
    if len(tensors) != 2 * len(adapter.tensors):
        raise LinchainError(
            f"{WEIGHTS_FILE} holds {len(tensors)} tensors where {2 * len(adapter.tensors)} were written"
        )
    scaling = adapter.config.alpha / adapter.config.rank
    errors = {}
    for path, chain in adapter.tensors.items():
        A, B = (tensors[f"{PREFIX}{path}.lora_{factor}.weight"] for factor in "AB")
        errors[path] = relative_error(chain, ChainTensors(A, chain.links[:0], B), scaling)
        if not errors[path] <= LARGEST_ERROR:
            raise LinchainError(
                f"{path}: the exported ΔW is off by {errors[path]:.3g} of its norm, at most"
                f" {LARGEST_ERROR:g} is allowed"
            )
    worst = max(errors, key=errors.__getitem__)
    hashes = {name: storage.sha256_file(directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    return PeftProof(hashes, len(errors), errors[worst], worst)


def relative_error(trained: ChainTensors, other: ChainTensors, scaling: float) -> float:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ (Frobenius) in float64; 0 where both are zero."""
    exact = delta_weight(*trained, scaling, torch.float64)
    difference, size = (delta_weight(*other, scaling, torch.float64) - exact).norm(), exact.norm()
    return float(difference / size) if size > 0 else float(difference)
