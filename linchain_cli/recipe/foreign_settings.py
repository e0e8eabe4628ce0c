"""What another tool's configuration says of the model, the adapter and the training, as fields of a recipe.

Each rule reads the settings that it needs; what it cannot say it notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from linchain_cli.recipe.foreign_rows import LENGTH
from linchain_cli.recipe.other_tools import (
    AXOLOTL,
    CALLED_HERE,
    LLAMA_FACTORY,
    LLAMA_FACTORY_V1,
    TRL,
    instead_of,
)
from linchain_cli.recipe.theirs import Fields, Theirs, is_no, names, number


def settings(theirs: Theirs) -> Fields:
    """The fields of all sections but data that are said."""
    return {field: value for rule in _RULES for field, value in rule(theirs).items() if value is not None}


def note_what_is_learned(theirs: Theirs) -> None:
    """Notes where something else than a LoRA is trained, or on something else than answers."""
    for key, fine in (
        ("stage", ("sft", "pt")),
        ("rl", ()),
        ("reward_model", ()),
        ("process_reward_model", ()),
    ):
        if not is_no(value := theirs(key)) and value not in fine:
            theirs.unsaid(key, value, "not here: what is learned is the rows' answers")
    key, method = _method(theirs)
    if method == "full":
        why = "all weights are trained there, with a rate for that; linchain trains an adapter"
        theirs.remarks.append(f"{why}: training.learning_rate: auto takes one for it")
    elif method not in _LORA:
        theirs.unsaid(key, method, "not here: low-rank chains alone are trained")


_LORA = ("lora", "qlora")
_RANK = ("lora_r", "lora_rank", "r")


def _method(theirs: Theirs) -> tuple[str, str]:
    """What is trained there, and the key that says it."""
    key = "finetuning_type" if theirs("finetuning_type") else "adapter"
    said = theirs(key)
    if said is None and theirs.tool is not AXOLOTL:
        said = "lora" if theirs.yes("use_peft") or theirs.sets(*_RANK) else None
    return key, "full" if is_no(said) else str(said)


def _model(theirs: Theirs) -> Fields:
    dtype = theirs("dtype", "torch_dtype", "compute_dtype", "precision")
    for name, flags in (
        ("float32", ("float32",)),
        ("float16", ("fp16", "float16")),
        ("bfloat16", ("bf16", "bfloat16", "pure_bf16")),
    ):
        dtype = name if theirs.yes(*flags) else dtype
    bits = theirs("quantization_bit", "quantization_config")
    for name, flag in (("8", "load_in_8bit"), ("4", "load_in_4bit")):
        bits = name if theirs.yes(flag) else bits
    for key in ("bnb_4bit_quant_type", "quantization_type", "quantization_method"):
        if not is_no(bits) and theirs.sets(key) and (kind := str(theirs(key))).lower() not in _QUANTIZED:
            theirs.unsaid(key, kind, "not here: model.quantization is nf4 or int8")
    attention = [theirs(key) for key in _ATTENTION]
    eager = theirs.yes("eager_attention") or "eager" in attention
    return {
        "model.dtype": dtype and str(dtype).removeprefix("torch."),
        "model.quantization": {"4": "nf4", "8": "int8"}.get(str(bits), bits),
        "model.attention": "eager" if eager else None,  # auto takes the fastest
    }


_QUANTIZED = ("nf4", "int8", "bnb", "bitsandbytes", "auto")
_ATTENTION = [key for key, field in CALLED_HERE.items() if field == "model.attention"]


def _adapter(theirs: Theirs) -> Fields:
    """rsLoRA's scale is alpha / √rank, ours alpha / rank; LLaMA-Factory's alpha is twice the rank if open. An
    adapter to start from has a rank and an alpha, whatever the tool's defaults are."""
    start = names(theirs("lora_model_dir", "adapter_name_or_path"))
    if start:
        first = ", ".join(f"`linchain import {adapter} --out NEW`" for adapter in start)
        theirs.remarks.append(
            f"adapter.init_from: first {first}, then name {'NEW' if len(start) == 1 else 'one'} there; "
            "rank, alpha and target_modules have to be its own"
        )
    theirs.notes["adapter.depth"] = "LoRA, as there; 3 makes it a chain"
    fields = {"adapter.depth": "0", "adapter.init_from": start[0] if len(start) == 1 else None}
    rooted = theirs.yes("use_rslora", "peft_use_rslora")
    if _method(theirs)[1] not in _LORA or (start and not theirs.sets(*_RANK)):
        return fields
    rank, alpha, dropout = theirs(*_RANK), theirs("lora_alpha"), theirs("lora_dropout")
    if script := _script(theirs):
        if not theirs.sets("lora_alpha"):
            alpha, theirs.notes["adapter.alpha"] = _ALPHA[script], f"{script}'s, where nothing is said"
        dropout = dropout if theirs.sets("lora_dropout") else "0"
    rows = number(rank) or 0
    if alpha is None and theirs.tool is LLAMA_FACTORY and rows:
        alpha = f"{2 * rows:.12g}"
    if rooted and rows > 0 and number(alpha):
        alpha = round(number(alpha) * math.sqrt(rows), 4)
    return {
        **fields,
        "adapter.rank": rank,
        "adapter.alpha": alpha,
        "adapter.dropout": dropout,
        "adapter.target_modules": _targets(theirs),
    }


