"""The model in two halves: everything up to the last hidden states, and the head that turns those into
logits.

Only labelled positions need logits, and with a large vocabulary not all of them at once. transformers' models
apply head, scaling and soft-capping in one `forward`; to run just that part, for any architecture, the real
forward is called with its backbone replaced for the length of the call by one that returns given hidden
states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli.errors import InputError
from linchain_cli.model.attention import GROUPED, FlatRows, alike, attention_window, reading_flat


def backbone(model: nn.Module) -> nn.Module:
    """The module whose output the model's forward turns into logits: embeddings, blocks and final norm.

    In a multimodal model that is all of it but the head; OPT's forward calls the decoder within its base
    model.
    """
    multimodal = model.config.get_text_config(decoder=True) is not model.config
    return model.base_model if multimodal else model.get_decoder()


def vocabulary_size(model: nn.Module) -> int:
    """How many logits the model's output head gives for a position."""
    head = model.get_output_embeddings()
    return head.out_features if hasattr(head, "out_features") else head.weight.shape[0]


def hidden_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The backbone's last hidden states (batch, length, d) for right-padded rows (batch, length).

    No attention mask is needed: with causal attention a row's own tokens come before its padding and never
    see it.
    """
    return backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state


_READS_FLAT = "_linchain_reads_flat"  # on a model that `allow_flat_rows` has tried


def flat_hidden_states(model: nn.Module, rows: FlatRows) -> Tensor:
    """The backbone's last hidden states of rows without padding: their tokens', and those of the tokens
    behind them that belong to no row, (count, d). For models that `reads_flat` allows."""
    with reading_flat():
        output = backbone(model)(**vars(rows), use_cache=False)
    return output.last_hidden_state[0]


def reads_flat(model: nn.Module, longest: int) -> bool:
    """Whether the model reads rows of up to `longest` tokens without padding."""
    return (
        getattr(model, _READS_FLAT, False)
        and model.config._attn_implementation == GROUPED
        and longest <= attention_window(model)
    )


@torch.no_grad()
def allow_flat_rows(model: nn.Module) -> bool:
    """Tries on two rows of different lengths whether the model gives the same without padding, and with their
    common beginning computed once, as with padding, and from then on has `reads_flat` say so. Models that mix
    neighbouring tokens outside their attention do not.
    """
    forbid_flat_rows(model)
    longest = int(min(13, attention_window(model)))
    if model.config._attn_implementation != GROUPED or longest < 3:
        return False
    embeddings = model.get_input_embeddings().weight
    ids = (torch.arange(2 * longest).view(2, longest) + 1) % embeddings.shape[0]
    ids[1, : longest // 3] = ids[0, : longest // 3]
    mask = torch.ones_like(ids)
    mask[0, longest // 2 :] = 0
    rows = FlatRows.of(ids, mask, embeddings.dtype).to(embeddings.device)
    real = mask.bool().to(embeddings.device)
    try:
        padded = hidden_states(model, ids.to(embeddings.device)).float()[real]
        flat = flat_hidden_states(model, rows)[rows.padded_rows[:, :longest][real]].float()
        same = alike(flat, padded, model.dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        same = False
    setattr(model, _READS_FLAT, same)
    return same


def forbid_flat_rows(model: nn.Module) -> None:
    """Undoes `allow_flat_rows`."""
    setattr(model, _READS_FLAT, False)


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


@contextlib.contextmanager
def _backbone_returns(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    replaced = backbone(model)
    own = replaced.__dict__.get("forward")
    replaced.forward = lambda *args, **kwargs: _GivenHiddenStates(hidden)
    try:
        yield
    finally:
        if own is None:
            del replaced.forward
        else:
            replaced.forward = own


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, d), with whatever scaling and capping the model's forward
    applies.
    """
    placeholder = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
    with _backbone_returns(model, hidden[None]):
        return model(input_ids=placeholder, use_cache=False).logits[0]


@torch.no_grad()
def check_split(model: nn.Module) -> None:
    """Verifies on eight tokens that the two halves give the whole model's logits.

    Raises:
        InputError: they do not, so that training on them would be training on something else.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().num_embeddings
    whole = model(input_ids=ids, use_cache=False).logits[0].float()
    try:
        split = head_logits(model, hidden_states(model, ids)[0]).float()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be split into backbone and head ({error})"
        ) from error
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if not torch.allclose(whole, split, rtol=tolerance, atol=tolerance * whole.abs().max().item()):
        raise InputError(
            f"{type(model).__name__} computes more between its hidden states and its logits than linchain can"
            " follow; this architecture is not supported"
        )
