"""Rows without padding against rows with it, on small random models of many architectures."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from linchain_cli.model import flat_rows, varlen
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, Reach, use_attention
from linchain_cli.model.flat_rows import (
    LENGTH_STEP,
    LONG,
    TOKEN_STEP,
    VARLEN,
    FlatRows,
    allow_flat_rows,
    attention_way,
    flat_hidden_states,
    rows_for,
)
from linchain_cli.model.head import hidden_states

# What does not hand on to its attention what it does not know itself.
KEEP_TO_THEMSELVES = {"stablelm", "nemotron"}
IDS = torch.arange(3, 63).view(2, 30) % 117 + 3


def has_sdpa(model) -> bool:
    """transformers 5.17 says so of Gemma 2, too, whose scores SDPA cannot cap."""
    return model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None)


def suited(model, way: str):
    """The model, reading flat rows in one of the three ways, as far as it can."""
    model.set_attn_implementation("eager" if way == GROUPED else "sdpa")
    use_attention(model, GROUPED if way == GROUPED else FLAT_SDPA)
    allow_flat_rows(model, varlen.reference if way == VARLEN else None)
    return model


def compare(model, own, longest: int, run, *, rtol: float, atol: float):
    """Hidden states and gradients without padding are those of `own` with padding, for rows of several
    lengths of which two pairs begin alike, and one is the beginning of another."""
    ids = (torch.arange(2 * longest).view(2, longest) % 117 + 3).repeat(2, 1)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in (3, longest, 1, longest - 1)])
    padded = run(own, lambda: hidden_states(own, ids).flatten(0, 1)[mask.flatten().bool()])
    for share in (False, True):
        rows = rows_for(model, ids, mask, share=share)
        # Common to rows 0 and 2 is one token, to rows 1 and 3 all but one.
        count = mask.sum() - share * longest
        assert 0 <= rows.input_ids.shape[1] - count <= TOKEN_STEP
        real = rows.token_of[:, :longest][mask.bool()]
        flat = run(model, lambda: flat_hidden_states(model, rows)[real])  # noqa: B023
        for ours, theirs in zip(flat, padded, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * theirs.abs().max())


@pytest.mark.parametrize("way", [GROUPED, FLAT_SDPA, VARLEN])
def test_rows_without_padding(
    architecture, way, small_model, own_attention, hidden_and_gradient, monkeypatch
):
    """What a model says of itself holds: with gradients, and for rows beyond its windows."""
    model = small_model(architecture)
    if way != GROUPED and not has_sdpa(model):
        pytest.skip("has no SDPA")
    monkeypatch.setattr(flat_rows, "LONG", 1)
    suited(model, way)
    is_flat = attention_way(model, 3) is not None
    assert is_flat == (architecture not in own_attention | KEEP_TO_THEMSELVES)
    assert is_flat == (attention_way(model, 1000) is not None)
    if is_flat:
        assert attention_way(model, 1000) == way
        compare(model, model, 20, hidden_and_gradient, rtol=1e-4, atol=1e-5)


# Windows of 8 tokens (in all layers, or in some), and chunks of 8.
LIMITED = [
    "mistral", "phi3", "gemma2", "gemma3_text", "cohere2", "starcoder2", "modernbert-decoder", "llama4_text",
]  # fmt: skip


@pytest.mark.parametrize("way", [GROUPED, FLAT_SDPA, VARLEN])
@pytest.mark.parametrize("kind", LIMITED)
def test_windows_and_chunks_in_float64(kind, way, small_model, hidden_and_gradient):
    """Against transformers' own attention with its own masks."""
    model = small_model(kind).double()
    if kind == "phi3":
        model.config.sliding_window = 8
    if way != GROUPED and not has_sdpa(model):
        pytest.skip("has no SDPA")
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager" if way == GROUPED else "sdpa")
    suited(model, way)
    for longest in (9, 25):
        assert attention_way(model, longest) == way
        compare(model, own, longest, hidden_and_gradient, rtol=1e-6, atol=1e-6)


def test_rows_whose_places_would_count_together_are_padded(small_model):
    """Llama 4 counts tokens by itself: 24 in each row's own places are few, 48 behind each other are not."""
    model = suited(small_model("llama4_text"), GROUPED)
    ids, mask = IDS[:, :24], torch.ones(2, 24, dtype=torch.long)
    assert rows_for(model, ids, mask, share=False) is not None
    model.config.floor_scale = 40
    assert rows_for(model, ids, mask, share=False) is None
    assert rows_for(model, ids[:1], mask[:1], share=False) is not None


