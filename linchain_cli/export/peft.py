"""A chain as a plain LoRA of the same rank, in PEFT's file format, which vLLM and others read as well.

The links disappear into A: A' = Wn…W1·A, in float64 and rounded once to float32, so that B·A' is the chain's
ΔW to rounding, and a chain of depth 0 is written bit for bit. α and r stay what they were. A classifier's
head goes along as modules that PEFT saves whole (`modules_to_save`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linchain_cli import storage
from linchain_cli.chain import Adapter, ChainTensors, delta_weight, misfit, with_depth
from linchain_cli.errors import InputError, LinchainError, first_line
from linchain_cli.export.output import check_factors
from linchain_cli.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# ‖written − trained‖ / ‖trained‖ of a module's ΔW; float32 rounding of A' gives some 3e-8.
LARGEST_ERROR = 1e-6


@dataclass(frozen=True)
class FactorProof:
    """The largest relative error (Frobenius) of any module's ΔW, read back from what was written.

    not_proven: what was not shown, and why
    """

    modules: int
    largest_error: float
    largest_error_module: str
    not_proven: tuple[str, ...] = ()


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The LoRA's tensors as PEFT names them: lora_A.weight (r, d_in) and lora_B.weight (d_out, r),
    float32; and a classifier's head by its own names."""
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in _head_tensors(adapter).items()}
    for path, chain in with_depth(adapter, 0).tensors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = chain.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = chain.B
    return tensors


def peft_config(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """adapter_config.json: exact module paths as targets, `fan_in_fan_out` where they are GPT-2's Conv1D.

    Raises:
        InputError: as `check_modules`.
    """
    from transformers.pytorch_utils import Conv1D

    modules = check_modules(adapter, model, "a PEFT adapter")
    alpha = adapter.config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.head else "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.get("path"),
        "revision": adapter.base.get("revision"),
        "inference_mode": True,
        "r": adapter.config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.tensors),
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in adapter.tensors),
        "bias": "none",
        "modules_to_save": head_modules(adapter, model),
        "use_rslora": False,
        "use_dora": False,
    }


def _head_tensors(adapter: Adapter) -> dict[str, Tensor]:
    return adapter.head.tensors if adapter.head else {}


def head_modules(adapter: Adapter, model: nn.Module) -> list[str] | None:
    """The largest modules that a classifier's head is made of, which PEFT keeps whole; None without a head.

    Raises:
        InputError: `model` (on the meta device will do) has a part of the head in no module of its own.
    """
    if not adapter.head:
        return None
    whole, left = [], set(adapter.head.tensors)
    for path, module in model.named_modules():  # parents first
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and names and names <= left:
            whole.append(path)
            left -= names
    if left:
        raise InputError(
            f"'{min(left)}' of the head is no module of its own in {type(model).__name__}, and PEFT saves"
            " whole modules. Merge instead: linchain merge."
        )
    return whole


def check_modules(adapter: Adapter, model: PreTrainedModel, format_name: str) -> dict[str, nn.Module]:
    """The model's modules by path.

    Raises:
        InputError: `model` (on the meta device will do) lacks one of the adapter's, or it is one of routed
        experts, which no other format holds as they are here.
    """
    if experts := [path for path, chain in adapter.tensors.items() if chain.A.dim() == 3]:
        raise InputError(
            f"{len(experts)} of the adapter's {len(adapter.tensors)} modules are routed experts (first"
            f" '{experts[0]}'), which cannot be written as {format_name}. Merge instead: linchain merge."
        )
    modules = dict(model.named_modules())
    for path, chain in adapter.tensors.items():
        if why := misfit(modules, path, chain.A, chain.B):
            raise InputError(f"the adapter does not fit this base: {why}")
    return modules


