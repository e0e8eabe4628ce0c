"""Which values of a config.json a model's outputs depend on, and in which of them two differ: a hash of
weights does not show that a rotary base, an epsilon or a window was edited.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from linchain_cli.storage import sha256_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What changes no output of a frozen model. Unknown keys count: a key that is missing here is told in vain, a
# change of one that is wrongly here is never told. Padding is no part of it: some encoders count positions
# by it.
_WITHOUT_EFFECT = frozenset(
    # origin, storage, and code, which is never run
    "architectures auto_map dtype torch_dtype torchscript transformers_version"
    # what a call returns and keeps
    " attn_implementation chunk_size_feed_forward output_attentions output_hidden_states output_router_logits"
    " return_dict use_cache"
    # training from the start, and losses
    " finetuning_task gradient_checkpointing initializer_factor initializer_range problem_type"
    " router_aux_loss_coef task_specific_params"
    # names, which tokenizers and recipes have
    " bos_token_id eos_token_id id2label label2id sep_token_id unk_token_id"
    # generation, where an older configuration holds it
    " do_sample max_length max_new_tokens num_beams repetition_penalty temperature top_p".split()
)


def computed_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that decides what the model computes, as it stands, but for the numbers that
    JSON does not have, which are their names."""
    return {
        key: _plain(value)
        for key, value in config.items()
        if not (key in _WITHOUT_EFFECT or key.startswith("_") or "dropout" in key or key.endswith("_pdrop"))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return computed_values(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def computed_sha256(config: PretrainedConfig) -> str:
    """What tells a model's configuration from another one of its weights, for one version of transformers."""
    values = computed_values(json.loads(config.to_json_string(use_diff=False)))
    return sha256_bytes(json.dumps(values, sort_keys=True).encode())


def changed_values(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Where two results of `computed_values` mean different models, in words:
    `rms_norm_eps: 1e-05, now 1e-06`.

    Both are read by the installed transformers, whose versions write the same in different ways and with
    other defaults left out. Of what was not recorded (None) nothing is said.
    """
    if before is None:
        return []
    one, other = dict(_flat(_completed(before))), dict(_flat(_completed(now)))
    return [
        f"{key}: {_shown(one.get(key))}, now {_shown(other.get(key))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what transformers adds to them; as they are where it cannot read them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(dict(values)))
        return computed_values(json.loads(config.to_json_string(use_diff=False)))
    except Exception:  # a strict configuration class may reject a field with any exception type
        return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