@pytest.mark.parametrize("kind", ["zamba", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_runs_along_the_tokens_is_noticed(small_model, kind, dtype):
    """In bfloat16 what a row's end does to the next row's beginning is less than the rounding."""
    model = small_model(kind).to(dtype)
    assert use_attention(model, GROUPED) and not allow_flat_rows(model)


def test_what_is_as_small_as_rounding_is_noticed(small_model):
    model = small_model("llama").bfloat16()
    assert use_attention(model, GROUPED) and allow_flat_rows(model)
    block = model.model.layers[0]
    block.register_forward_hook(lambda _module, _inputs, output: output + 1e-6 * output.roll(1, dims=1))
    assert not allow_flat_rows(model)


def test_trials_leave_no_gradients(small_model):
    model = small_model("llama").requires_grad_(True)
    assert use_attention(model, GROUPED) and allow_flat_rows(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_flat_rows_know_where_their_tokens_stand():
    ids = torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
    rows = FlatRows.of(ids, torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]))
    # Behind the six tokens and beyond the longest row stand some that belong to no row.
    assert rows.input_ids.shape == rows.position_ids.shape == (1, TOKEN_STEP)
    assert rows.input_ids[0, :6].tolist() == [5, 6, 7, 8, 9, 4]
    assert rows.position_ids[0, :6].tolist() == [0, 1, 0, 1, 2, 0]
    real = [row * LENGTH_STEP + place for row, place in PLACES]
    first = rows.layout.places.first
    assert first[:6].tolist() == real
    # All of no row stand in one slot of the padding.
    assert len(first) == TOKEN_STEP and len(set(first[6:].tolist()) - set(real)) == 1
    assert rows.token_of.shape == (3, LENGTH_STEP)
    assert rows.token_of[:, :3].tolist() == [[0, 1, 0], [2, 3, 4], [5, 0, 0]]
    mask = rows.layout.masked([], torch.float32).masks[Reach()]
    assert torch.equal(mask[0, 0] < 0, torch.ones(LENGTH_STEP, LENGTH_STEP).triu(1).bool())


def test_what_rows_begin_with_is_computed_once():
    ids = torch.tensor([[7, 8, 9, 1], [7, 8, 2, 3], [5, 8, 9, 1], [7, 8, 2, 0], [7, 8, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    rows = FlatRows.of(ids, mask)
    assert rows.input_ids[0, :10].tolist() == [7, 8, 9, 1, 2, 3, 5, 8, 9, 1]
    assert rows.position_ids[0, :10].tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    tokens, places = rows.token_of[:, :4], rows.layout.places
    assert tokens[mask.bool()].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 0, 1, 4, 0, 1, 4, 5]
    assert places.shared.tolist() == [0, 1, 4, 5]
    # Token 4 is in the third place of rows 1, 3 and 4. Rows 0 and 2 lack it, and so does the padding, slot 4.
    assert places.holders[2].tolist() == [4, LENGTH_STEP + 2, 4, 3 * LENGTH_STEP + 2, 4 * LENGTH_STEP + 2]
    alone = FlatRows.of(ids, mask, share=False)
    assert alone.input_ids[0, : mask.sum()].tolist() == ids[mask.bool()].tolist()
    assert len(alone.layout.places.shared) == 0 and alone.layout.places.holders.shape == (0, 5)


PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_rows_that_fill_every_slot_get_some_padding():
    full = torch.ones(3, LENGTH_STEP, dtype=torch.long)
    rows = FlatRows.of(full, full, share=False)
    assert rows.token_of.shape == (3, 2 * LENGTH_STEP)
    first = rows.layout.places.first.tolist()
    assert first[:24] == [row * 16 + place for row in range(3) for place in range(8)]
    assert set(first[24:]) == {8}


def test_no_position_lies_behind_the_longest_row():
    full = torch.ones(3, 5, dtype=torch.long)
    assert FlatRows.of(full, full, share=False).position_ids.tolist() == [[*range(5)] * 3 + [0]]


def test_shapes_recur():
    """A new shape costs oneDNN new programs: rows of nearly the same lengths are read in the same shapes."""
    shapes = set()
    for longest in range(17, 25):
        mask = torch.ones(3, longest, dtype=torch.long)
        rows = FlatRows.of(mask, mask.tril(longest - 3), share=False)
        shapes.add((rows.input_ids.shape[1], *rows.token_of.shape))
    assert shapes == {(48, 3, 24), (64, 3, 24), (80, 3, 24)}


def test_tokens_of_no_row_reach_nobody(small_model):
    model = small_model("llama")
    assert use_attention(model, GROUPED) and allow_flat_rows(model)
    rows = FlatRows.of(IDS[:1, :5], torch.ones(1, 5, dtype=torch.long))
    others = rows.input_ids.clone()
    others[0, 5:] = 77
    hidden = flat_hidden_states(model, rows)
    changed = flat_hidden_states(model, dataclasses.replace(rows, input_ids=others))
    assert torch.equal(hidden[:5], changed[:5]) and not torch.equal(hidden[5:], changed[5:])


# The rows of `test_what_rows_begin_with_is_computed_once` as the kernel takes them.
SHARED_IDS = torch.tensor([[7, 8, 9, 1], [7, 8, 2, 3], [5, 8, 9, 1], [7, 8, 2, 0], [7, 8, 2, 3]])
SHARED_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])


def test_rows_stay_where_they_are_for_the_kernel():
    rows = FlatRows.of(SHARED_IDS, SHARED_MASK, kernel=varlen.reference, chunks={None, 3})
    (whole, pieces) = rows.layout.pieces[None], rows.layout.pieces[3]
    # Rows 3 and 4 have no token of their own; six tokens belong to no row.
    assert whole.cut.queries.tolist() == [0, 4, 6, 10, 16] and whole.cut.keys.tolist() == [0, 4, 8, 12, 18]
    assert (whole.cut.most_queries, whole.cut.most_keys) == (6, 6)
    assert whole.places.tokens.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, *range(10, 16)]
    assert whole.places.shared.tolist() == [0, 1] and whole.places.holders.tolist() == [[0, 4], [1, 5]]
    # In chunks of three the last token of each row sees itself alone.
    assert pieces.cut.queries.diff().tolist() == [3, 1, 1, 1, 3, 1, 6]
    assert pieces.cut.keys.diff().tolist() == [3, 1, 3, 1, 3, 1, 6]


