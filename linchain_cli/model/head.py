"""The model in two halves: everything up to the last hidden states, and the head that turns those into
logits.

Only labelled positions need logits, and with a large vocabulary not all of them at once. transformers' models
apply head, scaling and soft-capping in one `forward`; to run just that part, for any architecture, the real
forward is called with its backbone replaced for the length of the call by one that returns given hidden
states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.errors import InputError
from linchain_cli.model.config import text_decoder
from linchain_cli.model.fast import (
    REFUSALS,
    alike,
    embeddings_apart,
    forget_failed_forward,
    gradient_of,
    probe_ids,
    replace_forward,
)
from linchain_cli.model.names import map_names
from linchain_cli.model.packed import open_weights

_ROWS_AT_ONCE = 4096
_NOTHING = 1e-6  # of what rows usually are


def backbone(model: nn.Module) -> nn.Module:
    """The module whose output the model's forward turns into logits: embeddings, blocks and final norm.

    In a multimodal model that is all of it but the head; OPT's forward calls the decoder within its base
    model; some name the wrong module as their decoder.
    """
    multimodal = model.config.get_text_config(decoder=True) is not model.config
    candidates = () if multimodal else (model.get_decoder(),)
    no_part = (model, model.get_output_embeddings(), None)
    return next(each for each in (*candidates, model.base_model, *model.children()) if each not in no_part)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The text decoder's repeated blocks, in order.

    They are the outermost modules that transformers marks as units of recomputation; where it marks none, the
    members of the decoder's longest list of modules.

    Raises:
        InputError: the model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = text_decoder(model)
    marked = [
        path for path, module in decoder.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    outermost = [path for path in marked if not any(path.startswith(other + ".") for other in marked)]
    if outermost:
        return [decoder.get_submodule(path) for path in outermost]
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} is not made of blocks, which training.gradient_checkpointing,"
            " training.compile and training.parallel=shard need: switch them off."
        )
    return list(max(lists, key=len))


def vocabulary_size(model: nn.Module) -> int:
    """How many logits the model's output head gives for a position."""
    head = model.get_output_embeddings()
    return head.out_features if hasattr(head, "out_features") else head.weight.shape[0]


def head_weight(model: nn.Module, directory: Path) -> Tensor | None:
    """The weight (V, d) of the model's output head, whole: as the model holds it, else, of one that has none
    of its own (on the meta device, or spread over processes), as the checkpoint in `directory` does.

    None where there is no such weight, or no floating-point one, or the checkpoint's files are not here.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None  # quantised
    if weight.device.type != "meta" and not hasattr(weight, "device_mesh"):
        return weight.detach()
    with contextlib.suppress(InputError, OSError):
        stored, own = open_weights(directory), f"{head_path(model)}.weight"
        names = map_names(model, stored.shapes)
        for name in (own, *names.tied.get(own, ())):
            if name in names.renamed:
                return stored.tensors[names.renamed[name]][...]
    return None


def head_path(model: nn.Module) -> str | None:
    """The output head's path; None of a model without one."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


@torch.no_grad()
def untrained_tokens(weight_Vd: Tensor, tokens: Sequence[int]) -> list[int]:
    """Those of `tokens` whose row of a head's weight (V, d) is next to zero or, bit for bit, another's.

    Bases have tokens for later use that stood in none of their texts, as Llama 3's `<|eot_id|>`. Such a row
    gives the same logit whatever the text, or that of others, so that nothing which is learned in front of
    the head makes a model write this token rather than another one.
    """
    norms_V = torch.cat([part.float().norm(dim=1) for part in weight_Vd.split(_ROWS_AT_ONCE)])
    nothing = _NOTHING * norms_V.median()
    found = []
    for token in tokens:
        alike = (norms_V == norms_V[token]).nonzero().flatten()
        others = weight_Vd[alike[alike != token][:_ROWS_AT_ONCE]]
        if norms_V[token] <= nothing or (others == weight_Vd[token]).all(dim=1).any():
            found.append(token)
    return found


def hidden_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The backbone's last hidden states (batch, length, d) for right-padded rows (batch, length).

    No attention mask is needed: with causal attention a row's own tokens come before its padding and never
    see it.
    """
    return backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state


class _GivenHiddenStates:
    """Stands for a backbone's output, of which architectures read different fields: the ones it lacks are
    None.
    """

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.last_hidden_state,)[key]

    def get(self, name: str, default: Any = None) -> Any:
        return self.last_hidden_state if name == "last_hidden_state" else default


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, d), with whatever scaling and capping the model's forward
    applies.
    """
    placeholder = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
    undo = replace_forward(backbone(model), lambda _self, *args, **kwargs: _GivenHiddenStates(hidden[None]))
    try:
        # Its gradient needs no copy, as that of an element of the batch would.
        return model(input_ids=placeholder, use_cache=False).logits.squeeze(0)
    finally:
        undo()


@torch.no_grad()
def check_split(model: nn.Module) -> None:
    """Verifies on eight tokens that the two halves give the whole model's logits, and that no token's state
    depends on what stands behind it.

    Raises:
        InputError: they do not, so that training on them would be training on something else; or it does, and
        the model would be shown what it is to predict.
    """
    refuse_looking_ahead(model)
    ids = probe_ids(model, 1, 8)
    whole = model(input_ids=ids, use_cache=False).logits[0]
    try:
        split = head_logits(model, hidden_states(model, ids)[0])
    except REFUSALS as error:
        raise InputError(
            f"{type(model).__name__} cannot be split into backbone and head ({error})"
        ) from error
    if not alike(split, whole, model.dtype):
        raise InputError(
            f"{type(model).__name__} computes more between its hidden states and its logits than linchain can"
            " follow; this architecture is not supported"
        )


def refuse_looking_ahead(model: nn.Module) -> None:
    """Raises InputError for a model that sees the tokens which it should predict: it would be trained, and
    measured, on what it was just shown."""
    if _looks_ahead(model, probe_ids(model, 1, 8)):
        raise InputError(
            f"{type(model).__name__} as config.json describes it sees the tokens that it should predict:"
            " it is no language model that reads from left to right. It may learn to tell classes:"
            " task: classification"
        )


def _looks_ahead(model: nn.Module, ids: Tensor) -> bool:
    """Whether the states of the first tokens have a gradient for the embeddings of those behind them. A model
    that reads from left to right has none at all, however it rounds and whatever experts it chooses."""
    try:
        with torch.enable_grad(), embeddings_apart(model) as embedded:
            half = ids.shape[1] // 2
            states = hidden_states(model, ids)[:, :half]
            gradient = gradient_of(states, embedded[-1])
    except REFUSALS:  # which training will tell of
        forget_failed_forward(model)
        return False
    behind = gradient.reshape(ids.numel(), -1)[half:]  # some put rows behind positions
    return bool(behind.nan_to_num(0.0, 0.0, 0.0).any())