_ALPHA = {"Unsloth": "16", "PEFT": "8"}  # by default


def _script(theirs: Theirs) -> str | None:
    """Who makes the adapter of a script, which calls the rank `r` as no command line of these tools does."""
    if not theirs.sets("r") or theirs.tool is LLAMA_FACTORY_V1:
        return None
    return "Unsloth" if theirs.sets("random_state", "use_gradient_checkpointing") else "PEFT"


def _targets(theirs: Theirs) -> Any:
    chosen = theirs("lora_target_modules", "lora_target", "target_modules", "target")
    every = theirs.yes("lora_target_linear") or chosen in ("all", "all-linear", ["all-linear"])
    experts = names(theirs("lora_target_parameters", "target_parameters"))
    if chosen is None and not every and theirs.tool is TRL and _script(theirs) != "Unsloth":
        theirs.remarks.append("adapter.target_modules: PEFT's choice there, [q_proj, v_proj] for most models")
    if every or chosen is None:
        return ["all-linear", *experts] if experts else "all-linear"
    if isinstance(chosen, str) and not re.fullmatch(r"[\w., -]+", chosen):  # a regular expression
        return chosen
    return names(chosen) + experts


def _batches(theirs: Theirs) -> Fields:
    """Where rows are packed, one of a batch is as many as fit into a sequence; how many are in memory at once
    is left open then."""
    packed = theirs.yes("packing", "neat_packing", "sample_packing") and not theirs.documents
    micro = theirs("micro_batch_size", "per_device_train_batch_size")
    together = theirs("global_batch_size", "batch_size")
    rows, times = number(micro), number(theirs("gradient_accumulation_steps") or 1)
    if together is None and rows and times:
        together = f"{rows * times:.12g}"
        theirs.notes["training.global_batch_size"] = "of one process there: times your GPUs"
    if packed:
        theirs.notes["training.global_batch_size"] = (
            f"of {theirs(*LENGTH)} tokens each there: times the rows that fit into that, and your GPUs"
        )
        micro = None
    if theirs.yes("auto_find_batch_size"):
        micro = "auto"
    return {"training.micro_batch_size": micro, "training.global_batch_size": together}


def _schedule(theirs: Theirs) -> Fields:
    """transformers' `constant` has no warm-up, and a number of warm-up steps comes before a share; to Axolotl
    0 is a number, too."""
    most = theirs("max_steps")
    steps = None if (number(most) or 0) <= 0 else most
    epochs = theirs("num_epochs", "num_train_epochs", "epochs")
    course = str(theirs("lr_scheduler", "lr_scheduler_type"))
    near = next((kind for kind in ("cosine", "constant", "linear") if course.startswith(kind)), course)
    floor = theirs("cosine_min_lr_ratio")
    floor = floor if near == "cosine" else None
    if course == "cosine_with_min_lr":
        more = theirs("lr_scheduler_kwargs")
        if isinstance(more, Mapping) and set(more) == {"min_lr_rate"}:
            floor, course = more["min_lr_rate"], near
        elif more is not None:
            theirs.unsaid("lr_scheduler_kwargs", more, "training.min_lr_ratio takes a share of learning_rate")
    if near not in (course, "constant"):
        theirs.unsaid("training.lr_scheduler", course, f"not here: {near} is the nearest")
    warm_up = theirs("warmup_steps")
    if warm_up is None or number(warm_up) == 0 and theirs.tool is not AXOLOTL:
        warm_up = theirs("warmup_ratio") or warm_up
    if theirs.tool is AXOLOTL and not theirs.sets("warmup_steps", "warmup_ratio"):
        theirs.notes["training.warmup_steps"] = "there at most 100 steps"
    optimizer = theirs("optimizer", "optim")
    return {
        "training.learning_rate": theirs("learning_rate", "lr"),
        "training.max_steps": steps,
        "training.epochs": None if steps else epochs,
        "training.lr_scheduler": near,
        "training.min_lr_ratio": floor,
        "training.warmup_steps": "0" if course == "constant" else warm_up,
        "training.optimizer": "adamw"
        if re.match("(paged_|ao_|optimi_|flash_)?adamw", str(optimizer))
        else optimizer,
    }


