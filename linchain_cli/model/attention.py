"""Which attention a model computes with: one written for CPUs, and torch's own (SDPA) for GPUs.

On a CPU transformers' eager attention repeats keys and values for the query heads that share them, and goes
through the scores in float32; torch's SDPA takes still longer in its backward pass. `grouped_attention` takes
the query heads of one key head as more rows of one product (grouped-query attention, arXiv 2305.13245), and
leaves the softmax in the scores' type, whose kernel computes in float32 anyway. Forward and backward take
about half of eager's time, and a third of its memory is kept in between.

On a GPU SDPA has the fastest kernels, as long as it is given no mask. `FLAT_SDPA` is transformers' way of
calling it under a name of its own, by which a model is known to read rows without padding.

How far back a layer looks (a sliding window, a chunk) stands nowhere that all architectures agree on; what
they do agree on is to have transformers make the masks. So `note_reaches` reads it off these.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from linchain_cli.model.classifier import PADDED, is_classifier
from linchain_cli.model.fast import REFUSALS, alike, forget_failed_forward, probe_ids, record

GROUPED = "grouped"
FLAT_SDPA = "flat_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q·kᵀ + mask)·v, in the form that transformers' AttentionInterface asks for.

    Args:
        query: (batch, heads, queries, d). key, value: (batch, key heads, keys, d and d_v).
        attention_mask: what is added to the scores, broadcast to (batch, heads, queries, keys), or None.
        softcap: c of c·tanh(scores / c), before the mask (Gemma 2).

    Returns:
        (batch, queries, heads, d_v), contiguous, and None for the weights.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    shared = heads // groups
    scaling = width**-0.5 if scaling is None else scaling
    scores = torch.matmul(
        (query * scaling).reshape(batch, groups, shared * queries, width), key.transpose(2, 3)
    )
    scores = scores.view(batch, heads, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, shared * queries, keys), value)
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _device_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' mask for SDPA. It would read a given mask of padding, in every forward, to learn whether
    there is any: who gives one has some, unless `PADDED` says otherwise."""
    if not PADDED.get():
        options["attention_mask"] = None
    if options.get("attention_mask") is not None:
        options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*arguments, **options)


