"""Every language model of the installed transformers that can be built small: our ways against its own.

Rows are longer than those of the trials that a model is put to when it is loaded, which is where an attention
that chooses its keys, or a window, begins to matter. What cannot be built, or is refused, is skipped with the
reason.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linchain_cli.errors import InputError
from linchain_cli.model.attention import FLAT_SDPA, GROUPED
from linchain_cli.model.flat_rows import VARLEN, attention_way
from linchain_cli.model.head import check_split

from .test_flat_rows import compare, has_sdpa, suited

pytestmark = pytest.mark.skipif(
    "LINCHAIN_TEST_SLOW" not in os.environ, reason="builds 200 models; LINCHAIN_TEST_SLOW=1 runs it"
)
LONGEST = 80
MOST_PARAMETERS = 20_000_000
# By the names that configurations have for them; each takes those that its own has.
SIZES = {
    32: "hidden_size d_model n_embd dim embedding_size width word_embed_proj_dim d_embed",
    64: "intermediate_size ffn_dim d_inner encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank",
    8: "head_dim kv_lora_rank v_head_dim index_head_dim index_topk",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
    " num_experts n_routed_experts num_local_experts qk_rope_head_dim qk_nope_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads"
    " num_experts_per_tok moe_topk index_n_heads",
    1: "n_group topk_group first_k_dense_replace",
    160: "vocab_size",
    512: "max_position_embeddings n_positions n_ctx",
    0: "pad_token_id",
}


# Where some sizes do not go together, others may.
OTHERWISE = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "qk_rope_head_dim": 8},
    {"head_dim": 4},
)


def config_of(kind: str, changes: Mapping[str, int]) -> PreTrainedConfig:
    """A configuration of small sizes, those of its text part where it has one."""

    def fields(given: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {name: size for size, names in SIZES.items() for name in names.split()} | changes
        found = {name: size for name, size in sizes.items() if given.get(name) is not None}
        return found | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    given = AutoConfig.for_model(kind).to_dict()
    if "text_config" in given:
        return AutoConfig.for_model(kind, text_config=fields(given["text_config"]))
    return AutoConfig.for_model(kind, **fields(given))


def small(kind: str) -> PreTrainedModel:
    """A random model of that type, float32, frozen, which reads a few tokens.

    Raises:
        Exception: none of the sizes do. InputError: it is none that is trained.
    """
    for changes in OTHERWISE:
        try:
            config = config_of(kind, changes)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            if (count := sum(parameter.numel() for parameter in empty.parameters())) > MOST_PARAMETERS:
                raise ValueError(f"{count:,} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
            model.set_attn_implementation("eager")
            check_split(model)
            return model
        except InputError:
            raise
        except Exception as error:
            problem = error
    raise problem


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_long_rows_without_padding_are_the_models_own(kind, hidden_and_gradient):
    try:
        model = small(kind)
    except InputError as error:
        pytest.skip(f"refused: {error}")
    except Exception as error:  # whatever a configuration of sizes that do not fit ends in
        pytest.skip(f"cannot be built small: {error!r:.200}")
    own, ways = copy.deepcopy(model), 0
    for way in (GROUPED, FLAT_SDPA, VARLEN):
        if way == GROUPED or has_sdpa(model):
            suited(model, way)
            if attention_way(model, LONGEST) is not None:
                ways += 1
                compare(model, own, LONGEST, hidden_and_gradient, rtol=1e-3, atol=1e-4)
    if not ways:
        pytest.skip("reads rows with padding alone")