def _memory(theirs: Theirs) -> Fields:
    again = theirs(
        "gradient_checkpointing",
        "use_gradient_checkpointing",
        "activation_checkpointing",
        "enable_activation_checkpointing",
    )
    elsewhere = str(again).startswith("offload") or theirs("activation_offloading") in _OFFLOADED
    again = "true" if str(again).startswith(("offload", "unsloth")) else again
    compiled = theirs("torch_compile", "compile")
    for key in ("deepspeed", "fsdp", "fsdp_config", "dp_shard_size", "dp_replicate_size"):
        theirs(key)  # auto shards what does not fit
    return {
        "training.gradient_checkpointing": "false" if theirs.yes("disable_gradient_checkpointing") else again,
        "training.offload_activations": "true" if elsewhere else None,
        "training.compile": None if compiled == "auto" else compiled,
    }


_OFFLOADED = ("true", "legacy", "disk", "hidden_states")


def _intervals(theirs: Theirs) -> Fields:
    return {
        "training.eval_every": _every("eval", theirs),
        "training.save_every": _every("save", theirs),
        "training.log_every": theirs("logging_steps"),
    }


def _every(what: str, theirs: Theirs) -> Any:
    """How often: a strategy `epoch` counts whatever number of steps stands beside it; a share is one of the
    whole run."""
    strategy = theirs(f"{what}_strategy", "evaluation_strategy" if what == "eval" else f"{what}_strategy")
    steps, times = theirs(f"{what}_steps"), theirs(f"{what}s_per_epoch")
    if not is_no(strategy) and strategy not in ("steps", "epoch"):
        theirs.unsaid(f"training.{what}_every", strategy, "not here: a number of steps, or epoch")
    epochs, most = number(theirs("num_epochs", "num_train_epochs")), number(theirs("max_steps")) or 0
    share = number(steps)
    if strategy == "epoch":
        times = "1"
    elif what == "save" and number(theirs("save_epochs")):
        times = 1 / number(theirs("save_epochs"))
    elif share and 0 < share < 1 and most > 0:
        return max(1, round(share * most))
    elif share and 0 < share < 1 and epochs:
        times = 1 / (share * epochs)
    if number(times):
        each = max(1, round(number(times)))
        return "epoch" if each == 1 else f"epoch/{each}"
    return None if is_no(steps) else steps


def _kept(theirs: Theirs) -> Fields:
    best = theirs("metric_for_best_model")
    patience = theirs("early_stopping_patience", "early_stopping_steps")
    return {
        "training.keep": "best" if theirs.yes("load_best_model_at_end") else "last",
        "training.best_by": best and str(best).removeprefix("eval_"),
        "training.early_stopping": None if is_no(patience) else patience,
    }


def _trackers(theirs: Theirs) -> Fields:
    found = [str(name) for name in names(theirs("report_to")) if name not in ("none", "all")]
    found += [name for key, name in _TRACKERS.items() if not is_no(theirs(key))]
    if not is_no(project := theirs("wandb_project")):
        theirs.unsaid("wandb_project", project, "WANDB_PROJECT in the environment")
    theirs("logging_strategy")
    return {"training.trackers": list(dict.fromkeys(found)) or None}


_TRACKERS = {
    "wandb_project": "wandb",
    "use_wandb": "wandb",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_tensorboard": "tensorboard",
    "use_trackio": "trackio",
    "use_swanlab": "swanlab",
}


def _plugins(theirs: Theirs) -> Fields:
    """Kernels are what a device has; others do something that a recipe does not say."""
    for plugin in names(theirs("plugins")):
        if not re.search("cut_cross_entropy|liger|kernels|swanlab|expert_parallel|lm_eval", str(plugin)):
            theirs.unsaid("plugins", plugin, "not here")
    return {}


def _tokens(theirs: Theirs) -> Fields:
    """Padding needs no token here."""
    special = theirs("special_tokens")
    if isinstance(special, Mapping):
        special = {name: token for name, token in special.items() if name not in ("pad_token", "unk_token")}
    if not is_no(special):
        theirs.unsaid("special_tokens", special, instead_of("special_tokens"))
    theirs("pad_token")
    return {}


_RULES: tuple[Callable[[Theirs], Fields], ...] = (
    _model,
    _adapter,
    _batches,
    _schedule,
    _memory,
    _intervals,
    _kept,
    _trackers,
    _plugins,
    _tokens,
)