class FlatLayout(Protocol):
    """How the attention of flat rows (model/flat_attention.py) is computed; the model hands it on to every
    layer as `flat`."""

    def attend(
        self,
        attention: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attention within each row, as far as the layer `module` looks back.

        Args:
            attention: what transformers' AttentionInterface would call on padded rows.
            query, key, value: (1, heads or key heads, tokens, d).

        Returns:
            (1, tokens, heads, d).
        """
        ...


# Tensors that masks and rotary embeddings have taken into account before attention is handed them.
_CONSIDERED = ("position_ids", "cache_position")


def _reading_flat_rows(attention: Callable) -> Callable:
    """An attention function for transformers' AttentionInterface that reads flat rows, too. It refuses what
    a model hands on that is in no formula here: sinks, position biases, which keys are chosen."""

    def either(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        flat: FlatLayout | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for name, given in options.items():
            if isinstance(given, Tensor) and name not in _CONSIDERED:
                raise NotImplementedError(f"attention with {name}")
        if flat is None:
            return attention(module, query, key, value, attention_mask, **options)
        return flat.attend(attention, module, query, key, value, **options), None

    return either


AttentionInterface.register(GROUPED, _reading_flat_rows(grouped_attention))
AttentionInterface.register(FLAT_SDPA, _reading_flat_rows(sdpa_attention_forward))
_MASKS: dict[str, Callable] = {GROUPED: eager_mask, FLAT_SDPA: _device_mask}
for _name, _mask in _MASKS.items():
    AttentionMaskInterface.register(_name, _mask)


class Reach(NamedTuple):
    """How far back a layer's queries look: at the last `window` tokens, their own among them, at those of
    their own `chunk` of so many, or (both None) at all before them."""

    window: int | None = None
    chunk: int | None = None

    @property
    def size(self) -> float:
        """Rows of so many tokens have plain causal attention."""
        return self.window or self.chunk or math.inf

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries at these places look at keys at those, broadcast."""
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        if self.chunk is not None:
            seen = seen & (keys // self.chunk == queries // self.chunk)
        return seen


def reach_of(module: nn.Module) -> Reach:
    """What `note_reaches` found for an attention module; no limit if not all of its model's were found."""
    return getattr(module, _REACH, Reach())


def reaches(model: nn.Module) -> frozenset[Reach] | None:
    """Those of all the model's layers; None where `note_reaches` did not find them all."""
    return record(model).get(_REACH)


_REACH = "linchain_reach"


@torch.no_grad()
def note_reaches(model: PreTrainedModel) -> None:
    """Has `reach_of` and `reaches` know how far back each of the model's layers looks.

    A layer's reach is that of the mask which transformers makes for it, told from the function by which the
    mask is made: the lengths in question are far beyond what a trial could compute. A model with GROUPED or
    FLAT_SDPA attention; one that makes its own masks, or changes them, stays unknown.
    """
    found: dict[nn.Module, Reach | None] = {}
    try:
        with _masks_noted(model.config._attn_implementation, found):
            model(input_ids=probe_ids(model, 1, 3), use_cache=False)
    except REFUSALS:
        forget_failed_forward(model)
    known = bool(found) and None not in found.values()
    for module, reach in found.items():
        setattr(module, _REACH, reach if known else Reach())
    record(model)[_REACH] = frozenset(found.values()) if known else None


@contextlib.contextmanager
def _masks_noted(name: str, found: dict[nn.Module, Reach | None]) -> Iterator[None]:
    """Inside, `found` receives the modules that compute attention, and how far their masks let them look."""
    attention, made = AttentionInterface()[name], []

    def make_mask(*arguments: Any, **options: Any) -> Tensor | None:
        made_by = options.get("mask_function", causal_mask_function)
        options["allow_is_causal_skip"] = False
        mask = _MASKS[name](*arguments, **options)
        made.append((mask, _reach_by(made_by, options.get("local_size"), mask)))
        return mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        reach = next((reach for own, reach in made if own is mask), None) if mask is not None else None
        found[module] = reach if found.get(module, reach) == reach else None
        return attention(module, query, key, value, mask, **options)

    AttentionMaskInterface.register(name, make_mask)
    AttentionInterface.register(name, attend)
    try:
        yield
    finally:
        AttentionMaskInterface.register(name, _MASKS[name])
        AttentionInterface.register(name, attention)


def _reach_by(made_by: Callable, size: int | None, mask: Tensor | None) -> Reach | None:
    """The reach that transformers' function for a mask stands for; `size` is the window or chunk in it."""
    if mask is None:
        return None
    candidates = [Reach()] if size is None else [Reach(window=size), Reach(chunk=size)]
    probed = 16 if size is None else 2 * size + 2
    keys = torch.arange(probed, device=mask.device)
    queries = keys[[0, 1, probed // 2 - 2, probed // 2 - 1, probed // 2, probed - 2, probed - 1], None]
    nothing = torch.zeros_like(queries)
    try:
        seen = made_by(nothing, nothing, queries, keys)
    except REFUSALS:
        return None
    return next((reach for reach in candidates if torch.equal(seen, reach.sees(queries, keys))), None)


def attention_window(model: nn.Module) -> float:
    """Tokens up to which the model's attention is plain: behind it a sliding window or a chunk ends."""
    config = model.config.get_text_config()
    limits = (
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size", "attention_window_size")
    )
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=float("inf"))


def may_group(model: PreTrainedModel) -> bool:
    """Whether nothing is known that speaks against another attention; `use_attention` finds out."""
    return model._can_set_attn_implementation() and not any(
        hasattr(module, "sinks") for module in model.modules()
    )


@torch.no_grad()
def use_attention(model: PreTrainedModel, name: str) -> bool:
    """Gives a model GROUPED or FLAT_SDPA attention, if it then gives the same answers as with its own.

    Returns:
        Whether it did. Architectures that bring an attention of their own, or something that is not in the
        formula, keep what they have.
    """
    if not may_group(model):
        return False
    ids, before = probe_ids(model, 1, 24), model.config._attn_implementation

    def values() -> Tensor:
        if is_classifier(model):  # whose logits are a few numbers for the whole row
            return model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return model(input_ids=ids, use_cache=False).logits

    expected = values()
    try:
        model.set_attn_implementation(name)
        same = alike(values(), expected, model.dtype)
    except REFUSALS:
        forget_failed_forward(model)
        same = False
    if not same:
        model.set_attn_implementation(before)
    return same