def write_peft(adapter: Adapter, model: PreTrainedModel, directory: Path) -> FactorProof:
    """Writes the two files into `directory`, reads them back and compares every ΔW with the chain's.

    Raises:
        InputError: the adapter does not fit `model`, its training diverged, or PEFT (where it is installed)
        would not load all of it.
        LinchainError: what was read back is off.
    """
    check_factors(adapter)
    config = peft_config(adapter, model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = storage.tensor_bytes(peft_tensors(adapter), {"format": "pt"})
    storage.write_durable(directory / WEIGHTS_FILE, data)
    storage.write_durable(directory / CONFIG_FILE, storage.json_bytes(config))
    proof = prove_peft(adapter, directory)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, which remarks on kernels
    try:
        import peft  # noqa: F401
    except ImportError:
        return replace(proof, not_proven=("loading it with PEFT: it is not installed here",))
    load_with_peft(adapter, model, directory)
    return proof


def load_with_peft(adapter: Adapter, model: PreTrainedModel, directory: Path) -> None:
    """Has PEFT load the files in `directory` into `model`, which is on the meta device and keeps the adapter,
    and looks whether every module found its own matrices.

    PEFT rewrites the targets of architectures whose experts transformers 5 holds as one parameter, by the
    last part of their names: dense layers and shared experts of the same name are lost with no more than a
    warning.

    Raises:
        InputError: a module is lost, or PEFT refuses the adapter.
    """
    import peft
    from safetensors.torch import load_file

    head = head_modules(adapter, model)
    instead = f"PEFT {peft.__version__} {{}} for {type(model).__name__}. Merge instead: linchain merge."
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(directory))
            weights = load_file(directory / WEIGHTS_FILE)
            taken = peft.set_peft_model_state_dict(loaded, weights, low_cpu_mem_usage=True)
    except Exception as error:  # a converter of PEFT may raise anything
        raise InputError(instead.format(f"cannot load this adapter ({first_line(error)})")) from error
    modules = dict(loaded.base_model.model.named_modules())
    scaling = adapter.config.scaling
    absent = {*taken.missing_keys}
    kept = dict(loaded.base_model.model.named_parameters())
    lost = [
        name
        for whole in head or ()
        for name, tensor in _head_tensors(adapter).items()
        if name.startswith(f"{whole}.")
        and not _holds(kept.get(f"{whole}.modules_to_save.default{name.removeprefix(whole)}"), tensor)
    ]
    lost += [
        path
        for path in adapter.tensors
        if "default" not in getattr(modules.get(path), "lora_A", ())
        or modules[path].scaling["default"] != scaling
        or any(f"{PREFIX}{path}.lora_{factor}.default.weight" in absent for factor in "AB")
    ]
    if lost or taken.unexpected_keys:
        first = lost[0] if lost else taken.unexpected_keys[0]
        raise InputError(
            instead.format(f"would lose {len(lost)} of {len(adapter.tensors)} modules, first '{first}',")
        )


def _holds(parameter: nn.Parameter | None, tensor: Tensor) -> bool:
    return parameter is not None and not parameter.is_meta and torch.equal(parameter, tensor)


def prove_peft(adapter: Adapter, directory: Path) -> FactorProof:
    """Compares the files in `directory` with the adapter they were made from, module by module, in
    float64."""
    from safetensors.torch import load_file

    tensors, head = load_file(directory / WEIGHTS_FILE), _head_tensors(adapter)
    count = 2 * len(adapter.tensors) + len(head)
    if len(tensors) != count:
        raise LinchainError(f"{WEIGHTS_FILE} holds {len(tensors)} tensors where {count} were written")
    for name, tensor in head.items():
        if not torch.equal(tensors[f"{PREFIX}{name}"], tensor):
            raise LinchainError(f"{name}: the exported head is not what was trained")
    return factor_proof(
        adapter, lambda path: [tensors[f"{PREFIX}{path}.lora_{factor}.weight"] for factor in "AB"]
    )


def factor_proof(
    adapter: Adapter, read: Callable[[str], Sequence[Tensor]], alpha: float | None = None
) -> FactorProof:
    """Compares the A and B that `read` gives of each module with what was trained, in float64. `alpha` is
    that of the file, where it holds one.

    Raises:
        LinchainError: a module is off; the message names it.
    """
    errors = {}
    for path, chain in adapter.tensors.items():
        A, B = read(path)
        scaling = None if alpha is None else alpha / A.shape[0]
        written = ChainTensors(A, chain.links[:0], B)
        errors[path] = relative_error(chain, written, adapter.config.scaling, scaling)
        if not errors[path] <= LARGEST_ERROR:
            raise LinchainError(
                f"{path}: the exported ΔW is off by {errors[path]:.3g} of its norm, at most"
                f" {LARGEST_ERROR:g} is allowed"
            )
    worst = max(errors, key=errors.__getitem__)
    return FactorProof(len(errors), errors[worst], worst)


def relative_error(
    trained: ChainTensors, other: ChainTensors, scaling: float, other_scaling: float | None = None
) -> float:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ (Frobenius) in float64; 0 where both are zero."""
    exact = delta_weight(*trained, scaling, torch.float64)
    found = delta_weight(*other, scaling if other_scaling is None else other_scaling, torch.float64)
    difference, size = (found - exact).norm(), exact.norm()
    return float(difference / size) if size > 0 else float(difference)
