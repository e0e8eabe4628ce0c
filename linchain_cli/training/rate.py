"""`training.learning_rate: auto`: the peak learning rate that others found for models of a family and size.

The table is that of thinking-machines' tinker-cookbook (tinker_cookbook/hyperparam_utils.py, `get_lr`, and
recipes/chat_sl/results/sft_sweep.md): the best of a grid of about half decades for LoRA on Tulu 3, 780 steps
of 128 rows. Its alpha is 32 ("LoRA Without Regret", Schulman et al. 2025). That of classifiers is what LoRA's
authors train on GLUE with (github.com/microsoft/LoRA, examples/NLU), at an alpha of 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from linchain_cli.chain import initial_gain, linear_shape
from linchain_cli.chain.layer import is_quantised
from linchain_cli.recipe import AdapterConfig, Recipe
from linchain_cli.recipe.schema import Task

TABLE_ALPHA = 32.0
# By transformers' model type: up to so many parameters (in a mixture of experts those that a token meets),
# this rate.
_BY_SIZE = {
    "llama": ((5e9, 1e-3), (math.inf, 3e-4)),
    "qwen3": ((10e9, 1e-3), (math.inf, 3e-4)),
    "qwen3_moe": ((10e9, 1e-3), (math.inf, 3e-4)),
    "qwen3_5": ((math.inf, 3e-4),),
    "qwen3_5_moe": ((math.inf, 3e-4),),
    "deepseek_v3": ((math.inf, 4e-4),),
    "nemotron_h": ((5e9, 4e-4), (math.inf, 1e-3)),
    "gpt_oss": ((4.5e9, 1e-4), (math.inf, 3e-4)),
}
# Most of the table's models beyond five billion parameters have 3e-4; of smaller ones it has Llama and Qwen.
_OTHERS = _BY_SIZE["llama"]
# RoBERTa base 4e-4 to 5e-4 and large 3e-4 to 4e-4, both with alpha 16; DeBERTa-v2 XXL, of 1.5 billion,
# 1e-4 to 2e-4 with alpha 32. The head is trained at the chains' rate.
_CLASSIFIERS = ((2e8, 2.5e-4), (1e9, 1.5e-4), (math.inf, 1e-4))


@dataclass(frozen=True)
class AutoRate:
    """A rate, and what it was made of in a sentence's part."""

    rate: float
    reason: str

    def describe(self) -> str:
        return f"learning rate {self.rate:g}, by auto: {self.reason}"


def with_rate(recipe: Recipe, model: nn.Module) -> tuple[Recipe, AutoRate | None]:
    """The recipe with a number in the place of `auto`, and how it was found; any other recipe as it is.

    Args:
        model: the recipe's base without chains; the meta device will do.
    """
    if recipe.training.learning_rate != "auto":
        return recipe, None
    found = auto_rate(model, recipe.adapter, recipe.task)
    training = recipe.training.model_copy(update={"learning_rate": found.rate})
    return recipe.model_copy(update={"training": training}), found


def far_from_auto(recipe: Recipe, model: nn.Module) -> str | None:
    """What is to be said of a recipe's own rate that is at least twice as high or as low as `auto`'s."""
    own, found = recipe.training.learning_rate, auto_rate(model, recipe.adapter, recipe.task)
    if own == "auto" or 0.5 < own / found.rate < 2:
        return None
    return (
        f"training.learning_rate: {own:g}, where auto would be {found.rate:g}: {found.reason}. linchain tune"
        " finds a rate by training"
    )


def auto_rate(model: nn.Module, adapter: AdapterConfig, task: Task = "causal") -> AutoRate:
    """The table's rate times 32 / alpha, and √3 for each kaiming link whose scale is not given back.

    With Adam a tensor's step has the length of its rate, whatever its gradient's is. So while B is small, ΔW
    moves by rate · alpha · gain / r for each of r rows that pull the same way: the rank cancels, and what
    alpha or the links' gain take away, the rate gives back. That the best rate hardly depends on the rank
    where alpha is the same is also what was measured ("LoRA Without Regret").
    """
    kind, size = model.config.model_type, active_parameters(model)
    if task == "causal":
        table, whose = _BY_SIZE.get(kind, _OTHERS), kind
        if kind not in _BY_SIZE:
            whose += ", which the table lacks, as of llama"
    else:
        table, whose = _CLASSIFIERS, "a classifier" if task == "classification" else "a regression"
    rate = next(rate for limit, rate in table if size < limit)
    reason = f"{rate:g} for {size / 1e9:.2g} billion parameters of {whose}"
    if adapter.alpha != TABLE_ALPHA:
        rate *= TABLE_ALPHA / adapter.alpha
        reason += f", times {TABLE_ALPHA:g} / alpha"
    gain = initial_gain(adapter.init, adapter.depth)
    if adapter.scale != "match" and gain != 1:
        rate /= gain
        reason += f", times {1 / gain:.3g} for what {adapter.depth} {adapter.init} links lose"
    return AutoRate(min(1.0, float(f"{rate:.2g}")), reason)


def active_parameters(model: nn.Module) -> int:
    """Parameters that a token meets: of a mixture of experts its share of them, of a quantised layer those
    that it stands for."""
    share, sizes = _expert_share(model), {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            packed = is_quantised(module) and parameter is module.weight
            size = math.prod(linear_shape(module)) if packed else parameter.numel()
            sizes[parameter] = size * (share if ".experts" in f".{path}" else 1)
    return round(sum(sizes.values()))


def _expert_share(model: nn.Module) -> float:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return min(1.0, used / experts) if experts and used else 1.0
