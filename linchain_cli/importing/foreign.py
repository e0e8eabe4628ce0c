"""Adapter checkpoints of other tools, as they lie on disk: PEFT's LoRA, MoSLoRA, and the LinChain authors'.

<path>.lora_A.weight, <path>.lora_B.weight      all of them; an adapter's name may stand before `weight`
<path>.lora_AB.weight                           MoSLoRA's one mixer; newer PEFT calls it lora_mixer.weight
<path>.lora_mixer.<i>.weight, .bias             the LinChain authors': i = 0 is applied first
<path>.lora_B.bias                              PEFT with lora_bias
<path>[.base_layer].weight                      the base's own embeddings and head, which PEFT saves with some
<path>[.modules_to_save].weight, .bias          a classifier's head, which PEFT trains whole beside the LoRA
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linchain_cli.errors import InputError, first_line
from linchain_cli.run import is_adapter, is_run

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CLASSIFIER = "SEQ_CLS"  # PEFT's task_type

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+?)\.lora_(?P<part>A|B|AB|mixer)(?:\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)"
)

# What PEFT, and before it its wrapper, puts into the names of modules that it saves whole.
_SAVED_WHOLE = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_BASE_WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<path>[^:]+?)(?:\.base_layer)?\.weight")

# Parts of the configuration that change the function in a way that no chain of matrices beside the base can.
_REFUSED = {
    "use_dora": "DoRA rescales the base's weights",
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
    """A checkpoint as it was read.

    module_biases: the base's own biases that were trained along
    base_weights: whole weights that were saved beside the adapter, by module path: the base's own, or not
    saved: of a classifier what was trained whole beside the adapter, its head, by parameter name in float32
    """

    directory: Path
    config: dict[str, Any]
    modules: dict[str, ForeignModule]
    module_biases: dict[str, Tensor]
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        """Whether it is a sequence classifier's."""
        return self.config.get("task_type") == CLASSIFIER


def read_foreign(checkpoint: Path) -> ForeignAdapter:
    """Reads a checkpoint directory (or a file in it). No pickled code is run.

    Raises:
        InputError: a file is missing or damaged, or it is a kind of adapter that no chain can hold; the
        message says which.
    """
    directory = Path(checkpoint)
    directory = directory.parent if directory.is_file() else directory
    if not (directory / CONFIG_FILE).is_file():
        is_ours, is_model = is_run(directory) or is_adapter(directory), (directory / "config.json").is_file()
        what = " It is a run of linchain's, which every command takes as it is." if is_ours else ""
        what = " It is a whole model, which eval, generate and chat take as it is." if is_model else what
        raise InputError(f"{checkpoint} is no adapter checkpoint: {CONFIG_FILE} is missing.{what}")
    config = _read_config(directory / CONFIG_FILE)
    weights = next((directory / name for name in WEIGHTS_FILES if (directory / name).is_file()), None)
    if weights is None:
        raise InputError(f"{directory} holds no weights: expected {' or '.join(WEIGHTS_FILES)}")
    modules: dict[str, ForeignModule] = {}
    module_biases, base_weights, saved = {}, {}, {}
    whole = config.get("modules_to_save") or ()
    for key, tensor in _read_tensors(weights).items():
        match = _KEY.fullmatch(key)
        name = _SAVED_WHOLE.sub("", key.removeprefix("base_model.model."))
        if match:
            _put(modules.setdefault(match["path"], ForeignModule()), match, key, tensor.float(), weights)
        elif _is_below(name, whole):
            saved[name] = tensor.float()
        elif key.endswith(".bias") and config.get("bias", "none") != "none":
            module_biases[key.removeprefix("base_model.model.").removesuffix(".bias")] = tensor.float()
        elif (match := _BASE_WEIGHT.fullmatch(key)) and "lora_" not in key and "modules_to_save" not in key:
            base_weights[match["path"]] = tensor
        else:
            raise InputError(f"{weights}: '{key}' {_unknown(key)}")
    _check_modules(weights, config, modules)
    return ForeignAdapter(directory, config, modules, module_biases, base_weights, saved)


