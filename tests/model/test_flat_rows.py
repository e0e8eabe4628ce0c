"""Rows without padding against rows with it, on small random models of many architectures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from linchain_cli.model.attention import FLAT_SDPA, GROUPED, attention_window, use_attention
from linchain_cli.model.flat_rows import (
    LENGTH_STEP,
    TOKEN_STEP,
    FlatRows,
    allow_flat_rows,
    flat_hidden_states,
    mask_type,
    reads_flat,
)
from linchain_cli.model.head import hidden_states

# What brings an attention of its own.
THEIR_OWN = {"bloom", "falcon", "mpt", "gptj", "codegen", "gpt_neo"}
# What does not hand on to its attention what it does not know itself.
KEEP_TO_THEMSELVES = {"stablelm", "nemotron"}
IDS = torch.arange(3, 63).view(2, 30) % 117 + 3


@pytest.mark.parametrize("attention", [GROUPED, FLAT_SDPA])
def test_rows_without_padding(architecture, attention, small_model, hidden_and_gradient):
    """What a model says of itself holds: with gradients, several rows, and one that fills the longest."""
    model = small_model(architecture)
    if attention == FLAT_SDPA and not model._supports_sdpa:
        pytest.skip("has no SDPA")
    model.set_attn_implementation("eager" if attention == GROUPED else "sdpa")
    use_attention(model, attention)
    assert allow_flat_rows(model) == (architecture not in THEIR_OWN | KEEP_TO_THEMSELVES)
    if not reads_flat(model, 3):
        return
    longest = min(8, int(min(attention_window(model), 8)))
    ids = IDS[:, :longest].repeat(2, 1)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in (3, longest, 1, longest - 1)])
    padded = hidden_and_gradient(
        model, lambda: hidden_states(model, ids).flatten(0, 1)[mask.flatten().bool()]
    )
    for share in (False, True):
        rows = FlatRows.of(ids, mask, mask_type(model), share=share)
        assert len(rows.shared_tokens) == share * longest  # one of rows 0 and 2, the others of rows 1 and 3
        real = rows.padded_rows[:, :longest][mask.bool()]
        flat = hidden_and_gradient(model, lambda: flat_hidden_states(model, rows)[real])  # noqa: B023
        for ours, theirs in zip(flat, padded, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())
    assert reads_flat(model, longest)
    assert reads_flat(model, 1000) == (attention_window(model) >= 1000)


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
    rows = FlatRows.of(ids, torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]), torch.float32)
    # Behind the six tokens and beyond the longest row stand some that belong to no row.
    assert rows.input_ids.shape == rows.position_ids.shape == (1, TOKEN_STEP)
    assert rows.input_ids[0, :6].tolist() == [5, 6, 7, 8, 9, 4]
    assert rows.position_ids[0, :6].tolist() == [0, 1, 0, 1, 2, 0]
    real = [row * LENGTH_STEP + place for row, place in PLACES]
    assert rows.flat_rows[:6].tolist() == real
    # All of no row stand in one slot of the padding.
    assert len(rows.flat_rows) == TOKEN_STEP and len(set(rows.flat_rows[6:].tolist()) - set(real)) == 1
    assert rows.padded_rows.shape == (3, LENGTH_STEP)
    assert rows.padded_rows[:, :3].tolist() == [[0, 1, 0], [2, 3, 4], [5, 0, 0]]
    assert torch.equal(rows.attention_mask[0, 0] < 0, torch.ones(LENGTH_STEP, LENGTH_STEP).triu(1).bool())


def test_what_rows_begin_with_is_computed_once():
    ids = torch.tensor([[7, 8, 9, 1], [7, 8, 2, 3], [5, 8, 9, 1], [7, 8, 2, 0], [7, 8, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    rows = FlatRows.of(ids, mask, torch.float32)
    assert rows.input_ids[0, :10].tolist() == [7, 8, 9, 1, 2, 3, 5, 8, 9, 1]
    assert rows.position_ids[0, :10].tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    tokens = rows.padded_rows[:, :4]
    assert tokens[mask.bool()].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 0, 1, 4, 0, 1, 4, 5]
    assert rows.shared_tokens.tolist() == [0, 1, 4, 5]
    # Token 4 is in the third place of rows 1, 3 and 4. Rows 0 and 2 lack it, and so does the padding, slot 4.
    assert rows.token_holders[2].tolist() == [4, LENGTH_STEP + 2, 4, 3 * LENGTH_STEP + 2, 4 * LENGTH_STEP + 2]
    alone = FlatRows.of(ids, mask, torch.float32, share=False)
    assert alone.input_ids[0, : mask.sum()].tolist() == ids[mask.bool()].tolist()
    assert len(alone.shared_tokens) == 0 and alone.token_holders.shape == (0, 5)


PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_rows_that_fill_every_slot_get_some_padding():
    full = torch.ones(3, LENGTH_STEP, dtype=torch.long)
    rows = FlatRows.of(full, full, torch.float32, share=False)
    assert rows.padded_rows.shape == (3, 2 * LENGTH_STEP)
    assert rows.flat_rows[:24].tolist() == [row * 16 + place for row in range(3) for place in range(8)]
    assert set(rows.flat_rows[24:].tolist()) == {8}


def test_no_position_lies_behind_the_longest_row():
    full = torch.ones(3, 5, dtype=torch.long)
    assert FlatRows.of(full, full, torch.float32, share=False).position_ids.tolist() == [
        [*range(5)] * 3 + [0]
    ]


def test_shapes_recur():
    """A new shape costs oneDNN new programs: rows of nearly the same lengths are read in the same shapes."""
    shapes = set()
    for longest in range(17, 25):
        mask = torch.ones(3, longest, dtype=torch.long)
        rows = FlatRows.of(mask, mask.tril(longest - 3), torch.float32, share=False)
        shapes.add((rows.input_ids.shape[1], *rows.padded_rows.shape))
    assert shapes == {(48, 3, 24), (64, 3, 24), (80, 3, 24)}


def test_tokens_of_no_row_reach_nobody(small_model):
    model = small_model("llama")
    assert use_attention(model, GROUPED) and allow_flat_rows(model)
    rows = FlatRows.of(IDS[:1, :5], torch.ones(1, 5, dtype=torch.long), torch.float32)
    others = rows.input_ids.clone()
    others[0, 5:] = 77
    hidden = flat_hidden_states(model, rows)
    changed = flat_hidden_states(model, dataclasses.replace(rows, input_ids=others))
    assert torch.equal(hidden[:5], changed[:5]) and not torch.equal(hidden[5:], changed[5:])