def test_keys_are_not_copied_where_nothing_is_shared():
    rows = FlatRows.of(SHARED_IDS, SHARED_MASK, share=False, kernel=varlen.reference)
    pieces = rows.layout.pieces[None]
    assert pieces.places is None and torch.equal(pieces.cut.queries, pieces.cut.keys)
    assert pieces.cut.queries.tolist() == [0, 4, 8, 12, 15, 19, 32]


def test_what_decides_between_the_ways(small_model):
    model = suited(small_model("mistral"), FLAT_SDPA)
    assert {attention_way(model, longest) for longest in (1, 8, 9, LONG, 10_000)} == {FLAT_SDPA}
    allow_flat_rows(model, varlen.reference)
    ways = [attention_way(model, longest) for longest in (1, 8, 9, LONG - 1, LONG)]
    assert ways == [FLAT_SDPA, FLAT_SDPA, VARLEN, VARLEN, VARLEN]  # there is a window of 8
    model = suited(small_model("llama"), VARLEN)
    assert [attention_way(model, n) for n in (9, LONG - 1, LONG)] == [FLAT_SDPA, FLAT_SDPA, VARLEN]
    model.set_attn_implementation("sdpa")
    assert attention_way(model, 9) is None


def test_a_kernel_that_does_something_else_is_not_used(small_model):
    def without_windows(query, key, value, cut, scaling, window):
        return varlen.reference(query, key, value, cut, scaling, None)

    def with_neighbours(query, key, value, cut, scaling, window):
        return varlen.reference(query, key, value, cut, scaling, window) + 1e-6 * query.roll(1, 0)

    model = suited(small_model("llama"), FLAT_SDPA)
    for wrong in (without_windows, with_neighbours, lambda *_: 1 / 0, varlen.flash):
        try:
            assert allow_flat_rows(model, wrong) and attention_way(model, LONG) == FLAT_SDPA
        except ZeroDivisionError:
            pass  # no refusal of the model's, and not to be hidden
    assert allow_flat_rows(model, varlen.reference) and attention_way(model, LONG) == VARLEN


def test_masks_that_a_model_changes_leave_its_windows_unknown(small_model):
    """Then rows are read flat as far as they are shorter than any window that the configuration names."""
    model = small_model("cohere2")
    attention = model.model.layers[0].self_attn

    def changed(_module, arguments, options):
        return arguments, {**options, "attention_mask": options["attention_mask"].clone()}

    attention.register_forward_pre_hook(changed, with_kwargs=True)
    suited(model, GROUPED)
    assert attention_way(model, 8) is not None and attention_way(model, 9) is None