def _is_below(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of the modules that PEFT saves whole by these names: it takes every
    module whose path ends in one."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(path.endswith(module) for path in paths for module in modules)


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, checked as far as it is used.

    Raises:
        InputError: it is damaged, or no LoRA's; the message names the key.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} does not describe a LoRA: it is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} does not describe a LoRA: expected a JSON object")
    if "lora_parameters" in config or "fine_tune_type" in config:
        raise InputError(
            f"{path} is of mlx-lm, whose adapters are laid out in another way and cannot be imported. Fuse it"
            " there (mlx_lm.fuse), or train with a tool that writes PEFT's format."
        )
    if missing := [key for key in ("peft_type", "r", "lora_alpha") if key not in config]:
        raise InputError(f"{path} does not describe a LoRA: {' and '.join(missing)} missing")
    rank, alpha = config["r"], config["lora_alpha"]
    kind = str(config["peft_type"]).rpartition(".")[2].upper()
    if kind not in ("LORA", "MOSLORA"):
        raise InputError(
            f"{path}: peft_type {kind} cannot be imported; expected LORA (also MoSLoRA and LinChain"
            " checkpoints)"
        )
    if type(rank) is not int or rank < 1 or not _is_positive(alpha):
        raise InputError(
            f"{path}: expected a whole r ≥ 1 and a finite lora_alpha > 0, found r = {rank!r} and lora_alpha ="
            f" {alpha!r}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, config.get(key))
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise InputError(f"{path}: {key} is {config[key]!r}, expected a text")
    if not isinstance(config.get("mixer_num"), (int, type(None))):
        raise InputError(f"{path}: mixer_num is {config['mixer_num']!r}, expected a whole number")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: '{key}' is set, which cannot be imported: {reason}")
    whole = config.get("modules_to_save")
    if not isinstance(whole, (list, type(None))) or not all(isinstance(name, str) for name in whole or ()):
        raise InputError(f"{path}: modules_to_save is {whole!r}, expected a list of module names")
    if whole and config.get("task_type") != CLASSIFIER:
        raise InputError(
            f"{path}: 'modules_to_save' is set, which cannot be imported: whole modules were trained beside"
            f" the adapter. What can be is the head of a sequence classifier (task_type {CLASSIFIER})."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is '{start}', which also changes the base's weights. Save the"
            " adapter converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion) and import"
            " that."
        )
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _check_pattern(path: Path, key: str, patterns: Any) -> None:
    """Raises InputError unless `patterns` maps regular expressions to positive numbers (or is not there)."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {key} is {patterns!r}, expected an object from module names to numbers")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: {key}: '{pattern}' is no regular expression ({error})") from error
        if not _is_positive(value):
            raise InputError(f"{path}: {key}: '{pattern}' is {value!r}, expected a finite number > 0")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as plain weights, and code in it is never run ({first_line(error)})"
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
        if not module.A.numel() or not module.B.numel():
            raise InputError(
                f"{weights}: module '{path}' is empty (lora_A {tuple(module.A.shape)}), as DeepSpeed ZeRO-3"
                " leaves it when it saves without gathering: save it again with"
                " stage3_gather_16bit_weights_on_model_save, or put its checkpoint together with"
                " zero_to_fp32.py."
            )
        rank = module.A.shape[0] if module.A.dim() == 2 else 0
        if module.A.dim() != 2 or module.B.dim() != 2 or module.B.shape[1] != rank:
            raise InputError(
                f"{weights}: module '{path}' has lora_A {tuple(module.A.shape)} and lora_B"
                f" {tuple(module.B.shape)}, which do not fit each other (only linear modules can be imported)"
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
        tensors = [module.A, module.B, *module.mixers.values(), *module.mixer_biases.values()]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise InputError(
                f"{weights}: module '{path}' holds values that are no finite numbers: its training diverged,"
                " or the file is damaged"
            )
