"""Adapter checkpoints of other tools, as they lie on disk: PEFT's LoRA, MoSLoRA, and the LinChain authors'.

<path>.lora_A.weight, <path>.lora_B.weight      all of them; an adapter's name may stand before `weight`
<path>.lora_AB.weight                           MoSLoRA's one mixer; newer PEFT calls it lora_mixer.weight
<path>.lora_mixer.<i>.weight, .bias             the LinChain authors': i = 0 is applied first
<path>.lora_B.bias                              PEFT with lora_bias
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linchain_cli.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+?)\.lora_(?P<part>A|B|AB|mixer)(?:\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)"
)

# Parts of the configuration that change the function in a way that no chain of matrices beside the base can.
_REFUSED = {
    "use_dora": "DoRA rescales the base's weights",
    "modules_to_save": "whole modules were trained beside the adapter",
    "target_parameters": "parameters were adapted that are not linear modules",
    "trainable_token_indices": "token embeddings were trained beside the adapter",
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "QA-LoRA pools the adapter's input",
    "alora_invocation_tokens": "aLoRA is active after its invocation tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "enable_lora": "only a part of a fused matrix is adapted",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class ForeignModule:
    """What a checkpoint holds for one module: lora_A (r, d_in), lora_B (d_out, r), mixers and their biases by
    place."""

    A: Tensor | None = None
    B: Tensor | None = None
    mixers: dict[int, Tensor] = field(default_factory=dict)
    mixer_biases: dict[int, Tensor] = field(default_factory=dict)
    output_bias: Tensor | None = None


@dataclass(frozen=True)
class ForeignAdapter:
    """A checkpoint as it was read; `module_biases` are the base's own biases that were trained along."""

    directory: Path
    config: dict[str, Any]
    modules: dict[str, ForeignModule]
    module_biases: dict[str, Tensor]


def read_foreign(checkpoint: Path) -> ForeignAdapter:
    """Reads a checkpoint directory (or a file in it). No pickled code is run.

    Raises:
        InputError: a file is missing or damaged, or it is a kind of adapter that no chain can hold; the
        message says which.
    """
    directory = Path(checkpoint)
    directory = directory.parent if directory.is_file() else directory
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"{checkpoint} is no adapter checkpoint: {CONFIG_FILE} is missing")
    config = _read_config(directory / CONFIG_FILE)
    weights = next((directory / name for name in WEIGHTS_FILES if (directory / name).is_file()), None)
    if weights is None:
        raise InputError(f"{directory} holds no weights: expected {' or '.join(WEIGHTS_FILES)}")
    modules: dict[str, ForeignModule] = {}
    module_biases = {}
    for key, tensor in _read_tensors(weights).items():
        match = _KEY.fullmatch(key)
        if match:
            _put(modules.setdefault(match["path"], ForeignModule()), match, key, tensor.float(), weights)
        elif key.endswith(".bias") and config.get("bias", "none") != "none":
            module_biases[key.removeprefix("base_model.model.").removesuffix(".bias")] = tensor.float()
        else:
            raise InputError(f"{weights}: '{key}' {_unknown(key)}")
    _check_modules(weights, config, modules)
    return ForeignAdapter(directory, config, modules, module_biases)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
        rank, alpha = config["r"], config["lora_alpha"]
        kind = str(config["peft_type"]).rpartition(".")[2].upper()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a LoRA ({error!r})") from error
    if kind not in ("LORA", "MOSLORA"):
        raise InputError(
            f"{path}: peft_type {kind} cannot be imported; expected LORA (also MoSLoRA and LinChain"
            " checkpoints)"
        )
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise InputError(
            f"{path}: expected a whole r ≥ 1 and lora_alpha > 0, found r = {rank!r} and lora_alpha ="
            f" {alpha!r}"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: '{key}' is set, which cannot be imported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is '{start}', which also changes the base's weights. Save the"
            " adapter converted to a"
            " plain LoRA (PEFT: path_initial_model_for_weight_conversion) and import that."
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} cannot be read as plain weights, and code in it is never run ({reason})"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path} holds something else than tensors by name")
    return loaded


def _put(module: ForeignModule, match: re.Match[str], key: str, tensor: Tensor, weights: Path) -> None:
    """Files one tensor; two for the same place (several adapters in one file) are refused."""
    part, name, kind = match["part"], match["name"], match["kind"]
    if part in ("A", "B") and kind == "weight":
        taken = getattr(module, part) is not None
        setattr(module, part, tensor)
    elif part in ("AB", "mixer"):
        place = int(name) if name and name.isdigit() else 0
        places = module.mixers if kind == "weight" else module.mixer_biases
        taken = place in places
        places[place] = tensor
    elif part == "B":
        taken = module.output_bias is not None
        module.output_bias = tensor
    else:
        raise InputError(f"{weights}: '{key}' {_unknown(key)}")
    if taken:
        raise InputError(
            f"{weights}: '{key}' is there twice; it seems to hold several adapters. Save the one that is"
            " wanted alone."
        )


def _unknown(key: str) -> str:
    for part, reason in (
        (
            "lora_magnitude_vector",
            "belongs to DoRA, which rescales the base's weights: it cannot be imported",
        ),
        ("lora_embedding_", "adapts an embedding, which is not a linear module: it cannot be imported"),
        ("modules_to_save", "is a whole module that was trained beside the adapter: it cannot be imported"),
    ):
        if part in key:
            return reason
    return "is not a tensor of a LoRA, MoSLoRA or LinChain adapter: it cannot be imported"


def _check_modules(weights: Path, config: dict[str, Any], modules: dict[str, ForeignModule]) -> None:
    if not modules:
        raise InputError(f"{weights} holds no LoRA tensors")
    mixers = int(config.get("mixer_num") or 1) if config.get("lora_use_mixer") else None
    for path, module in modules.items():
        absent = [f"lora_{part}.weight" for part in "AB" if getattr(module, part) is None]
        if absent:
            raise InputError(f"{weights}: module '{path}' has no {' and no '.join(absent)}")
        rank = module.A.shape[0]
        if module.A.dim() != 2 or module.B.dim() != 2 or module.B.shape[1] != rank:
            raise InputError(
                f"{weights}: module '{path}' has lora_A {tuple(module.A.shape)} and lora_B"
                f" {tuple(module.B.shape)}, which do not"
                " fit each other (only linear modules can be imported)"
            )
        if sorted(module.mixers) != list(range(len(module.mixers))):
            raise InputError(
                f"{weights}: module '{path}' holds the mixers {sorted(module.mixers)}: one is missing"
            )
        if mixers is not None and len(module.mixers) != mixers:
            raise InputError(
                f"{weights}: module '{path}' holds {len(module.mixers)} mixers where {CONFIG_FILE} promises"
                f" {mixers}."
                " (PEFT drops them silently when it loads and saves such a checkpoint.)"
            )
        odd = [place for place, mixer in module.mixers.items() if mixer.shape != (rank, rank)]
        if odd:
            raise InputError(
                f"{weights}: mixer {odd[0]} of module '{path}' is {tuple(module.mixers[odd[0]].shape)},"
                f" expected {(rank, rank)}"
            )
